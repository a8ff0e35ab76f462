"""Rotary position embeddings, and the write of new keys and values to their pages, in one Triton launch.

The updates of the three layers before can be added in the same launch.

transformers rotates by ten kernels a layer, which in a decode step cost more than all adapters. The arithmetic is the
same here, with the same roundings: y = x cos + rotate_half(x) sin, where rotate_half(x) is (-x2, x1) for the halves x1
and x2 of the rotated part of a head.

Triton 3.6 or newer is required. Without a GPU, the kernel runs if TRITON_INTERPRET=1 was set before this module is
imported.
"""

# Triton's own language: its values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: a few heads.
_ELEMENTS = 1024


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    updates: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, and put the rotated keys and the values to their places in the pool.

    Args:
        q: (tokens, heads, width), float32, bfloat16 or float16; the last two axes contiguous.
        k: (tokens, kv_heads, width), likewise.
        v: (tokens, kv_heads, value width), likewise.
        cos: (tokens, rotated width), contiguous; the rotated width is even, and what is beyond it in a head stays.
        sin: Likewise.
        keys: (pages, page size, kv_heads, width), contiguous; written in place.
        values: (pages, page size, kv_heads, value width), likewise.
        places: int64 (tokens,), page * page size + place in the page, of each token; no place twice, but for tokens of
            no request, which leave either value.
        updates: What is added first to q, k and v, rounded to their dtype: to v in place. (tokens, heads * width) each,
            with the same distance between rows; or None.

    Returns:
        The rotated q and k, contiguous.

    Raises:
        ValueError: Shapes or layouts do not fit together.
    """
    tokens, heads, width = q.shape
    kv_heads, value_width, rotated = k.shape[1], v.shape[2], cos.shape[-1]
    if not (keys.is_contiguous() and values.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("pools, cos and sin must be contiguous")
    if any(x.stride(2) != 1 or x.stride(1) != x.shape[2] for x in (q, k, v)):
        raise ValueError("the last two axes of q, k and v must be contiguous")
    if keys.shape[2:] != k.shape[1:] or values.shape[2:] != v.shape[1:] or k.shape[2] != width:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the pools")
    if cos.shape != (tokens, rotated) or sin.shape != cos.shape or rotated % 2 or rotated > width:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}")
    new_q, new_k = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )
    if tokens == 0:
        return new_q, new_k
    sizes = (heads * width, kv_heads * width, kv_heads * value_width)
    block = min(_ELEMENTS, triton.next_power_of_2(max(sizes)))
    blocks = [triton.cdiv(size, block) for size in sizes]
    more = [q, k, v] if updates is None else list(updates)
    with torch.cuda.device_of(q):
        _rotate_kernel[(tokens, sum(blocks))](
            q, k, v, *more, cos, sin, keys, values, places, new_q, new_k,
            q.stride(0), k.stride(0), v.stride(0), more[0].stride(0),
            Q_SIZE=sizes[0],
            K_SIZE=sizes[1],
            V_SIZE=sizes[2],
            WIDTH=width,
            ROTATED=rotated,
            Q_BLOCKS=blocks[0],
            K_BLOCKS=blocks[1],
            BLOCK=block,
            HAS_UPDATES=updates is not None,
            num_warps=4,
            # Products are rounded before they are added, as torch's are.
            enable_fp_fusion=False,
        )  # fmt: skip
    return new_q, new_k


@triton.jit
def _updated(x, update, at, inside, HAS_UPDATES: tl.constexpr):
    """The elements `at` of one token, after their update. x and update point to the token."""
    value = tl.load(x + at, mask=inside, other=0)
    if HAS_UPDATES:
        more = tl.load(update + at, mask=inside, other=0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _rotated(
    x, update, cos, sin, at, inside, WIDTH: tl.constexpr, ROTATED: tl.constexpr, HAS_UPDATES: tl.constexpr
):  # fmt: skip
    """The elements `at` of one token's heads, rotated. x points to the token; update, cos and sin likewise."""
    d = at % WIDTH
    own = _updated(x, update, at, inside, HAS_UPDATES)
    turns = inside & (d < ROTATED)
    partner = tl.where(d < ROTATED // 2, at + ROTATED // 2, at - ROTATED // 2)
    other = _updated(x, update, partner, turns, HAS_UPDATES)
    other = tl.where(d < ROTATED // 2, -other.to(tl.float32), other.to(tl.float32))
    c = tl.load(cos + d, mask=turns, other=1).to(tl.float32)
    s = tl.load(sin + d, mask=turns, other=0).to(tl.float32)
    first = (own.to(tl.float32) * c).to(own.dtype).to(tl.float32)
    second = (other * s).to(own.dtype).to(tl.float32)
    return tl.where(turns, (first + second).to(own.dtype), own)


@triton.jit(do_not_specialize=["update_stride"])
def _rotate_kernel(
    q, k, v, q_update, k_update, v_update, cos, sin, keys, values, places, new_q, new_k,
    q_stride, k_stride, v_stride, update_stride,
    Q_SIZE: tl.constexpr, K_SIZE: tl.constexpr, V_SIZE: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATES: tl.constexpr,
):  # fmt: skip
    """A range of one token's queries, of its keys, or of its values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos, sin = cos + token * ROTATED, sin + token * ROTATED
    more = token * update_stride
    if part < Q_BLOCKS:
        at = part * BLOCK + tl.arange(0, BLOCK)
        new = _rotated(q + token * q_stride, q_update + more, cos, sin, at, at < Q_SIZE, WIDTH, ROTATED, HAS_UPDATES)
        tl.store(new_q + token * Q_SIZE + at, new, mask=at < Q_SIZE)
    elif part < Q_BLOCKS + K_BLOCKS:
        place = tl.load(places + token).to(tl.int64)
        at = (part - Q_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        new = _rotated(k + token * k_stride, k_update + more, cos, sin, at, at < K_SIZE, WIDTH, ROTATED, HAS_UPDATES)
        tl.store(new_k + token * K_SIZE + at, new, mask=at < K_SIZE)
        tl.store(keys + place * K_SIZE + at, new, mask=at < K_SIZE)
    else:
        place = tl.load(places + token).to(tl.int64)
        at = (part - Q_BLOCKS - K_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        inside = at < V_SIZE
        own = v + token * v_stride
        value = _updated(own, v_update + more, at, inside, HAS_UPDATES)
        tl.store(values + place * V_SIZE + at, value, mask=inside)
        if HAS_UPDATES:
            # Whoever reads v after this launch wants it updated.
            tl.store(own + at, value, mask=inside)
