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
            out = explicit_attention(grouped, k, v, mask, options)
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
    count, new, longest = len(part.lengths), part.new, part.longest
    heads, kv_heads = query.shape[1], own[0].shape[1]
    rows = query.unflatten(0, (count, new))
    # In a decode, the query heads of one key-value head become its rows: no key is copied for them.
    rows = rows.reshape(count, kv_heads, heads // kv_heads, -1) if new == 1 else rows.transpose(1, 2)
    if part.table is None:
        keys, values = (x.unflatten(0, (count, new)) for x in own)
    else:
        index = part.pages(query.device)
        pools = (step.pool.keys[layer], step.pool.values[layer])
        keys, values = (x.index_select(0, index).view(count, -1, *x.shape[2:])[:, :longest] for x in pools)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    window = options.window
    if not options.is_plain:
        out = explicit_attention(rows, keys, values, part.mask(window, query.dtype, query.device), options)
    else:
        causal = part.is_causal(window)
        out = scaled_dot_product_attention(
            rows,
            keys,
            values,
            attn_mask=None if causal else part.mask(window, query.dtype, query.device),
            is_causal=causal and new > 1,
            scale=options.scale,
            enable_gqa=rows.shape[1] != kv_heads,
        )
    # torch's attention gives finite numbers for some scores that are not finite: minus infinity, and on a CPU also NaN
    # where there are few keys. Where these sums of squares are finite, so is every score.
    for squared in (rows, keys):
        out += 0 * torch.linalg.vector_norm(squared, dim=(1, 2, 3), keepdim=True, dtype=torch.float32).to(out.dtype)
    return out.reshape(count, heads, -1) if new == 1 else out.transpose(1, 2).flatten(0, 1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """What `scaled_dot_product_attention` has no argument for, step by step, with the softmax in float32.

    q is (sequences, heads, new, width), or (sequences, kv_heads, heads of each, width) for decodes; k and v are
    (sequences, kv_heads, keys, width).
    """
    softcap, sinks = options.softcap, options.sinks
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * options.scale).float()
    if softcap is not None:
        # The last summand is NaN where the score is not finite, which its hyperbolic tangent would not show.
        scores = softcap * torch.tanh(scores / softcap) + 0 * scores
    scores = scores + mask
    if sinks is not None:
        # One logit for each query head. Decodes have the heads of one key-value head in q's third axis.
        logits = sinks.float().view(1, q.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], dim=3)
    return scores.softmax(3)[..., : k.shape[2]].to(q.dtype) @ v
