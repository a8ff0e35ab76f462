"""How a device's memory is divided: the base's weights, the adapters' pool, the KV cache, and room for the steps.

What follows where a part does not fit, and where a step fails, is told here too.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sera_kernels import workspace_bytes
from sera_serve.config import ServeSettings
from sera_serve.errors import EngineUnavailable, InvalidConfiguration

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

# On a CPU, where the machine's memory is not the server's alone, sizes are fixed.
_CPU_POOL_MIB = 256
_CPU_CACHE_TOKENS = 32768
# Of what the weights leave. Adapters are small beside keys and values: a fifth of 80 GB holds 2,000 of Llama-3-8B's.
_POOL_SHARE = 0.2
# For the libraries' work space, the graphs with what their launches need, and fragments.
_STEP_BYTES = GIBIBYTE
# A step of generation and a pass of classification run at the same time, each with updates of its own.
_TASKS = 2
# Tensors of a step's largest width, and of its logits, that are there at the same time.
_WIDE_TENSORS = 4
_LOGITS_TENSORS = 4
# Of the size of a step's logits: those of prompts, where log-probabilities of prompts are asked for.
_PROMPT_LOGITS = 1
# Of the same size: the tokens of each sequence, counted for penalties, and the logits that graphs leave.
_LASTING_TABLES = 2
# Keys and values of one layer that a step copies together from their pages, where prompts go on after cached ones. The
# keys of one sequence are copied together however many they are.
MOST_GATHERED = 1 << 16


# What torch says on a CPU, where an allocation that fails is a plain RuntimeError.
_CPU_FAILURES = ("can't allocate memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class DecoderSizes:
    """What a decoder's steps need memory for.

    Attributes:
        token_bytes: Keys and values of one token in all layers.
        layer_bytes: Of these, the layer's that has most.
        widest: The largest width of a layer's output, elements.
        vocabulary: The number of tokens that there are.
        context: The most tokens of a sequence.
    """

    token_bytes: int
    layer_bytes: int
    widest: int
    vocabulary: int
    context: int


class DeviceMemory:
    """Sizes of the parts of one device's memory, in the order in which they are allocated.

    What a setting fixes is as it says. The rest is divided by `gpu_memory_fraction` on a GPU, and fixed on a CPU.
    """

    def __init__(self, settings: ServeSettings, device: torch.device) -> None:
        """Plan for a device.

        Args:
            settings: What is fixed.
            device: Has the base's weights already.
        """
        self._settings = settings
        self._device = device
        self._pending = 0

    def hold(self, size: int) -> None:
        """Plan as if so many more bytes were allocated, such as the weights that a device does not have yet."""
        self._pending += size

    def pool_bytes(self) -> int:
        """Size of the adapters' pool, before the KV cache is allocated.

        Raises:
            InvalidConfiguration: The weights leave no memory.
        """
        if self._settings.pool_mib is not None:
            return self._settings.pool_mib * MEBIBYTE
        if self._device.type != "cuda":
            return _CPU_POOL_MIB * MEBIBYTE
        return max(MEBIBYTE, int(self._left("the adapters' pool") * _POOL_SHARE))

    def cache_tokens(self, decoder: DecoderSizes) -> int:
        """Tokens of the KV cache, after the pool is allocated.

        What steps need stays free: a fixed part for libraries and graphs; tensors of `batch_tokens` rows of the largest
        width; logits of `max_sequences`, and of as many tokens of prompts; keys copied together; and the updates'
        workspace, for the highest rank that an adapter may have, of a step and of a classification pass of
        `batch_tokens`. A classification row of more tokens than that takes more than what is counted.

        Raises:
            InvalidConfiguration: The weights and the pool leave no memory.
        """
        settings = self._settings
        if settings.kv_cache_tokens is not None:
            return settings.kv_cache_tokens
        if self._device.type != "cuda":
            return _CPU_CACHE_TOKENS
        steps = _STEP_BYTES + settings.batch_tokens * decoder.widest * 4 * _WIDE_TENSORS
        steps += _TASKS * workspace_bytes(settings.batch_tokens)
        steps += settings.max_sequences * decoder.vocabulary * 4 * (_LOGITS_TENSORS + _PROMPT_LOGITS + _LASTING_TABLES)
        left = self._left("the KV cache") - steps
        gathered = max(MOST_GATHERED, min(decoder.context, left // decoder.token_bytes))
        tokens = (left - gathered * decoder.layer_bytes) // decoder.token_bytes
        if tokens < settings.batch_tokens:
            raise self._too_little("the KV cache")
        return int(tokens)

    def _left(self, wanted: str) -> int:
        """Bytes of the fraction that are not in use, by this process or by others."""
        free, total = torch.cuda.mem_get_info(self._device)
        # Blocks that torch holds without using them are free for what comes.
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        left = int(free - self._pending - total * (1 - self._settings.gpu_memory_fraction))
        if left <= 0:
            raise self._too_little(wanted)
        return left

    def _too_little(self, wanted: str) -> InvalidConfiguration:
        free, total = torch.cuda.mem_get_info(self._device)
        return InvalidConfiguration(
            f"no memory of {self._device} is left for {wanted}: {(total - free) / GIBIBYTE:.1f} of "
            f"{total / GIBIBYTE:.1f} GiB are in use, and gpu_memory_fraction is {self._settings.gpu_memory_fraction}; "
            "raise it, lower pool_mib, or serve a smaller base",
            param="gpu_memory_fraction",
        )


@contextmanager
def memory_of(what: str, param: str, *others: str) -> Iterator[None]:
    """Say what did not fit, and which settings make it smaller, where an allocation in the block fails.

    Raises:
        InvalidConfiguration: The device has too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_short = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_short and not any(words in str(error) for words in _CPU_FAILURES):
            raise
        reason = str(error).partition("\n")[0] or "there is too little memory"
        raise InvalidConfiguration(
            f"{what} does not fit on the device: {reason}; lower {' or '.join((param, *others))}", param=param
        ) from error


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
