"""Parts of the Triton kernel that single tokens and tiles share: ranks in chunks, and the mixer between two of them.

A chunk never crosses the end of a segment (block of the block-diagonal) that is wider than a chunk: it lies in one, or
covers whole narrower ones, and reads no inputs but theirs.
"""

# ruff: noqa: D103
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_count(lo, hi, segment_rank, BLOCK_R: tl.constexpr):
    # Chunks of at most BLOCK_R ranks between lo and hi, which are ends of segments, or lie in one.
    if segment_rank >= BLOCK_R:
        unit = tl.minimum(segment_rank, hi - lo)
        count = (hi - lo) // unit * tl.cdiv(unit, BLOCK_R)
    else:
        count = tl.cdiv(hi - lo, BLOCK_R // segment_rank * segment_rank)
    return count


@triton.jit
def chunk_bounds(index, lo, hi, segment_rank, BLOCK_R: tl.constexpr):
    if segment_rank >= BLOCK_R:
        unit = tl.minimum(segment_rank, hi - lo)
        chunks = tl.cdiv(unit, BLOCK_R)
        start = lo + index // chunks * unit + index % chunks * BLOCK_R
        end = tl.minimum(start + BLOCK_R, lo + index // chunks * unit + unit)
    else:
        start = lo + index * (BLOCK_R // segment_rank * segment_rank)
        end = tl.minimum(start + BLOCK_R // segment_rank * segment_rank, hi)
    return start, end


@triton.jit
def mixer_tile(c, p, p_end, q, q_end, rank, mixer, VEC: tl.constexpr):
    # C[p, q] in float32; the identity where there is no mixer; zero outside the chunks.
    inside = (p < p_end)[:, None] & (q < q_end)[None, :]
    if mixer != 0:
        at = p[:, None] * (rank // VEC * VEC) + q[None, :]
        tile = tl.load(c + at, mask=inside, other=0).to(tl.float32)
    else:
        tile = ((p[:, None] == q[None, :]) & inside).to(tl.float32)
    return tile
