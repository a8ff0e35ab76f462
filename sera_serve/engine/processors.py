"""What each sequence brings into a batch: its adapter's slot and its sampling, as transformers' logits processors."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from sera_kernels import NO_ADAPTER
from sera_serve.engine.sampling import noise_key, perturbed_scores
from sera_serve.engine.sequences import SequenceOptions


class SequenceProcessors(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Rows of the batch's argument tensor: adapter slot per sequence, then sampling per sequence with a new token.

    Unlike the stock list it writes a slot for every sequence, also for those in the middle of a chunked prefill.
    """

    SLOT, TEMPERATURE, TOP_K, TOP_P, KEY = range(5)

    def __init__(self) -> None:
        self.logits_processor = LogitsProcessorList()
        self.tensors_required = 5
        self.supported_keys = {"options": SequenceOptions}
        self.ignored_keys: set[str] = set()
        self.do_processing = True
        self._samples = True
        self._truncates = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Arguments of a batch of the bare base."""
        int32_tensor.zero_()
        int32_tensor[self.SLOT] = NO_ADAPTER

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Write the arguments of a batch into `arg_storage`, int32 (rows, sequences), and return it."""
        # Padding sequences must not run an adapter that an earlier, larger batch left in the row.
        arg_storage[self.SLOT].fill_(NO_ADAPTER)
        slots = [options_of(request.state).adapter_slot for request in requests_in_batch]
        arg_storage[self.SLOT, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        states = [request.state for request in requests_in_batch if request.has_new_token]
        options = [options_of(state) for state in states]
        on_cpu = arg_storage.device.type == "cpu"
        # With graphs the captured work must fit every later batch, so nothing is spared there.
        self._samples = not on_cpu or any(o.temperature > 0 for o in options)
        self._truncates = not on_cpu or any(o.truncates for o in options)
        if not self._samples:
            return arg_storage
        keys = [noise_key(o.seed, s.position_offset) for o, s in zip(options, states, strict=True)]
        rows: list[tuple[int, list[int] | list[float], torch.dtype]] = [
            (self.TEMPERATURE, [o.temperature for o in options], torch.float32),
            (self.TOP_K, [o.top_k for o in options], torch.int32),
            (self.TOP_P, [o.top_p for o in options], torch.float32),
            (self.KEY, keys, torch.int32),
        ]
        for row, values, dtype in rows:
            # Floats travel as their bits in an int32 row.
            arg_storage[row, : len(values)] = torch.tensor(values, dtype=dtype).view(torch.int32)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """The scores (sequences, vocabulary) whose greatest is the next token; noise is added where one is sampled."""
        if not self._samples:
            return scores
        args = logits_processor_args[:, : len(scores)]
        return perturbed_scores(
            scores,
            temperature=args[self.TEMPERATURE].view(torch.float32),
            top_k=args[self.TOP_K],
            top_p=args[self.TOP_P].view(torch.float32),
            keys=args[self.KEY],
            truncate=self._truncates,
        )


def options_of(state: RequestState) -> SequenceOptions:
    """What `ContinuousBatch.submit` was given for this request."""
    options: SequenceOptions = state.logit_processor_kwargs.get("options", SequenceOptions())
    return options
