"""Makes scores that are not finite visible in the output of attention of variable length, as a Triton kernel.

Attention hides a score of minus infinity: the key has weight 0, and the output is finite and wrong. A score is finite
if the sums of squares of its query and its key are finite in float32. The kernel writes NaN where they are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32


def spread_overflow(out: Tensor, q: Tensor, k: Tensor, query_ends: Tensor, key_ends: Tensor) -> None:
    """Write NaN into the outputs whose scores may not be finite.

    Semantics: out[t, h] becomes NaN if |q[t, h]|^2 is not finite, or if |k[s, g]|^2 is not finite for any key s of the
    sequence of token t, where g is the key-value head of head h. All else stays as it is. Which key a query sees is not
    looked at: a sequence with such a key has failed as a whole.

    Args:
        out: (queries, heads, value width), contiguous; written in place.
        q: (queries, heads, width), the last axis contiguous.
        k: (keys, kv_heads, width), likewise.
        query_ends: int32 (sequences + 1,), 0 and the end of each sequence's queries.
        key_ends: int32 (sequences + 1,), likewise of each sequence's keys.

    Raises:
        ValueError: Shapes or strides do not fit together.
    """
    queries, heads, width = q.shape
    keys, kv_heads = k.shape[:2]
    if out.shape[:2] != q.shape[:2] or k.shape[2] != width or heads % kv_heads or len(query_ends) != len(key_ends):
        raise ValueError(f"out {tuple(out.shape)}, q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    if not out.is_contiguous() or q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("out must be contiguous, and the last axis of q and k")
    query_programs = triton.cdiv(queries, _TOKENS) * heads
    programs = query_programs + triton.cdiv(keys, _TOKENS) * kv_heads
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        _spread_kernel[(programs,)](
            out, q, k, query_ends, key_ends, len(key_ends) - 1, queries, keys, query_programs,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            HEADS=heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            VALUE_WIDTH=out.shape[2],
            TOKENS=_TOKENS,
            BLOCK=triton.next_power_of_2(width),
            VALUE_BLOCK=triton.next_power_of_2(out.shape[2]),
            num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _overflows(x, token, tokens, x_token, head, x_head, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which of some tokens have a sum of squares that is not finite."""
    at = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (at < WIDTH)[None, :]
    row = tl.load(x + token.to(tl.int64)[:, None] * x_token + head * x_head + at[None, :], mask=mask, other=0)
    row = row.to(tl.float32)
    square = tl.sum(row * row, 1)
    return (square != square) | (square == float("inf"))


# The ends are parts of one copy to the device, at any place of it.
@triton.jit(
    do_not_specialize=["sequences", "queries", "keys", "query_programs"],
    do_not_specialize_on_alignment=["query_ends", "key_ends"],
)
def _spread_kernel(
    out, q, k, query_ends, key_ends, sequences, queries, keys, query_programs, q_token, q_head, k_token, k_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head: queries in the first programs, keys in the others. Several may write one NaN."""
    program = tl.program_id(0)
    value_at = tl.arange(0, VALUE_BLOCK)
    is_value = value_at < VALUE_WIDTH
    nan = tl.full((TOKENS, VALUE_BLOCK), float("nan"), tl.float32).to(out.dtype.element_ty)
    if program < query_programs:
        head = program % HEADS
        token = program // HEADS * TOKENS + tl.arange(0, TOKENS)
        bad = _overflows(q, token, queries, q_token, head, q_head, WIDTH, BLOCK)
        if tl.max(bad.to(tl.int32), 0) > 0:
            target = out + (token.to(tl.int64) * HEADS + head)[:, None] * VALUE_WIDTH + value_at[None, :]
            tl.store(target, nan, mask=bad[:, None] & is_value[None, :])
    else:
        head = (program - query_programs) % KV_HEADS
        token = (program - query_programs) // KV_HEADS * TOKENS + tl.arange(0, TOKENS)
        bad = _overflows(k, token, keys, k_token, head, k_head, WIDTH, BLOCK)
        if tl.max(bad.to(tl.int32), 0) > 0:
            for sequence in range(0, sequences):
                first, end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
                if tl.max((bad & (token >= first) & (token < end)).to(tl.int32), 0) > 0:
                    begin, last = tl.load(query_ends + sequence), tl.load(query_ends + sequence + 1)
                    for start in range(begin, last, TOKENS):
                        query = start + tl.arange(0, TOKENS)
                        mask = (query < last)[:, None] & is_value[None, :]
                        for in_group in range(0, HEADS // KV_HEADS):
                            row = query.to(tl.int64) * HEADS + head * (HEADS // KV_HEADS) + in_group
                            tl.store(out + row[:, None] * VALUE_WIDTH + value_at[None, :], nan, mask=mask)
