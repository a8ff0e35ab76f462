"""The update of a trained layer, h += scaling * ((x A) C) B, with a backward pass of its own.

Autograd over single products keeps the reduced vectors twice, and writes the update and its scaled copy beside the
output. Here the update is added to the output in place, and x and x A are all that is kept. Which form of the products
of segments is the fastest depends on the processor; docs/decisions.md has the figures. The outputs of segments of rank
1 are products of elements: a matrix product of inner width 1 is slower.

Legend: T tokens, s segments, w elements of a segment, m segment rank, r = s m. A block-diagonal factor is (s, w, m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sums over fewer elements than these are slower than batched matrix products (CPU).
_NARROW = 8
# Fewer columns of a factor take twice the time of as many rows that lie in a piece (CPU, 8 of 384 wide).
_MANY_COLUMNS = 12
# Products of more elements than these are summed in pieces, of so many elements a thread: a piece of 256 KiB stays in
# the cache, where all of them take new memory (CPU).
_WHOLE, _PIECE = 1 << 19, 1 << 16


@dataclass(frozen=True)
class Part:
    """The tokens of one adapter in a pass, and what its factors do not say.

    Attributes:
        begin: Its first token.
        end: The token after its last one.
        split: Number of diagonal blocks of A and of B.
        scaling: Factor of the update.
    """

    begin: int
    end: int
    split: int
    scaling: float


def add_update(h: Tensor, x: Tensor, a: Tensor, c: Tensor | None, b: Tensor, split: int, scaling: float) -> Tensor:
    """Return h + scaling * ((x A) C) B for all tokens; arguments as in `add_updates`, and as in `Part`."""
    return add_updates(h, x, [Part(0, h.numel() // h.shape[-1], split, scaling)], [a, c, b])


def add_updates(h: Tensor, x: Tensor, parts: Sequence[Part], factors: Sequence[Tensor | None]) -> Tensor:
    """Return h + scaling * ((x A) C) B, for the tokens of each part with the factors of its adapter.

    `h` is overwritten. Tokens that are in no part stay as they are.

    Args:
        h: (..., d_out), of any floating dtype. No other operation may need its old value.
        x: (..., d_in).
        parts: The adapters' tokens, which do not overlap.
        factors: A, C and B of each part, one after the other: (d_in, segment_rank), float; (rank, rank), or None for
            the identity; (segment_rank, d_out).
    """
    # Whether torch annotates `apply` differs between its releases.
    result: Tensor = cast(Any, _AddUpdates).apply(h, x, parts, *factors)
    return result


class _AddUpdates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, parts: Sequence[Part], *factors: Tensor | None) -> Tensor:
        rows_h, rows_x = h.view(-1, h.shape[-1]), x.reshape(-1, x.shape[-1])
        # The factors come after h, x and the parts.
        needs = ctx.needs_input_grad[3:]
        reduced: list[Tensor | None] = []
        for part, (a, c, b), (_, needs_c, needs_b) in zip(parts, _triples(factors), _triples(needs), strict=True):
            u = reduce_segments(rows_x[part.begin : part.end].to(a.dtype), blocks_of_a(a, part.split))
            v = u if c is None else u @ c
            expand_onto(rows_h[part.begin : part.end], v, blocks_of_b(b, part.split), part.scaling)
            reduced.append(u if needs_c or needs_b else None)
        ctx.save_for_backward(x if any(needs[::3]) else None, *reduced, *factors)
        ctx.parts, ctx.x_shape, ctx.x_dtype = parts, x.shape, x.dtype
        ctx.mark_dirty(h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        parts = ctx.parts
        x, *saved = ctx.saved_tensors
        reduced, triples = saved[: len(parts)], _triples(saved[len(parts) :])
        needs_x, _, *needs = ctx.needs_input_grad[1:]
        rows_g = g.reshape(-1, g.shape[-1])
        dx = None
        if needs_x:
            # A view would be added to the base's gradient in new memory, and not in place.
            is_whole = sum(part.end - part.begin for part in parts) == len(rows_g)
            # Tokens without an adapter get no gradient from here.
            make = torch.empty if is_whole else torch.zeros
            dx = make(ctx.x_shape, dtype=triples[0][2].dtype, device=g.device)
        gradients: list[Tensor | None] = []
        for part, u, (a, c, b), (needs_a, needs_c, needs_b) in zip(
            parts, reduced, triples, _triples(needs), strict=True
        ):
            own = rows_g[part.begin : part.end].to(b.dtype)
            da = dc = db = None
            if needs_b:
                v = u if c is None else u @ c
                db = _in_rows(outer_segments(own, v, part.split).permute(2, 0, 1), b).mul_(part.scaling)
            if needs_x or needs_a or needs_c:
                dv = reduce_segments(own, blocks_of_b(b, part.split)).mul_(part.scaling)
                if needs_c:
                    dc = u.T @ dv
                du = dv if c is None else dv @ c.T
                if needs_a:
                    rows = x.reshape(-1, x.shape[-1])[part.begin : part.end].to(a.dtype)
                    da = _in_rows(outer_segments(rows, du, part.split), a)
                if dx is not None:
                    rows = dx.view(-1, dx.shape[-1])[part.begin : part.end]
                    expand_into(rows, du, blocks_of_a(a, part.split))
            gradients += [da, dc, db]
        return g, dx if dx is None else dx.to(ctx.x_dtype), None, *gradients


def _triples(of_factors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """What belongs to A, C and B of each part."""
    return list(zip(of_factors[::3], of_factors[1::3], of_factors[2::3], strict=True))


def _in_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient in the shape and strides of its factor: several processes warn of others, of one column too."""
    return gradient.flatten().view(factor.shape)


def blocks_of_a(a: Tensor, split: int) -> Tensor:
    """View A, (d_in, segment_rank), as its blocks (s, w, m)."""
    return a.view(split, -1, a.shape[1])


def blocks_of_b(b: Tensor, split: int) -> Tensor:
    """View B, (segment_rank, d_out), as its blocks (s, w, m)."""
    return b.view(b.shape[0], split, -1).permute(1, 2, 0)


def reduce_segments(x: Tensor, blocks: Tensor) -> Tensor:
    """(T, s w) by (s, w, m) to (T, s m)."""
    split, width, segment_rank = blocks.shape
    if split > 1 and x.device.type == "cpu" and _is_intel():
        return torch.bmm(x.view(-1, split, width).transpose(0, 1), blocks).transpose(0, 1).reshape(len(x), -1)
    if split > 1 and segment_rank == 1 and (width > _NARROW or x.device.type != "cpu"):
        return _sums_of_products(x.view(-1, split, width), blocks[..., 0])
    if split == 1 and segment_rank >= _MANY_COLUMNS:
        return x @ blocks[0]
    # Rows of the factor that lie in a piece.
    rows = blocks.transpose(1, 2).contiguous()
    if split == 1:
        return x @ rows[0].T
    reduced = torch.bmm(rows, x.view(-1, split, width).permute(1, 2, 0))
    # The products that follow read (T, r) in one piece.
    return reduced.view(split * segment_rank, len(x)).T.contiguous()


@cache
def _is_intel() -> bool:
    """Whether batched products with few columns are fast: torch's CPU library has them for Intel's processors."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _sums_of_products(segments: Tensor, factor: Tensor) -> Tensor:
    """(T, s, w) by (s, w) to (T, s)."""
    count, split, width = segments.shape
    if segments.device.type != "cpu" or segments.numel() <= _WHOLE:
        return (segments * factor).sum(-1)
    rows = max(1, _PIECE * torch.get_num_threads() // (split * width))
    sums = segments.new_empty(count, split)
    products = segments.new_empty(min(rows, count), split, width)
    for begin in range(0, count, rows):
        part = segments[begin : begin + rows]
        torch.mul(part, factor, out=products[: len(part)])
        torch.sum(products[: len(part)], -1, out=sums[begin : begin + rows])
    return sums


def expand_into(out: Tensor, v: Tensor, blocks: Tensor) -> None:
    """Write the expansion of v, (T, s m), by (s, w, m) to out, (T, s w), of their dtype."""
    split, width, segment_rank = blocks.shape
    if split == 1:
        torch.mm(v, blocks[0].T, out=out)
    elif segment_rank == 1:
        torch.mul(v.unsqueeze(-1), blocks[..., 0], out=out.view(-1, split, width))
    else:
        segments = v.view(-1, split, segment_rank).transpose(0, 1)
        out.view(-1, split, width).copy_(torch.bmm(segments, blocks.transpose(1, 2)).transpose(0, 1))


def expand_onto(h: Tensor, v: Tensor, blocks: Tensor, scaling: float) -> None:
    """Add scaling * (the expansion of v) to h, (T, s w), in place."""
    split, width, segment_rank = blocks.shape
    if h.dtype != v.dtype or (split > 1 and segment_rank > 1):
        update = v.new_empty(h.shape)
        expand_into(update, v, blocks)
        h.add_(update, alpha=scaling)
    elif split == 1:
        h.addmm_(v, blocks[0].T, alpha=scaling)
    else:
        h.view(-1, split, width).addcmul_(v.unsqueeze(-1), blocks[..., 0], value=scaling)


def outer_segments(x: Tensor, v: Tensor, split: int) -> Tensor:
    """(T, s w) and (T, s m) to (s, w, m): the sum over tokens of the products within a segment."""
    # v^T x and not x^T v: a product with few rows is up to eight times as fast on a CPU as one with few columns.
    if split == 1:
        return (v.T @ x).T.unsqueeze(0)
    segments, reduced = x.view(len(x), split, -1), v.view(len(v), split, -1)
    return torch.bmm(reduced.permute(1, 2, 0), segments.transpose(0, 1)).transpose(1, 2)
