"""Attention over packed sequences with paged keys and values.

Shapes: tokens of a step are packed, sequence after sequence; a pool tensor is (pages, PAGE_SIZE, kv_heads, width).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_serve.engine.loop.attention_backend import AttentionBackend, AttentionOptions, RowKeys
from sera_serve.engine.loop.pages import PAGE_SIZE

if TYPE_CHECKING:
    from sera_serve.engine.loop.cuda_attention import PackedIndices

try:
    from sera_serve.engine.loop import cpu_decode
except ImportError:  # numba is optional: it has no build for the newest Python for a while after each release
    cpu_decode = None  # type: ignore[assignment]

# Decodes are padded to one length while padding stays below a third of the keys, or this many keys.
_PADDING_OF_NO_ACCOUNT = 256


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one layer."""

    kv_heads: int
    key_width: int
    value_width: int


class KeyValuePool:
    """The keys and values of every layer, in pages; page 0 is `SCRATCH`."""

    def __init__(
        self,
        shapes: list[LayerShape],
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend,
    ) -> None:
        """Allocate `pages` pages and the scratch page; `backend` attends to them."""
        self.backend = backend
        # Tensors of one shape are parts of one, so that new pages are cleared in one call.
        wanted = [(s.kv_heads, width) for s in shapes for width in (s.key_width, s.value_width)]
        self._stores = {
            shape: torch.zeros(wanted.count(shape), pages + 1, PAGE_SIZE, *shape, dtype=dtype, device=device)
            for shape in dict.fromkeys(wanted)
        }
        used = dict.fromkeys(self._stores, 0)
        tensors = []
        for shape in wanted:
            tensors.append(self._stores[shape][used[shape]])
            used[shape] += 1
        self.keys, self.values = tensors[0::2], tensors[1::2]
        self.flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.keys, self.values, strict=True)]
        # Views for the compiled loop, which reads a pool in place; None where there is no such loop.
        self.arrays: list[tuple[NDArray[Any], NDArray[Any]]] | None = None
        if cpu_decode is not None and device.type == "cpu" and dtype == torch.float32:
            cpu_decode.warm_up()
            self.arrays = [(k.numpy(), v.numpy()) for k, v in zip(self.keys, self.values, strict=True)]

    @property
    def has_paged_decode(self) -> bool:
        """Whether decodes of any lengths are one part, which a kernel or a compiled loop attends in place."""
        return self.arrays is not None or self.backend.has_paged_decode

    @property
    def nbytes(self) -> int:
        """Memory of the pool."""
        return sum(store.numel() * store.element_size() for store in self._stores.values())

    def clear(self, pages: list[int]) -> None:
        """Forget what pages held: 0 times NaN is NaN, also where a weight of attention is 0."""
        index = torch.tensor(pages)
        for store in self._stores.values():
            store.index_fill_(1, index.to(store.device, non_blocking=True), 0)

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the step's keys and values of a layer, (tokens, kv_heads, width), at int64 (tokens,) `places`."""
        self.backend.write(self, layer, places, keys, values)


@dataclass
class Part:
    """Sequences of a step that are attended in one call: decodes, or chunks of one length.

    Attributes:
        new: Tokens of each sequence in this step.
        lengths: int64 (sequences,), keys of each sequence, this step's included.
        table: int64 (sequences, pages), pages of each sequence; None where all keys are this step's own.
        compiled: Whether a kernel or a compiled loop attends, which needs no padding and no mask.
    """

    new: int
    lengths: NDArray[np.int64]
    table: NDArray[np.int64] | None = None
    compiled: bool = False
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _pages: Tensor | None = None
    _lengths: Tensor | None = None

    @property
    def longest(self) -> int:
        """Keys of each sequence with padding."""
        return int(self.lengths.max())

    def pages(self, device: torch.device) -> Tensor:
        """`table` as an int64 index, made once for all layers."""
        if self._pages is None:
            assert self.table is not None
            self._pages = torch.from_numpy(self.table.reshape(-1)).to(device, non_blocking=True)
        return self._pages

    def is_causal(self, window: int | None) -> bool:
        """Whether each token sees all tokens up to itself, and these are all that are there: no mask is needed."""
        longest = self.longest
        no_padding = int(self.lengths.min()) == longest
        return no_padding and self.new in (1, longest) and (window is None or longest <= window)

    def seen(self, queries: range, window: int | None) -> range:
        """The keys that any of some new tokens of a sequence sees."""
        if self.new == 1:
            # Of several lengths.
            return range(self.longest)
        before = self.longest - self.new
        begin = 0 if window is None else max(0, before + queries.start - window + 1)
        return range(begin, before + queries.stop)

    def mask(self, queries: range, keys: range, window: int | None, like: Tensor) -> Tensor:
        """What to add to the scores, (sequences, 1, queries, keys), of the kind of `like`.

        That of all queries is made once for all layers.
        """
        if len(queries) < self.new:
            return self._mask(queries, keys, window, like)
        if window not in self._masks:
            self._masks[window] = self._mask(queries, keys, window, like)
        return self._masks[window]

    def _mask(self, queries: range, keys: range, window: int | None, like: Tensor) -> Tensor:
        device = like.device
        if self._lengths is None:
            # Once: in each layer, every block of queries has a mask of its own.
            self._lengths = torch.from_numpy(self.lengths).to(device, non_blocking=True)
        lengths = self._lengths[:, None, None, None]
        position = torch.arange(keys.start, keys.stop, device=device)
        own = lengths - self.new + torch.arange(queries.start, queries.stop, device=device)[:, None]
        return _causal_mask(own, position, window, like.dtype)


def _causal_mask(own: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of queries at the positions `own`: -inf for keys after it, or beyond the window."""
    hidden = keys > own
    if window is not None:
        hidden |= keys <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)


@dataclass
class StepContext:
    """What attention and the cache read of the step under way.

    Attributes:
        pool: Keys and values.
        places: int64 (tokens,), place of each token's keys and values in the pool.
        parts: In the order of the tokens; none in a static step.
        rows: In a static step: where the keys of each token are, this step's included.
        indices: The parts as tensors on the device, where the backend makes them: once for all layers.
    """

    pool: KeyValuePool
    places: Tensor
    parts: list[Part] = field(default_factory=list)
    rows: RowKeys | None = None
    indices: PackedIndices | None = None
    _static_masks: dict[int | None, Tensor] = field(default_factory=dict)

    def static_mask(self, window: int | None, width: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of a static step, (rows, 1, 1, width); its shape depends on shapes alone."""
        assert self.rows is not None
        if window not in self._static_masks:
            own = self.rows.lengths[:, None, None, None] - 1
            keys = torch.arange(width, device=own.device)
            self._static_masks[window] = _causal_mask(own, keys, window, dtype)
        return self._static_masks[window]


class _CurrentStep(threading.local):
    """The step that a thread runs: attention functions are found by name, and know no object of the loop."""

    context: StepContext | None = None


_current = _CurrentStep()


@contextmanager
def running(context: StepContext) -> Iterator[None]:
    """Within the block, `context` is this thread's step; blocks must not nest."""
    if _current.context is not None:
        raise RuntimeError("a step is already running on this thread")
    _current.context = context
    try:
        yield
    finally:
        _current.context = None


def step_under_way() -> StepContext:
    """This thread's step; raises RuntimeError outside one."""
    if _current.context is None:
        raise RuntimeError("the model runs outside a step")
    return _current.context


def decode_parts(lengths: NDArray[np.int64], table: NDArray[np.int64], compiled: bool) -> list[Part]:
    """Group decodes into parts.

    Args:
        lengths: int64 (sequences,), ascending; this step's token included.
        table: int64 (sequences, pages of the longest table); a row is padded with the sequence's own first page.
        compiled: Whether a kernel or a compiled loop attends: one part then, of any lengths.
    """
    if compiled and len(lengths):
        pages = -(-int(lengths[-1]) // PAGE_SIZE)
        return [Part(1, lengths, np.ascontiguousarray(table[:, :pages]), compiled=True)]
    parts: list[Part] = []
    start = total = 0
    for at in range(len(lengths) + 1):
        count = at - start
        if count and (
            at == len(lengths) or lengths[at] * (count + 1) > 1.5 * (total + lengths[at]) + _PADDING_OF_NO_ACCOUNT
        ):
            pages = -(-int(lengths[at - 1]) // PAGE_SIZE)
            parts.append(Part(1, lengths[start:at], np.ascontiguousarray(table[start:at, :pages])))
            start, total = at, 0
        if at < len(lengths):
            total += int(lengths[at])
    return parts


def attend(
    step: StepContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Attend within each sequence of the step, whose own keys and values are in the pool already.

    Arguments and result are those of `AttentionBackend.packed`, in a static step too.
    """
    if step.rows is not None:
        return step.pool.backend.decode(step, layer, query, step.rows, options)
    return step.pool.backend.packed(step, layer, query, key, value, options)
