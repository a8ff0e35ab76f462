"""Attention by torch's own operations, and by the compiled loop for decodes on a CPU. Every architecture can use it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext
from sera_serve.engine.loop.attention_backend import AttentionOptions, RowKeys
from sera_serve.engine.loop.pages import PAGE_SIZE

try:
    from sera_serve.engine.loop import cpu_decode
except ImportError:  # numba is optional: it has no build for the newest Python for a while after each release
    cpu_decode = None  # type: ignore[assignment]

# Scores of a block of queries where all of them are held: half a gigabyte with what is made of them in float32.
_MOST_SCORES = 1 << 25


class TorchAttention:
    """`scaled_dot_product_attention` over keys that are gathered from their pages."""

    has_paged_decode = False
    reads_padding = True

    def write(self, pool: KeyValuePool, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `AttentionBackend`."""
        flat_keys, flat_values = pool.flat[layer]
        flat_keys.index_copy_(0, places, keys)
        flat_values.index_copy_(0, places, values)

    def decode(self, step: StepContext, layer: int, query: Tensor, keys: RowKeys, options: AttentionOptions) -> Tensor:
        """See `AttentionBackend`; `keys` are the step's."""
        table = keys.table if keys.owners is None else keys.table.index_select(0, keys.owners)
        rows, width = len(table), table.shape[1] * PAGE_SIZE
        # In place of what is no page of the row, its first one: what another holds might be NaN.
        is_own = torch.arange(0, width, PAGE_SIZE, device=table.device) < keys.lengths[:, None]
        index = torch.where(is_own, table, table[:, :1]).flatten()
        pools = (step.pool.keys[layer], step.pool.values[layer])
        k, v = (x.index_select(0, index).view(rows, width, *x.shape[2:]).transpose(1, 2) for x in pools)
        mask = step.static_mask(options.window, width, query.dtype)
        grouped = query.reshape(rows, k.shape[1], query.shape[1] // k.shape[1], -1)
        if options.is_plain:
            out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=options.scale)
        else:
            out = explicit_attention(grouped.unsqueeze(3), k, v, mask, options)
        return out.reshape(rows, query.shape[1], -1)

    def packed(
        self, step: StepContext, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `AttentionBackend`."""
        return self.attend_parts(step, layer, step.parts, query, key, value, options)

    def attend_parts(
        self,
        step: StepContext,
        layer: int,
        parts: list[Part],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """As `packed`, for some of the step's parts, whose tokens alone are in `query`, `key` and `value`."""
        outputs = []
        token = 0
        for part in parts:
            end = token + len(part.lengths) * part.new
            if part.compiled and options.is_plain and step.pool.arrays is not None and part.table is not None:
                keys, values = step.pool.arrays[layer]
                rows = query[token:end].contiguous()
                outputs.append(
                    cpu_decode.paged_decode(
                        rows, keys, values, part.table, part.lengths, options.window or 0, options.scale
                    )
                )
            else:
                own = (key[token:end], value[token:end])
                outputs.append(_attend_part(step, layer, part, query[token:end], own, options))
            token = end
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_part(
    step: StepContext,
    layer: int,
    part: Part,
    query: Tensor,
    own: tuple[Tensor, Tensor],
    options: AttentionOptions,
) -> Tensor:
    count, new = len(part.lengths), part.new
    heads, kv_heads = query.shape[1], own[0].shape[1]
    rows = query.unflatten(0, (count, new))
    # In a decode, the query heads of one key-value head become its rows: no key is copied for them.
    rows = rows.reshape(count, kv_heads, heads // kv_heads, -1) if new == 1 else rows.transpose(1, 2)
    if part.table is None:
        keys, values = (x.unflatten(0, (count, new)) for x in own)
    else:
        index = part.pages(query.device)
        pools = (step.pool.keys[layer], step.pool.values[layer])
        keys, values = (x.index_select(0, index).view(count, -1, *x.shape[2:])[:, : part.longest] for x in pools)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    window = options.window
    most = _most_queries(part, query, options)
    outputs = []
    for first in range(0, new, most):
        at = range(first, min(first + most, new))
        seen = part.seen(at, window)
        needs_mask = not options.is_plain or len(at) < new or not part.is_causal(window)
        mask = part.mask(at, seen, window, query) if needs_mask else None
        q, k, v = rows, keys, values
        if len(at) < new:
            q = q[:, :, at.start : at.stop]
        if len(seen) < keys.shape[2]:
            k, v = k[:, :, seen.start : seen.stop], v[:, :, seen.start : seen.stop]
        outputs.append(_attend(q, k, v, mask, options, is_decode=new == 1))
    out = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    # torch's attention gives finite numbers for some scores that are not finite: minus infinity, and on a CPU also NaN
    # where there are few keys. Where these sums of squares are finite, so is every score.
    for squared in (rows, keys):
        out += 0 * torch.linalg.vector_norm(squared, dim=(1, 2, 3), keepdim=True, dtype=torch.float32).to(out.dtype)
    return out.reshape(count, heads, -1) if new == 1 else out.transpose(1, 2).flatten(0, 1)


def _most_queries(part: Part, query: Tensor, options: AttentionOptions) -> int:
    """Tokens of each sequence of a part that are attended at the same time."""
    # On a CPU, torch's attention keeps the scores of a few queries at a time.
    if part.new == 1 or (options.is_plain and not query.is_cuda):
        return part.new
    return max(1, _MOST_SCORES // (len(part.lengths) * query.shape[1] * part.longest))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions, is_decode: bool) -> Tensor:
    """Attend (sequences, heads, new, width), or (sequences, kv_heads, heads of each, width) for decodes.

    A mask is (sequences, 1, new, keys); without one, each query sees the keys up to its own.
    """
    if not options.is_plain:
        assert mask is not None
        grouped = q.unsqueeze(3) if is_decode else q.unflatten(1, (k.shape[1], -1))
        return explicit_attention(grouped, k, v, mask, options).reshape(*q.shape[:3], -1)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and not is_decode,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """What `scaled_dot_product_attention` has no argument for, step by step, with the softmax in float32.

    Args:
        q: (sequences, kv_heads, heads of each, new, width).
        k: (sequences, kv_heads, keys, width).
        v: (sequences, kv_heads, keys, value width).
        mask: (sequences, 1, new, keys), added to the scores.
        options: How the layer attends.

    Returns:
        (sequences, kv_heads, heads of each, new, value width).
    """
    softcap, sinks = options.softcap, options.sinks
    # The queries of all heads of one key-value head are rows of one product: no key is copied for them.
    scores = (q.flatten(2, 3) @ k.transpose(2, 3) * options.scale).float().unflatten(2, q.shape[2:4])
    if softcap is not None:
        # The last summand is NaN where the score is not finite, which its hyperbolic tangent would not show.
        scores = softcap * torch.tanh(scores / softcap) + 0 * scores
    scores = scores + mask[:, :, None]
    if sinks is not None:
        logits = sinks.float().view(1, *q.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, logits], dim=4)
    weights = scores.softmax(4)[..., : k.shape[2]].to(q.dtype)
    out: Tensor = (weights.flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
    return out
