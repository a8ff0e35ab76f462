"""What follows from the failure of a step: memory that comes back, and what clients are told."""

from __future__ import annotations

import traceback

import torch

from sera_serve.errors import EngineUnavailable


def free_memory(error: Exception) -> None:
    """After a step without memory, give back what it held; before the device is asked for anything else."""
    if isinstance(error, torch.OutOfMemoryError):
        # The frames of the error hold the tensors of the failed step.
        traceback.clear_frames(error.__traceback__)
        # What torch holds in pieces may be of use as a whole.
        torch.cuda.empty_cache()


def step_failed(error: Exception) -> EngineUnavailable:
    """What the clients of a failed step are told."""
    if isinstance(error, torch.OutOfMemoryError):
        return EngineUnavailable(
            f"the device's memory was too small for this step: {str(error).splitlines()[0]}; send the request "
            "again, or serve with a smaller max_batch_tokens, max_sequences or gpu_memory_fraction"
        )
    return EngineUnavailable(f"the step failed: {error}")
