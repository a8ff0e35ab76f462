"""Attention of decodes over pages of keys and values, and the write of new keys and values, as Triton kernels.

A program attends one row (one token of one sequence) to a range of its keys, for the query heads of one key-value head:
keys and values are read once for all of these heads. Where there are few rows, the keys of a row are split over several
programs. Each leaves its largest score, its sum of weights and its weighted values in a float32 workspace, and a second
kernel combines these in the order of the keys. Nothing is atomic: equal inputs give equal bits.

The host decides from shapes alone, and reads no values: a CUDA graph that holds the launches can be replayed with other
contents of the buffers.

Scores that are not finite (NaN, or infinite of either sign) make the row's output NaN: the sum of weights takes up
0 * score for each key. Keys and values beyond a row's length are not loaded.

Triton 3.6 or newer is required. Without a GPU, the kernels run if TRITON_INTERPRET=1 was set before this module is
imported.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_KEYS = 1024
"""The most keys of a program: programs of very different lengths fill a GPU badly."""

LEAST_SPLIT_KEYS = 128
"""Keys of a split at least: fewer do not hide the time until the first of them arrive."""

MOST_SPLITS = 8192
"""Splits of all rows together, at most. They bound the workspace: 140 MB for 32 heads of 128. Many rows of a wide table
are short ones, whose other splits only start and end; a long one among them gets fewer."""

PROGRAMS_PER_MULTIPROCESSOR = 3
"""Rows are split until there are so many programs: as many fit into a multiprocessor's shared memory."""

# Bytes of a block of keys, and how many blocks are under way, so that three programs fit into 227 KiB of shared memory.
_TILE_BYTES = 16384
_STAGES = 3
_WARPS = 4
# Rows of a tile of scores: the least that a matrix unit takes.
_HEADS = 16
_COMBINE_CONSTANTS = ("HEADS", "VALUE_WIDTH", "SPLITS", "LEAST", "HAS_WINDOW", "BLOCK", "VALUE_BLOCK")


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    owners: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attend one token of each row to the row's keys.

    Semantics, for query head h and its key-value head g = h // (heads / kv_heads), over the keys t of the row that are
    before `lengths` and within the window: s_t = scale q_h . k_tg, squashed to softcap tanh(s_t / softcap) if there is
    a softcap; w = softmax(s and the head's sink); out_h = sum of w_t v_tg. A row of no keys gets zeros.

    Args:
        q: (rows, heads, key width), float32, bfloat16 or float16; the last axis contiguous.
        keys: (pages, page size, kv_heads, key width), the same dtype; the last axis contiguous.
        values: (pages, page size, kv_heads, value width), likewise.
        table: int64 or int32 (rows, pages), pages of each row in order; rows contiguous. What it has beyond a row's
            keys may be anything.
        lengths: int64 or int32 (rows,), keys of each row.
        scale: Factor of the scores.
        owners: int64 or int32 (rows,), the table's row of each row of q: tokens of one sequence share its pages. None
            where the rows are the table's.
        window: How many of the last keys a row sees; None is all.
        softcap: Scores are squashed into (-softcap, softcap); None leaves them.
        sinks: (heads,) logits that take part in the softmax, or None.
        out: (rows, heads, value width), contiguous, which is written; None allocates it.
        splits: Programs that share the keys of a row; None chooses from the shapes.

    Returns:
        (rows, heads, value width) in q's dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    rows, heads, key_width = q.shape
    page_size, kv_heads, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    _check(q, keys, values, table, lengths, owners)
    if out is None:
        out = torch.empty(rows, heads, value_width, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    if splits is None:
        programs = kv_heads * triton.cdiv(heads // kv_heads, _HEADS)
        splits = choose_splits(rows, table.shape[1] * page_size, programs, _multiprocessors(q.device))
    constants, options = decode_constants(
        q.dtype, heads, kv_heads, key_width, value_width, page_size, splits, window, softcap, sinks, owners
    )
    # Where splits is 1 nothing is read or written there.
    work = out if splits == 1 else torch.empty(rows * heads * splits * (value_width + 2), device=q.device)
    last_keys = 0 if window is None else window
    with torch.cuda.device_of(q):
        _decode_kernel[(constants["TILES"] * kv_heads, rows, splits)](
            q, keys, values, table, lengths, lengths if owners is None else owners, q if sinks is None else sinks, out,
            work, q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], table.stride(0), table.shape[1],
            lengths.stride(0), rows, scale, last_keys, 1.0 if softcap is None else softcap, **constants, **options,
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(heads, rows)](
                work, out, lengths, lengths.stride(0), rows, last_keys,
                **{name: constants[name] for name in _COMBINE_CONSTANTS},
                SPLIT_BLOCK=max(2, min(16, triton.next_power_of_2(splits))),
                num_warps=4,
                num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


def decode_constants(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
    page_size: int,
    splits: int,
    window: object,
    softcap: object,
    sinks: object,
    owners: object = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of the decode kernel, as keyword arguments; None is what is not there."""
    groups = heads // kv_heads
    key_block, value_block = (max(16, triton.next_power_of_2(width)) for width in (key_width, value_width))
    block = max(16, min(128, _TILE_BYTES // (max(key_block, value_block) * dtype.itemsize)))
    is_wide = dtype == torch.float32
    constants = {
        "HEADS": heads,
        "GROUPS": groups,
        "TILES": triton.cdiv(groups, _HEADS),
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "PAGE": page_size,
        "SPLITS": splits,
        "LEAST": max(1, LEAST_SPLIT_KEYS // block),
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_OWNERS": owners is not None,
        "BLOCK": block,
        "HEAD_BLOCK": _HEADS,
        "KEY_BLOCK": key_block,
        "VALUE_BLOCK": value_block,
        # The interpreter's tl.dot reads bfloat16 as integers.
        "WIDEN": dtype == torch.bfloat16 and not isinstance(_decode_kernel, triton.JITFunction),
        "PRECISION": "ieee" if is_wide else "tf32",
    }
    # Products in float32 proper need more registers. Triton 3.9 warns that the default of fusion will change.
    options = {"num_warps": 8 if is_wide else _WARPS, "num_stages": _STAGES, "enable_fp_fusion": True}
    return constants, options


def choose_splits(rows: int, keys: int, programs_per_row: int, multiprocessors: int) -> int:
    """Programs that share the keys of one row, from shapes alone.

    Args:
        rows: Rows of the step.
        keys: The most keys of a row, as the table is wide.
        programs_per_row: Programs of a row that is not split.
        multiprocessors: Of the device.
    """
    to_fill = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, rows * programs_per_row)
    wanted = max(1, min(max(to_fill, triton.cdiv(keys, SPLIT_KEYS)), triton.cdiv(keys, LEAST_SPLIT_KEYS)))
    # Few different numbers, because each is a compilation.
    splits = int(triton.next_power_of_2(wanted))
    while splits > 1 and splits * rows > MOST_SPLITS:
        splits //= 2
    return splits


def write_kv(keys: Tensor, values: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
    """Put new keys and values to their places, in one launch.

    Args:
        keys: (pages, page size, kv_heads, key width), contiguous; written in place.
        values: (pages, page size, kv_heads, value width), likewise.
        places: int64 (tokens,), page * page size + place in the page, of each token; no place twice, but for tokens of
            no request, which leave either value.
        k: (tokens, kv_heads, key width), the pool's dtype; the last axis contiguous.
        v: (tokens, kv_heads, value width), likewise.

    Raises:
        ValueError: Shapes, dtypes or strides do not fit together.
    """
    tokens, kv_heads, key_width = k.shape
    value_width = v.shape[2]
    if not (keys.is_contiguous() and values.is_contiguous() and k.stride(2) == 1 and v.stride(2) == 1):
        raise ValueError("pools must be contiguous, and the last axis of k and v")
    if keys.shape[2:] != k.shape[1:] or values.shape[2:] != v.shape[1:] or keys.dtype != k.dtype:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the pools, or their dtypes differ")
    if tokens == 0:
        return
    widest = kv_heads * max(key_width, value_width)
    block = min(1024, triton.next_power_of_2(widest))
    with torch.cuda.device_of(k):
        _write_kernel[(tokens, triton.cdiv(widest, block))](
            keys, values, places, k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            KV_HEADS=kv_heads,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def _check(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, owners: Tensor | None) -> None:
    if keys.shape[3] != q.shape[2] or q.shape[1] % keys.shape[2] or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit together"
        )
    if len(lengths) != len(q) or len(q) != len(table if owners is None else owners):
        of_table = f"{len(table)} of the table" if owners is None else f"{len(owners)} owners"
        raise ValueError(f"{len(q)} rows of q, {of_table}, {len(lengths)} lengths")
    if owners is not None and not owners.is_contiguous():
        raise ValueError("owners must be contiguous")
    if keys.dtype != q.dtype or values.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}")
    if any(x.stride(-1) != 1 for x in (q, keys, values, table)):
        raise ValueError("the last axis of q, keys, values and table must be contiguous")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _range(
    length, window, split, SPLITS: tl.constexpr, LEAST: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """First key that is seen; first block of the split and the block after its last; splits that have blocks."""
    first = tl.maximum(length - window, 0) if HAS_WINDOW else length * 0
    start = first // BLOCK
    end = tl.cdiv(length, BLOCK)
    share = tl.maximum(tl.cdiv(end - start, SPLITS), LEAST)
    used = tl.cdiv(end - start, share)
    return first, start + split * share, tl.minimum(start + (split + 1) * share, end), used


# A packed step's table has any place and width; pages are looked up one by one, whatever their alignment.
@triton.jit(
    do_not_specialize=["rows", "table_row", "table_width", "window", "lengths_stride"],
    do_not_specialize_on_alignment=["table", "lengths", "owners"],
)
def _decode_kernel(
    q, keys, values, table, lengths, owners, sinks, out, work,
    q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head, table_row, table_width, lengths_stride, rows,
    scale, window, softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_OWNERS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row, one tile of the query heads of one key-value head, one split of the keys."""
    tile, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_head = tile // TILES
    in_group = (tile % TILES) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    is_head = in_group < GROUPS
    head = kv_head * GROUPS + in_group
    LOG2E: tl.constexpr = 1.4426950408889634

    length = tl.load(lengths + row * lengths_stride).to(tl.int32)
    owner = tl.load(owners + row).to(tl.int64) if HAS_OWNERS else row
    first, start, end, used = _range(length, window, split, SPLITS, LEAST, HAS_WINDOW, BLOCK)
    if (split > 0) & (start >= end):
        return

    key_at, value_at = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_key, is_value = key_at < KEY_WIDTH, value_at < VALUE_WIDTH
    at = tl.arange(0, BLOCK)
    query = tl.load(
        q + row * q_row + head[:, None] * q_head + key_at[None, :], mask=is_head[:, None] & is_key[None, :], other=0
    )
    top = tl.full((HEAD_BLOCK,), float("-inf"), tl.float32)
    norm = tl.zeros((HEAD_BLOCK,), tl.float32)
    if HAS_SINKS:  # noqa: SIM102 - the outer condition is the compiler's
        # A sink is one more key, whose value is zero; the first split has it.
        if split == 0:
            top = tl.load(sinks + head, mask=is_head, other=0).to(tl.float32) * LOG2E
            norm = norm + 1
    total = tl.zeros((HEAD_BLOCK, VALUE_BLOCK), tl.float32)

    pages = table + owner * table_row
    key_base = keys + kv_head * k_head + key_at[None, :]
    value_base = values + kv_head * v_head + value_at[None, :]
    # The pages of a block are loaded one round ahead: the addresses of keys and values wait for them.
    page = tl.load(pages + (start * BLOCK + at) // PAGE, mask=(start * BLOCK + at) // PAGE < table_width, other=0)
    for block in range(start, end):
        key = block * BLOCK + at
        seen = (key < length) & (key >= first)
        place = page.to(tl.int64)
        k = tl.load(
            key_base + (place * k_page + (key % PAGE) * k_token)[:, None],
            mask=seen[:, None] & is_key[None, :], other=0,
        )  # fmt: skip
        v = tl.load(
            value_base + (place * v_page + (key % PAGE) * v_token)[:, None],
            mask=seen[:, None] & is_value[None, :], other=0,
        )  # fmt: skip
        following = (key + BLOCK) // PAGE
        page = tl.load(pages + following, mask=following < table_width, other=0)
        if WIDEN:
            score = tl.dot(query.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        score = score * scale
        # 0 for finite scores, else NaN: neither a softcap nor a weight of 0 may hide it.
        overflow = score * 0
        if HAS_SOFTCAP:
            score = softcap - 2 * softcap / (tl.exp(score * (2 / softcap)) + 1)
        score = tl.where(seen[None, :], score * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(top - higher)
        norm = norm * keep + tl.sum(weight + overflow, 1)
        total = total * keep[:, None]
        if WIDEN:
            total += tl.dot(weight.to(v.dtype).to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(weight.to(v.dtype), v, total, input_precision=PRECISION)
        top = higher

    target = (row * HEADS + head).to(tl.int64)
    mask = is_head[:, None] & is_value[None, :]
    if used <= 1:
        # No keys and no sink: the sum is 0 of nothing. A sum of 0 for another reason is NaN.
        result = total / tl.where(length > 0, norm, 1.0)[:, None]
        tl.store(out + target[:, None] * VALUE_WIDTH + value_at[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        slot = target * SPLITS + split
        tl.store(work + slot[:, None] * VALUE_WIDTH + value_at[None, :], total, mask=mask)
        sums = work + rows.to(tl.int64) * (HEADS * SPLITS * VALUE_WIDTH) + slot * 2
        tl.store(sums, top, mask=is_head)
        tl.store(sums + 1, norm, mask=is_head)


@triton.jit(do_not_specialize=["rows", "window", "lengths_stride"], do_not_specialize_on_alignment=["lengths"])
def _combine_kernel(
    work, out, lengths, lengths_stride, rows, window,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row: the splits' weighted values, each scaled to the largest score of all."""
    row = tl.program_id(1).to(tl.int64)
    target = row * HEADS + tl.program_id(0)
    length = tl.load(lengths + row * lengths_stride).to(tl.int32)
    _, _, _, used = _range(length, window, 0, SPLITS, LEAST, HAS_WINDOW, BLOCK)
    if used <= 1:
        return
    value_at = tl.arange(0, VALUE_BLOCK)
    is_value = value_at < VALUE_WIDTH
    sums = work + rows.to(tl.int64) * (HEADS * SPLITS * VALUE_WIDTH) + target * (SPLITS * 2)
    top = tl.full((), float("-inf"), tl.float32)
    norm = tl.zeros((), tl.float32)
    total = tl.zeros((VALUE_BLOCK,), tl.float32)
    for i in range(0, used, SPLIT_BLOCK):
        split = i + tl.arange(0, SPLIT_BLOCK)
        there = split < used
        tops = tl.load(sums + split * 2, mask=there, other=float("-inf"))
        norms = tl.load(sums + split * 2 + 1, mask=there, other=0)
        part = tl.load(
            work + (target * SPLITS + split)[:, None] * VALUE_WIDTH + value_at[None, :],
            mask=there[:, None] & is_value[None, :], other=0,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp2(tops - higher)
        keep = tl.exp2(top - higher)
        norm = norm * keep + tl.sum(weight * norms, 0)
        total = total * keep + tl.sum(weight[:, None] * part, 0)
        top = higher
    tl.store(out + target * VALUE_WIDTH + value_at, (total / norm).to(out.dtype.element_ty), mask=is_value)


@triton.jit
def _write_kernel(
    keys, values, places, k, v, k_token, k_head, v_token, v_head,
    KV_HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A range of one token's keys, and the same range of its values."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + token).to(tl.int64)
    is_key, is_value = at < KV_HEADS * KEY_WIDTH, at < KV_HEADS * VALUE_WIDTH
    key = tl.load(k + token * k_token + (at // KEY_WIDTH).to(tl.int64) * k_head + at % KEY_WIDTH, mask=is_key)
    value = tl.load(v + token * v_token + (at // VALUE_WIDTH).to(tl.int64) * v_head + at % VALUE_WIDTH, mask=is_value)
    tl.store(keys + place * (KV_HEADS * KEY_WIDTH) + at, key, mask=is_key)
    tl.store(values + place * (KV_HEADS * VALUE_WIDTH) + at, value, mask=is_value)
