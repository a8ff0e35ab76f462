"""Attention on CUDA: a kernel over pages for decodes, one call of variable length for the chunks of a step.

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

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedIndices:
    """The parts of a step as tensors on its device: the decodes' pages, and where each chunk's queries and keys are.

    Attributes:
        decodes: The step's first tokens.
        query_ends: int32 (chunks + 1,), 0 and the end of each chunk's queries.
        key_ends: int32 (chunks + 1,), likewise of each chunk's keys.
        max_queries: Queries of the longest chunk.
        max_keys: The most keys of a chunk.
        places: int64 (keys,), the place of each key in the pool; None where all keys are this step's own.
    """

    decodes: RowKeys
    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    places: Tensor | None

    @classmethod
    def of(cls, parts: list[Part], places: Tensor) -> PackedIndices:
        """Copy to the device, at once, what the parts say.

        Args:
            parts: Of the step; decodes, if any, are the first part.
            places: int64 (tokens,) on the device, places of the step's own keys.
        """
        decodes, chunks = _split(parts)
        table = np.zeros((0, 1), np.int64) if decodes is None or decodes.table is None else decodes.table
        lengths = np.zeros(0, np.int64) if decodes is None else decodes.lengths
        new = np.concatenate([np.full(len(part.lengths), part.new) for part in chunks] or [lengths[:0]])
        total = np.concatenate([part.lengths for part in chunks] or [lengths[:0]])
        keys = _key_places(chunks, len(table)) if any(part.table is not None for part in chunks) else lengths[:0]
        ends = np.zeros((2, len(new) + 1), np.int32)
        np.cumsum(new, out=ends[0, 1:])
        np.cumsum(total, out=ends[1, 1:])
        # Each row of `ends` fills a whole number of int64.
        ends = np.pad(ends, ((0, 0), (0, ends.shape[1] % 2)))
        arrays = [lengths, table.reshape(-1), keys, ends.reshape(-1).view(np.int64)]
        on_device = torch.from_numpy(np.concatenate(arrays)).to(places.device, non_blocking=True)
        lengths_d, table_d, keys_d, ends_d = on_device.split([len(array) for array in arrays])
        query_ends, key_ends = ends_d.view(torch.int32).view(2, -1)[:, : len(new) + 1]
        if len(keys):
            # Keys below 0 are this step's own, counted from its first token.
            keys_d = torch.where(keys_d < 0, places[(-1 - keys_d).clamp(min=0)], keys_d)
        return cls(
            RowKeys(table_d.view(table.shape), lengths_d),
            query_ends,
            key_ends,
            int(new.max(initial=0)),
            int(total.max(initial=0)),
            keys_d if len(keys) else None,
        )


class VarlenAttention(Protocol):
    """Causal attention of packed sequences; where a sequence has more keys than queries, the last of both align."""

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """Whether this implementation computes attention of such tensors."""
        ...

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, indices: PackedIndices, options: AttentionOptions
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
            outputs.append(self._prefill(step, indices, layer, *chunks, options))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _prefill(
        self,
        step: StepContext,
        indices: PackedIndices,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        if not self._varlen.takes(query, value, options):
            return self._torch.attend_parts(step, layer, _split(step.parts)[1], query, key, value, options)
        if indices.places is not None:
            key, value = (x.index_select(0, indices.places) for x in step.pool.flat[layer])
        out = self._varlen(query, key, value, indices, options).contiguous()
        spread_overflow(out, query, key, indices.query_ends, indices.key_ends)
        return out


class TorchVarlen:
    """FlashAttention 2, as torch has it.

    `torch.nn.attention.varlen.varlen_attn` is its public face, whose arguments differ in each of torch 2.10 to 2.13.
    The operation below it has kept these arguments, takes fewer key-value heads than heads, and aligns the last key
    with the last query.
    """

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """See `VarlenAttention`."""
        width = query.shape[2]
        return (
            options.is_plain
            and query.dtype in _HALF
            and width == value.shape[2]
            and width % 8 == 0
            and width <= 256
            and query.is_cuda
            and torch.cuda.get_device_capability(query.device) >= (8, 0)
        )

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, indices: PackedIndices, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            indices.query_ends,
            indices.key_ends,
            indices.max_queries,
            indices.max_keys,
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
        width = query.shape[2]
        is_known = options.sinks is None and query.dtype in _HALF
        return is_known and width == value.shape[2] and width % 8 == 0 and width <= 256

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, indices: PackedIndices, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        out: Tensor = self._attend(
            query,
            key,
            value,
            indices.query_ends,
            indices.key_ends,
            indices.max_queries,
            indices.max_keys,
            softmax_scale=options.scale,
            causal=True,
            window_size=(-1 if options.window is None else options.window - 1, 0),
            softcap=options.softcap or 0.0,
        )
        return out


class FlashInferVarlen:
    """The library FlashInfer. It plans each step once for each kind of layer, on the host."""

    _WORKSPACE_BYTES = 128 << 20

    def __init__(self) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper  # type: ignore[import-not-found]

        self._make = BatchPrefillWithRaggedKVCacheWrapper
        self._workspace: Tensor | None = None
        self._planned: dict[Any, tuple[PackedIndices, Any]] = {}

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        """See `VarlenAttention`."""
        width = query.shape[2]
        return options.sinks is None and query.dtype in _HALF and width == value.shape[2] and width in (64, 128, 256)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, indices: PackedIndices, options: AttentionOptions
    ) -> Tensor:
        """See `VarlenAttention`."""
        shape = (query.shape[1], key.shape[1], query.shape[2], query.dtype)
        kind = (*shape, options.scale, options.window, options.softcap)
        if self._workspace is None:
            self._workspace = torch.empty(self._WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
        planned, wrapper = self._planned.get(kind) or (None, self._make(self._workspace, "NHD"))
        if planned is not indices:
            wrapper.plan(
                indices.query_ends,
                indices.key_ends,
                *shape[:3],
                causal=True,
                sm_scale=options.scale,
                window_left=-1 if options.window is None else options.window - 1,
                logits_soft_cap=options.softcap,
                q_data_type=query.dtype,
            )
            self._planned[kind] = (indices, wrapper)
        out: Tensor = wrapper.run(query, key, value)
        return out


def _split(parts: list[Part]) -> tuple[Part | None, list[Part]]:
    """The decodes that the kernel attends, and the other parts."""
    return (parts[0], parts[1:]) if parts and parts[0].compiled else (None, parts)


def _key_places(chunks: list[Part], token: int) -> NDArray[np.int64]:
    """int64 (keys,): places in the pool, or -1 - t for the step's token t, where a part has no table.

    Args:
        chunks: Parts, in the order of the tokens.
        token: The step's token that is the first of the first part.
    """
    places = []
    for part in chunks:
        if part.table is None:
            places.append(-1 - np.arange(token, token + len(part.lengths) * part.new))
        else:
            for pages, length in zip(part.table, part.lengths.tolist(), strict=True):
                at = np.arange(length)
                places.append(pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
        token += len(part.lengths) * part.new
    return np.concatenate(places)
