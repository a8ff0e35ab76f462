"""The decode step as a function of buffers that stay where they are: what a CUDA graph can hold.

Python decides nothing in `StaticDecode.run`, no operation of it reads the device, and no shape depends on the contents
of a buffer. What Python does decide (the number of rows and pages, whether adapters run, whether tokens are sampled) is
given when the step is made, and is part of a graph's key.

A step can be launched before the tokens of the step before it are known to the host: each step leaves its tokens in
`row_tokens`, on the device, where the next step finds them by the request's row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch, ShapeClasses
from sera_serve.base import RotaryContext
from sera_serve.engine.loop.attention import KeyValuePool, StepContext
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.row_tables import RowTables
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.sampling import SamplingRows, choose_tokens, sampling_keys
from sera_serve.layers import AdapterContext

ON_DEVICE = -1
"""In place of a token's id: the step before this one left the token on the device."""

_IN_FLIGHT = 2
"""Launches whose inputs and results are kept apart: one runs, and the next one is prepared."""

# Columns of the packed inputs before the pages, and what a padding row has in them.
_COLUMNS: dict[str, float] = {
    "rows": 0,
    "ids": 0,
    "positions": 0,
    "slots": NO_ADAPTER,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "noise": 0,
}
_FLOATS = ("temperature", "top_p", "min_p")


class StaticSteps(Protocol):
    """Runs steps of decodes alone on static buffers."""

    def launch(self, requests: list[GenerationRequest], ahead: int) -> Callable[[], list[int]]:
        """Start a step and return what waits for its tokens.

        Args:
            requests: With one token each to run.
            ahead: How many tokens of each request are on the device alone: 1 if the step before this one, which has
                the requests too, has not been waited for; else 0.
        """


@dataclass(frozen=True)
class StaticKey:
    """What Python decides of a static step; steps of one key differ in the contents of the buffers alone.

    Attributes:
        rows: The most requests of the step.
        pages: The most pages of a request.
        classes: The kinds of shapes that the requests' adapters may have; none in a step of the base model alone.
        sampled: Whether any request may be sampled.
        truncated: Whether sampling may leave out tokens.
    """

    rows: int
    pages: int
    classes: ShapeClasses
    sampled: bool
    truncated: bool


def classes_of(requests: list[GenerationRequest]) -> ShapeClasses:
    """The kinds of shapes of the requests' adapters."""
    return reduce(or_, {request.shape_classes for request in requests}, ShapeClasses())


class StaticDecode:
    """The decode step of one key. Padding rows use no adapter and write to the scratch page.

    A launch is `stage` on the host, then `upload`, `run` and `download` in the order of the device, then `tokens` on
    the host, once the device has done the download. Two launches may be under way.
    """

    def __init__(
        self,
        model: PagedModel,
        context: AdapterContext,
        pool: KeyValuePool,
        key: StaticKey,
        row_tokens: Tensor,
        rotary: RotaryContext | None = None,
    ) -> None:
        """Make the buffers; outside inference mode, because they are written in every mode.

        Args:
            model: The decoder.
            context: The context of its serving layers.
            pool: Keys and values.
            key: What is fixed.
            row_tokens: int64 (rows of the loop + 1,) on the device, shared by all steps: the last token of each row.
                The last place is for padding.
            rotary: Where a base with a rotary threshold reads which tokens are beyond it.
        """
        self.key = key
        self._model, self._context, self._pool, self._rotary = model, context, pool, rotary
        self._row_tokens = row_tokens
        device, columns = model.device, len(_COLUMNS)
        on_gpu = device.type == "cuda"
        # One buffer, so that one copy brings all inputs: a column of each kind, then the page tables.
        inputs = torch.zeros((columns + key.pages) * key.rows, dtype=torch.int32, device=device)
        self._inputs = inputs
        self._columns = {name: inputs[at * key.rows :][: key.rows] for at, name in enumerate(_COLUMNS)}
        self._columns |= {name: self._columns[name].view(torch.float32) for name in _FLOATS}
        self._table = inputs[columns * key.rows :].view(key.rows, key.pages)
        self.next_tokens = torch.zeros(key.rows, dtype=torch.int64, device=device)
        self._staging = [torch.zeros_like(inputs, device="cpu", pin_memory=on_gpu) for _ in range(_IN_FLIGHT)]
        self._results = [torch.zeros_like(self.next_tokens, device="cpu", pin_memory=on_gpu) for _ in range(_IN_FLIGHT)]
        self._turn = 0

    def stage(self, requests: list[GenerationRequest], tables: RowTables, ahead: int = 0) -> int:
        """Write requests into the first rows of a buffer on the host, and padding into the others; returns its number.

        Args:
            requests: At most as many as the key has rows.
            tables: Of the running requests.
            ahead: See `StaticSteps.launch`.
        """
        self._turn = (self._turn + 1) % _IN_FLIGHT
        staging = self._staging[self._turn].numpy()
        rows = np.array([request.row for request in requests], np.int64)
        lengths = np.array([len(request.tokens) + ahead for request in requests], np.uint64)
        count, size = len(rows), self.key.rows
        values = {
            "rows": rows,
            "ids": np.full(count, ON_DEVICE) if ahead else tables.next_token[rows],
            "positions": tables.computed[rows] + ahead,
            "slots": tables.decode_slots(rows, ahead),
            "temperature": tables.temperature[rows],
            "top_k": tables.top_k[rows],
            "top_p": tables.top_p[rows],
            "min_p": tables.min_p[rows],
            "noise": sampling_keys(tables.seed[rows], lengths),
        }
        for at, (name, padding) in enumerate(_COLUMNS.items()):
            column = staging[at * size :][:size]
            column = column.view(np.float32) if name in _FLOATS else column
            column[:count] = values[name]
            column[count:] = len(self._row_tokens) - 1 if name == "rows" else padding
        pages = staging[len(_COLUMNS) * size :].reshape(size, -1)
        pages[:count] = tables.pages[rows, : self.key.pages]
        pages[count:] = SCRATCH
        return self._turn

    def upload(self, turn: int) -> None:
        """Bring what was staged to the device."""
        self._inputs.copy_(self._staging[turn], non_blocking=True)

    def download(self, turn: int) -> None:
        """Bring the tokens to the host."""
        self._results[turn].copy_(self.next_tokens, non_blocking=True)

    def tokens(self, turn: int, count: int) -> list[int]:
        """The tokens of the first rows, or `NO_TOKEN`."""
        tokens: list[int] = self._results[turn][:count].tolist()
        return tokens

    @torch.no_grad()
    def run(self) -> None:
        """Write each row's keys and values to the pool, and the token that follows, or `NO_TOKEN`, to `next_tokens`."""
        columns = self._columns
        rows, at = columns["rows"].long(), columns["positions"].long()
        # A row whose step has overflowed has no token. It runs on with any, and its result is not looked at.
        before = self._row_tokens.gather(0, rows).clamp(min=0)
        ids = torch.where(columns["ids"] == ON_DEVICE, before, columns["ids"].long())
        page = self._table.gather(1, (at // PAGE_SIZE)[:, None])[:, 0].long()
        step = StepContext(self._pool, page * PAGE_SIZE + at % PAGE_SIZE, table=self._table, lengths=at + 1)
        if self._rotary is not None:
            self._rotary.long_tokens = at >= self._rotary.threshold
        batch = AdapterBatch(columns["slots"], self.key.classes) if self.key.classes.width else None
        with self._context.run(batch):
            logits = self._model.logits(ids[None], at[None], step, 0)
        drawn = SamplingRows(
            columns["temperature"],
            columns["top_k"],
            columns["top_p"],
            columns["noise"],
            columns["min_p"],
            truncate=self.key.truncated,
        )
        self.next_tokens.copy_(choose_tokens(logits, drawn if self.key.sampled else None))
        self._row_tokens.index_copy_(0, rows, self.next_tokens)
