"""A step as a function of buffers that stay where they are: what a CUDA graph can hold.

A static step runs one token of each decode, and short prompts to their ends. A prompt's tokens are computed as decodes
that come at the same time: each token has the row of its request, by which it finds the request's pages. Each layer
writes the keys and values of all tokens before any of them attends, so a token finds those of the tokens before it.

Python decides nothing in `StaticStep.run`, no operation of it reads the device, and no shape depends on the contents
of a buffer. What Python does decide (the number of tokens and requests, whether adapters run, whether tokens are
sampled) is given when the step is made, and is part of a graph's key.

A step can be launched before the tokens of the step before it are known to the host: each step leaves its tokens in
`DeviceRows`, on the device, where the next step finds them by the request's row. It leaves its logits there, too: of
requests with a constraint, penalties or log-probabilities the host chooses the tokens, by operations of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch, ShapeClasses
from sera_serve.engine.loop.attention import StepContext
from sera_serve.engine.loop.attention_backend import RowKeys
from sera_serve.engine.loop.hugging_face import ServedDecoder
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.row_tables import DeviceRows, RowTables
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.sampling import SamplingRows, choose_tokens, sampling_keys

ON_DEVICE = -1
"""In place of a token's id: the step before this one left the token on the device."""

_IN_FLIGHT = 2
"""Launches whose inputs and results are kept apart: one runs, and the next one is prepared."""

# Columns of the packed inputs, and what padding has in them: by token, then by request. Rows of padding are the last.
_BY_TOKEN: dict[str, float] = {"ids": 0, "positions": 0, "slots": NO_ADAPTER, "owners": -1}
_BY_REQUEST: dict[str, float] = {
    "rows": -1,
    "ends": 0,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "noise": 0,
}
_FLOATS = ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class StaticBatch:
    """What a static step runs.

    Attributes:
        decodes: Requests with one token to run.
        prompts: Requests whose prompts run from where they are to their ends.
    """

    decodes: list[GenerationRequest] = field(default_factory=list)
    prompts: list[GenerationRequest] = field(default_factory=list)

    @property
    def requests(self) -> list[GenerationRequest]:
        """All of them: the decodes first."""
        return self.decodes + self.prompts

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return len(self.decodes) + sum(len(request.tokens) - request.computed for request in self.prompts)


@dataclass(frozen=True)
class StaticLaunch:
    """A static step that the device runs, or has run.

    Attributes:
        wait: Waits for it; gives the token that the step has chosen for each of its requests, by the logits alone.
        logits: (requests, vocabulary), in the order of the requests. The next launch overwrites them.
    """

    wait: Callable[[], list[int]]
    logits: Tensor


class StaticSteps(Protocol):
    """Runs steps on static buffers."""

    most_tokens: int
    """Of a step with prompts."""

    def can_run(self, batch: StaticBatch) -> bool:
        """Whether such a step can be launched; false for a while after one like it could not be made."""
        ...

    def launch(self, batch: StaticBatch, ahead: int) -> StaticLaunch:
        """Start a step.

        Args:
            batch: What runs; at least one request.
            ahead: How many tokens of each decode are on the device alone: 1 if the step before this one, which has
                these requests too, has not been waited for; else 0.

        Raises:
            NotCaptured: The step is the first of its kind, and could not be made.
        """


@dataclass(frozen=True)
class StaticKey:
    """What Python decides of a static step; steps of one key differ in the contents of the buffers alone.

    Attributes:
        tokens: The most tokens of the step.
        requests: The most requests of the step.
        classes: The kinds of shapes that the requests' adapters may have; none in a step of the base model alone.
        sampled: Whether any request may be sampled.
        truncated: Whether sampling may leave out tokens.
    """

    tokens: int
    requests: int
    classes: ShapeClasses
    sampled: bool
    truncated: bool


class StaticStep:
    """The step of one key. Padding rows use no adapter and write to the scratch page.

    A launch is `stage` on the host, then `upload`, `run` and `download` in the order of the device, then `tokens` on
    the host, once the device has done the download. Two launches may be under way.
    """

    def __init__(self, decoder: ServedDecoder, rows: DeviceRows, key: StaticKey) -> None:
        """Make the buffers. What is made in inference mode, as for graphs, can be written in no other.

        Args:
            decoder: What runs.
            rows: What the device knows of each row; shared by all steps.
            key: What is fixed.
        """
        self.key = key
        self._decoder, self._rows = decoder, rows
        device = decoder.model.device
        on_gpu = device.type == "cuda"
        # One buffer, so that one copy brings all inputs: a column of each kind.
        sizes = dict.fromkeys(_BY_TOKEN, key.tokens) | dict.fromkeys(_BY_REQUEST, key.requests)
        ends = np.cumsum(list(sizes.values())).tolist()
        self._places = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._inputs = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._columns = {name: self._inputs[place] for name, place in self._places.items()}
        self._columns |= {name: self._columns[name].view(torch.float32) for name in _FLOATS}
        self.next_tokens = torch.zeros(key.requests, dtype=torch.int64, device=device)
        pinned: dict[str, Any] = {"device": "cpu", "pin_memory": on_gpu}
        self._staging = [torch.zeros_like(self._inputs, **pinned) for _ in range(_IN_FLIGHT)]
        self._results = [torch.zeros_like(self.next_tokens, **pinned) for _ in range(_IN_FLIGHT)]
        self._turn = 0

    def stage(self, batch: StaticBatch, tables: RowTables, ahead: int = 0) -> int:
        """Write a batch into a buffer on the host, and padding after it; returns the buffer's number.

        Args:
            batch: At most as many tokens and requests as the key has.
            tables: Of the running requests.
            ahead: See `StaticSteps.launch`.
        """
        self._turn = (self._turn + 1) % _IN_FLIGHT
        staging = self._staging[self._turn].numpy()
        rows = np.array([request.row for request in batch.requests], np.int64)
        decodes = rows[: len(batch.decodes)]
        places = [np.array([len(request.tokens) - 1 + ahead for request in batch.decodes], np.int64)]
        ids: list[Any] = [np.full(len(decodes), ON_DEVICE) if ahead else tables.next_token[decodes]]
        counts = [1] * len(decodes)
        for request in batch.prompts:
            places.append(np.arange(request.computed, len(request.tokens)))
            ids.append(request.tokens[request.computed :])
            counts.append(len(places[-1]))
        lengths = np.array(counts, np.int64)
        at, ends, row_of = np.concatenate(places), lengths.cumsum() - 1, np.repeat(rows, lengths)
        values = {
            "ids": np.concatenate(ids),
            "positions": at,
            "slots": tables.slots_at(row_of, at),
            "owners": row_of,
            "rows": rows,
            "ends": ends,
            "temperature": tables.temperature[rows],
            "top_k": tables.top_k[rows],
            "top_p": tables.top_p[rows],
            "min_p": tables.min_p[rows],
            "noise": sampling_keys(tables.seed[rows], (at[ends] + 1).astype(np.uint64)),
        }
        padding = _BY_TOKEN | _BY_REQUEST | dict.fromkeys(("owners", "rows"), self._rows.padding)
        for name, value in values.items():
            column = staging[self._places[name]]
            column = column.view(np.float32) if name in _FLOATS else column
            column[: len(value)] = value
            column[len(value) :] = padding[name]
        return self._turn

    def upload(self, turn: int) -> None:
        """Bring what was staged to the device."""
        self._inputs.copy_(self._staging[turn], non_blocking=True)

    def download(self, turn: int) -> None:
        """Bring the tokens to the host."""
        self._results[turn].copy_(self.next_tokens, non_blocking=True)

    def tokens(self, turn: int, count: int) -> list[int]:
        """The tokens of the first requests, or `NO_TOKEN`."""
        tokens: list[int] = self._results[turn][:count].tolist()
        return tokens

    @torch.no_grad()
    def run(self) -> None:
        """Write each token's keys and values to the pool, and what follows each request's last to `next_tokens`."""
        columns = self._columns
        rows, ids, at = columns["rows"].long(), columns["ids"].long(), columns["positions"].long()
        # Decodes come first, so the first tokens are those of the first requests. A row whose step has overflowed has
        # no token: it runs on with any, and its result is not looked at.
        tokens, table, owners = self._rows.tokens, self._rows.pages, columns["owners"]
        before = tokens.gather(0, rows).clamp(min=0)
        first, rest = ids[: self.key.requests], ids[self.key.requests :]
        ids = torch.cat([torch.where(first == ON_DEVICE, before, first), rest])
        page = table[owners.long(), at // PAGE_SIZE].long()
        keys = RowKeys(table, at + 1, owners)
        step = StepContext(self._decoder.pool, page * PAGE_SIZE + at % PAGE_SIZE, rows=keys)
        rotary = self._decoder.rotary
        long_tokens = None if rotary is None else at >= rotary.threshold
        adapters = AdapterBatch(columns["slots"], self.key.classes) if self.key.classes.width else None
        logits = self._decoder.logits(ids, at, step, columns["ends"].long(), adapters, long_tokens)
        drawn = SamplingRows(
            columns["temperature"],
            columns["top_k"],
            columns["top_p"],
            columns["noise"],
            columns["min_p"],
            truncate=self.key.truncated,
        )
        self._rows.logits[: self.key.requests].copy_(logits)
        self.next_tokens.copy_(choose_tokens(logits, drawn if self.key.sampled else None))
        tokens.index_copy_(0, rows, self.next_tokens)
