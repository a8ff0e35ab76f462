"""The decode step as a function of buffers that stay where they are: what a CUDA graph can hold.

Python decides nothing in `run`, no operation of it reads the device, and no shape depends on the contents of a buffer.
What Python does decide (the number of rows and pages, whether adapters run, whether tokens are sampled) is given when
the step is made, and is part of a graph's key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch
from sera_serve.base import RotaryContext
from sera_serve.engine.loop.attention import KeyValuePool, StepContext
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.runner import RowTables
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.sampling import next_tokens, perturbed_scores, sampling_keys
from sera_serve.layers import AdapterContext


@dataclass(frozen=True)
class StaticKey:
    """What Python decides of a static step; steps of one key differ in the contents of the buffers alone.

    Attributes:
        rows: The most requests of the step.
        pages: The most pages of a request.
        adapters: Whether any request may use an adapter.
        sampled: Whether any request may be sampled.
        truncated: Whether sampling may leave out tokens.
    """

    rows: int
    pages: int
    adapters: bool
    sampled: bool
    truncated: bool


class StaticDecode:
    """The decode step of one key. Padding rows use no adapter and write to the scratch page."""

    def __init__(
        self,
        model: PagedModel,
        context: AdapterContext,
        pool: KeyValuePool,
        key: StaticKey,
        rotary: RotaryContext | None = None,
    ) -> None:
        """Make the buffers; outside inference mode, because they are written in every mode."""
        self.key = key
        self._model, self._context, self._pool, self._rotary = model, context, pool, rotary
        rows, device = key.rows, model.device
        self._padding: dict[str, tuple[Tensor, int]] = {
            "ids": (torch.zeros(rows, dtype=torch.int64, device=device), 0),
            "positions": (torch.zeros(rows, dtype=torch.int64, device=device), 0),
            "slots": (torch.zeros(rows, dtype=torch.int32, device=device), NO_ADAPTER),
            "pages": (torch.zeros(rows, key.pages, dtype=torch.int64, device=device), SCRATCH),
            "temperature": (torch.zeros(rows, device=device), 0),
            "top_k": (torch.zeros(rows, dtype=torch.int32, device=device), 0),
            "top_p": (torch.zeros(rows, device=device), 1),
            "noise": (torch.zeros(rows, dtype=torch.int32, device=device), 0),
        }
        for buffer, padding in self._padding.values():
            buffer.fill_(padding)
        self.next_tokens = torch.zeros(rows, dtype=torch.int64, device=device)

    def load(self, requests: list[GenerationRequest], tables: RowTables) -> None:
        """Write requests into the first rows; the other rows become padding."""
        rows = np.array([request.row for request in requests], np.int64)
        lengths = np.array([len(request.tokens) for request in requests], np.uint64)
        values = {
            "ids": tables.next_token[rows],
            "positions": tables.computed[rows],
            "slots": tables.decode_slots(rows),
            "pages": tables.pages[rows, : self.key.pages],
            "temperature": tables.temperature[rows],
            "top_k": tables.top_k[rows],
            "top_p": tables.top_p[rows],
            "noise": sampling_keys(tables.seed[rows], lengths),
        }
        for name, (buffer, padding) in self._padding.items():
            buffer[: len(rows)].copy_(torch.from_numpy(np.ascontiguousarray(values[name])))
            buffer[len(rows) :].fill_(padding)

    @torch.no_grad()
    def run(self) -> None:
        """Write each row's keys and values to the pool, and the token that follows, or `NO_TOKEN`, to `next_tokens`."""
        ids, at, slots, pages, temperature, top_k, top_p, noise = (buffer for buffer, _ in self._padding.values())
        places = pages.gather(1, (at // PAGE_SIZE)[:, None])[:, 0] * PAGE_SIZE + at % PAGE_SIZE
        step = StepContext(self._pool, places, table=pages, lengths=at + 1)
        if self._rotary is not None:
            self._rotary.long_tokens = at >= self._rotary.threshold
        with self._context.run(AdapterBatch(slots) if self.key.adapters else None):
            scores = self._model.logits(ids[None], at[None], step, 0)
        if self.key.sampled:
            scores = perturbed_scores(scores, temperature, top_k, top_p, noise, truncate=self.key.truncated)
        self.next_tokens.copy_(next_tokens(scores))
