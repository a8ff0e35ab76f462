"""Attention on CUDA: a kernel over pages for decodes, a call of variable length for the chunks of a step.

The kernel for decodes is ours whatever library attends prompts: flash-attn takes pages of 256 tokens and its multiples
alone, and FlashInfer plans each step on the host, which a CUDA graph cannot hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels.attention_overflow import spread_overflow
from sera_kernels.paged_attention import paged_decode, write_kv
from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext
from sera_serve.engine.loop.attention_backend import AttentionOptions, RowKeys
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.torch_attention import TorchAttention
from sera_serve.engine.memory import MOST_GATHERED

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks of a step that are attended in one call, as tensors on its device.

    Attributes:
        place: Of the group among those of its step, from 0.
        tokens: Which of the tokens of all chunks are this group's.
        query_ends: int32 (chunks + 1,), 0 and the end of each chunk's queries.
        key_ends: int32 (chunks + 1,), likewise of each chunk's keys.
        ends_on_host: Both, on the host.
        max_queries: Queries of the longest chunk.
        max_keys: The most keys of a chunk.
        places: int64 (keys,), the place of each key in the pool; None where all keys are this step's own.
    """

    place: int
    tokens: slice
    query_ends: Tensor
    key_ends: Tensor
    ends_on_host: tuple[Tensor, Tensor]
    max_queries: int
    max_keys: int
    places: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """One sequence of a step: its first token in the step, its new tokens and all its keys, and its pages if any."""

    first: int
    new: int
    total: int
    pages: NDArray[np.int64] | None

    def keys(self) -> NDArray[np.int64]:
        """int64 (keys,): places in the pool, or -1 - t for the step's token t."""
        if self.pages is None:
            return -1 - np.arange(self.first, self.first + self.new)
        at = np.arange(self.total)
        return self.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE


@dataclass(frozen=True)
class PackedIndices:
    """The parts of a step as tensors on its device: the decodes' pages, and where each chunk's queries and keys are.

    Attributes:
        decodes: The step's first tokens.
        groups: Of the chunks, in the order of their tokens.
    """

    decodes: RowKeys
    groups: list[ChunkGroup]

    @classmethod
    def of(cls, parts: list[Part], places: Tensor) -> PackedIndices:
        """Copy to the device, at once, what the parts say.

        Args:
            parts: Of the step; decodes, if any, are the first part.
            places: int64 (tokens,) on the device, places of the step's own keys.
        """
        decodes, others = _split(parts)
        table = np.zeros((0, 1), np.int64) if decodes is None or decodes.table is None else decodes.table
        lengths = np.zeros(0, np.int64) if decodes is None else decodes.lengths
        grouped = _grouped(others, len(table))
        arrays = [lengths, table.reshape(-1)]
        all_ends = [_ends(chunks) for chunks in grouped]
        for chunks, ends_h in zip(grouped, all_ends, strict=True):
            is_gathered = any(chunk.pages is not None for chunk in chunks)
            keys = [chunk.keys() for chunk in chunks] if is_gathered else [lengths[:0]]
            arrays += [ends_h, np.concatenate(keys)]
        brought = torch.from_numpy(np.concatenate(arrays)).to(places.device, non_blocking=True)
        lengths_d, table_d, *pieces = brought.split([len(array) for array in arrays])
        groups: list[ChunkGroup] = []
        begin = 0
        for chunks, ends_h, ends_d, places_d in zip(grouped, all_ends, pieces[0::2], pieces[1::2], strict=True):
            on_host, on_device = (_parted(ends, len(chunks) + 1) for ends in (torch.from_numpy(ends_h), ends_d))
            gathered = None
            if len(places_d):
                # Keys below 0 are this step's own, counted from its first token.
                gathered = torch.where(places_d < 0, places[(-1 - places_d).clamp(min=0)], places_d)
            end = begin + sum(chunk.new for chunk in chunks)
            most = max(chunk.new for chunk in chunks), max(chunk.total for chunk in chunks)
            groups.append(ChunkGroup(len(groups), slice(begin, end), *on_device, on_host, *most, gathered))
            begin = end
        return cls(RowKeys(table_d.view(table.shape), lengths_d), groups)


class VarlenAttention(Protocol):
    """Causal attention of packed sequences; where a sequence has more keys than queries, the last of both align."""

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """Whether this implementation computes attention of such tensors."""
        ...

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, group: ChunkGroup, options: AttentionOptions
    ) -> Tensor:
        """Attend (queries, heads, width) to (keys, kv_heads, width)."""
        ...


class PagedAttention:
    """Triton's kernel for decodes, a `VarlenAttention` for chunks, and torch's for what the latter does not take."""

    has_paged_decode = True
    reads_padding = False

    def __init__(self, varlen: VarlenAttention) -> None:
        self._varlen = varlen
        self._torch = TorchAttention()

    def write(self, pool: KeyValuePool, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `AttentionBackend`."""
        write_kv(pool.keys[layer], pool.values[layer], places, keys, values)

    def decode(self, step: StepContext, layer: int, query: Tensor, keys: RowKeys, options: AttentionOptions) -> Tensor:
        """See `AttentionBackend`."""
        return paged_decode(
            query,
            step.pool.keys[layer],
            step.pool.values[layer],
            keys.table,
            keys.lengths,
            scale=options.scale,
            owners=keys.owners,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )

    def packed(
        self, step: StepContext, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `AttentionBackend`."""
        if step.indices is None:
            step.indices = PackedIndices.of(step.parts, step.places)
        indices = step.indices
        count = len(indices.decodes.lengths)
        outputs = []
        if count:
            outputs.append(self.decode(step, layer, query[:count], indices.decodes, options))
        if count < len(query):
            chunks = (query[count:], key[count:], value[count:])
            outputs.append(self._prefill(step, indices.groups, layer, *chunks, options))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _prefill(
        self,
        step: StepContext,
        groups: list[ChunkGroup],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        if not self._varlen.takes(query, value, options):
            return self._torch.attend_parts(step, layer, _split(step.parts)[1], query, key, value, options)
        outputs = []
        for group in groups:
            q, k, v = query[group.tokens], key[group.tokens], value[group.tokens]
            if group.places is not None:
                k, v = (x.index_select(0, group.places) for x in step.pool.flat[layer])
            out = self._varlen(q, k, v, group, options).contiguous()
            spread_overflow(out, q, k, group.query_ends, group.key_ends)
            outputs.append(out)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _fits_flash_attention(query: Tensor, value: Tensor) -> bool:
    width = query.shape[2]
    return query.dtype in _HALF and width == value.shape[2] and width % 8 == 0 and width <= 256


class TorchVarlen:
    """FlashAttention 2, as torch has it.

    `torch.nn.attention.varlen.varlen_attn` is its public face, whose arguments differ in each of torch 2.10 to 2.13.
    The operation below it has kept these arguments, takes fewer key-value heads than heads, and aligns the last key
    with the last query.
    """

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """See `VarlenAttention`."""
        is_plain = options.is_plain and _fits_flash_attention(query, value)
        return is_plain and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, group: ChunkGroup, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            group.query_ends,
            group.key_ends,
            group.max_queries,
            group.max_keys,
            0.0,
            True,
            False,
            scale=options.scale,
            window_size_left=-1 if options.window is None else options.window - 1,
            window_size_right=0,
        )[0]
        return out


class FlashAttnVarlen:
    """The library flash-attn, which also knows a softcap."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        self._attend = flash_attn_varlen_func

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """See `VarlenAttention`."""
        return options.sinks is None and _fits_flash_attention(query, value)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, group: ChunkGroup, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        out: Tensor = self._attend(
            query,
            key,
            value,
            group.query_ends,
            group.key_ends,
            group.max_queries,
            group.max_keys,
            softmax_scale=options.scale,
            causal=True,
            window_size=(-1 if options.window is None else options.window - 1, 0),
            softcap=options.softcap or 0.0,
        )
        return out


class FlashInferVarlen:
    """The library FlashInfer. It plans each group of chunks for each kind of layer, on the host.

    A plan reads the ends of queries and keys. It gets those of the host: it would wait for the device to read them
    there. A wrapper keeps one plan, so a step's groups have wrappers of their own.
    """

    _WORKSPACE_BYTES = 128 << 20
    # Of a kind of layer, each with 8 MiB of the device. Groups beyond them are planned for each layer.
    _MOST_WRAPPERS = 4

    def __init__(self) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper  # type: ignore[import-not-found]

        self._make = BatchPrefillWithRaggedKVCacheWrapper
        self._workspace: Tensor | None = None
        self._planned: dict[Any, tuple[ChunkGroup, Any]] = {}

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """See `VarlenAttention`."""
        width = query.shape[2]
        return options.sinks is None and query.dtype in _HALF and width == value.shape[2] and width in (64, 128, 256)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, group: ChunkGroup, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        shape = (query.shape[1], key.shape[1], query.shape[2], query.dtype)
        kind = (*shape, options.scale, options.window, options.softcap, group.place % self._MOST_WRAPPERS)
        if self._workspace is None:
            self._workspace = torch.empty(self._WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
        planned, wrapper = self._planned.get(kind) or (None, self._make(self._workspace, "NHD"))
        if planned is not group:
            if planned is not None and planned.place != group.place:
                # Both may be groups of one step. A wrapper writes its plan to page-locked memory, from where the device
                # may not have taken the one before. The plans of the steps before were taken when those ended.
                _wait_for(query.device)
            wrapper.plan(
                *group.ends_on_host,
                *shape[:3],
                causal=True,
                sm_scale=options.scale,
                window_left=-1 if options.window is None else options.window - 1,
                logits_soft_cap=options.softcap,
                q_data_type=query.dtype,
            )
            self._planned[kind] = (group, wrapper)
        out: Tensor = wrapper.run(query, key, value)
        return out


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given on this stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _split(parts: list[Part]) -> tuple[Part | None, list[Part]]:
    """The decodes that the kernel attends, and the other parts."""
    return (parts[0], parts[1:]) if parts and parts[0].compiled else (None, parts)


def _grouped(parts: list[Part], first: int) -> list[list[_Chunk]]:
    """Divide the chunks of a step among calls; `first` is the step's token that is the first of the first part."""
    groups: list[list[_Chunk]] = []
    keys = 0
    for part in parts:
        tables = [None] * len(part.lengths) if part.table is None else list(part.table)
        for pages, total in zip(tables, part.lengths.tolist(), strict=True):
            if not groups or keys + total > MOST_GATHERED:
                groups.append([])
                keys = 0
            groups[-1].append(_Chunk(first, part.new, total, pages))
            keys += total
            first += part.new
    return groups


def _ends(chunks: list[_Chunk]) -> NDArray[np.int64]:
    """Two rows of int32 in pairs, each padded to a whole number of int64: 0 and the ends of queries, then of keys."""
    ends = np.zeros((2, len(chunks) + 1 + (len(chunks) + 1) % 2), np.int32)
    np.cumsum([chunk.new for chunk in chunks], out=ends[0, 1 : len(chunks) + 1])
    np.cumsum([chunk.total for chunk in chunks], out=ends[1, 1 : len(chunks) + 1])
    return ends.reshape(-1).view(np.int64)


def _parted(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The two rows of `_ends`, int32 (count,) each."""
    queries, keys = ends.view(torch.int32).view(2, -1)[:, :count]
    return queries, keys
