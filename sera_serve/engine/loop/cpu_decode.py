"""Decode attention on a CPU, compiled by numba: it reads each sequence's pages in place, without padding or a mask."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

# This module also lets numba compute in torch's OpenMP pool; a second pool would slow both.
from sera_kernels.numba_path import OPTIONS

# Multiply-adds below which one thread is done before a second one has started.
_PARALLEL_FROM = 200_000


@njit(**OPTIONS)
def _attend_row(q: Any, k: Any, v: Any, out: Any, pages: Any, length: int, window: int, scale: float) -> None:
    """One sequence: q and out (heads, width), k and v (pages, page size, kv_heads, width)."""
    heads, width = q.shape
    page_size, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    groups = heads // kv_heads
    first = max(0, length - window) if window > 0 else 0
    scores = np.empty(length, np.float32)
    for head in range(heads):
        kv_head = head // groups
        row, target = q[head], out[head]
        top = np.float32(-np.inf)
        # NaN once a score is not finite: -inf alone would pass for a key of no weight.
        overflow = np.float32(0)
        for t in range(first, length):
            key = k[pages[t // page_size], t % page_size, kv_head]
            total = np.float32(0)
            for d in range(width):
                total += row[d] * key[d]
            total *= scale
            scores[t] = total
            overflow += total * np.float32(0)
            top = max(top, total)
        norm = np.float32(0)
        for t in range(first, length):
            weight = math.exp(scores[t] - top)
            scores[t] = weight
            norm += weight
        for d in range(value_width):
            target[d] = overflow
        for t in range(first, length):
            weight = scores[t] / norm
            value = v[pages[t // page_size], t % page_size, kv_head]
            for d in range(value_width):
                target[d] += weight * value[d]


@njit(**OPTIONS)
def _attend_all(q: Any, k: Any, v: Any, out: Any, table: Any, lengths: Any, window: int, scale: float) -> None:
    for row in range(len(lengths)):
        _attend_row(q[row], k, v, out[row], table[row], lengths[row], window, scale)


@njit(parallel=True, **OPTIONS)
def _attend_all_parallel(q: Any, k: Any, v: Any, out: Any, table: Any, lengths: Any, window: int, scale: float) -> None:
    for row in prange(len(lengths)):
        _attend_row(q[row], k, v, out[row], table[row], lengths[row], window, scale)


def paged_decode(
    q: Tensor,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    table: NDArray[np.int64],
    lengths: NDArray[np.int64],
    window: int,
    scale: float,
) -> Tensor:
    """Attend one token of each sequence to its keys.

    Args:
        q: float32 (sequences, heads, key width), contiguous, on the CPU.
        k: (pages, page size, kv_heads, key width).
        v: (pages, page size, kv_heads, value width).
        table: int64 (sequences, pages), contiguous.
        lengths: int64 (sequences,), keys of each sequence.
        window: How many of the last keys a token sees; 0 is all.
        scale: Factor of the scores.

    Returns:
        float32 (sequences, heads, value width).
    """
    out = torch.empty(*q.shape[:2], v.shape[3])
    attend = _attend_all
    if int(lengths.sum()) * q.shape[1] * q.shape[2] > _PARALLEL_FROM and (threads := torch.get_num_threads()) > 1:
        # numba has a number of threads of its own: unasked, it would use cores that torch was told to leave alone.
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        attend = _attend_all_parallel
    attend(q.numpy(), k, v, out.numpy(), table, lengths, window, np.float32(scale))
    return out


def warm_up() -> None:
    """Compile now what the first request would otherwise wait for: seconds after an installation, then kept on disk."""
    k = np.zeros((2, 1, 1, 1), np.float32)
    for rows in (1, 1 << 18):
        table, lengths = np.zeros((rows, 1), np.int64), np.ones(rows, np.int64)
        paged_decode(torch.zeros(rows, 1, 1), k, k, table, lengths, 0, 1.0)
