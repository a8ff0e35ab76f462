"""The grouped operation in torch alone. Adapters of the same shape are computed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sera_kernels.operands import ABSENT, AdapterBatch, AdapterTables, Entry


def grouped_sera_torch(
    x: Tensor,
    outputs: Sequence[Tensor],
    modules: Sequence[int],
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> None:
    """Run `grouped_sera` on any device. The host reads shapes, so a CUDA graph cannot capture this function."""
    groups = batch.tokens_by_slot
    slots = list(groups)
    has_vectors = batch.classes_in(tables).vectors
    for y, module in zip(outputs, modules, strict=True):
        alike: dict[tuple[int, int, bool], list[tuple[Entry, Tensor]]] = {}
        entries = list(tables.entries(module, slots))
        for slot, entry in zip(slots, entries, strict=True):
            if entry.offset == ABSENT:
                continue
            tokens = groups[slot]
            if len(tokens) > 1:
                update_run(x, y, tokens, entry, pool)
            else:
                alike.setdefault((entry.rank, entry.split, entry.mixer), []).append((entry, tokens))
        for members in alike.values():
            _update_singles(x, y, members, pool)
        if has_vectors:
            for slot, entry in zip(slots, entries, strict=True):
                _apply_vectors(y, groups[slot], entry, pool)


def update_run(x: Tensor, y: Tensor, tokens: Tensor, entry: Entry, pool: Tensor) -> None:
    """Add one adapter's update to many tokens. The factors are read in place."""
    split, segment_rank = entry.split, entry.segment_rank
    a, c, b = (factor if factor is None else factor.float() for factor in entry.factors(pool, x.shape[1], y.shape[1]))
    assert a is not None and b is not None
    # (split, tokens, d_in / split) @ (split, d_in / split, segment_rank)
    segments = x[tokens].float().view(len(tokens), split, -1).transpose(0, 1)
    u = torch.bmm(segments, a.view(split, -1, segment_rank))
    if c is not None:
        mixed = u.transpose(0, 1).reshape(len(tokens), -1) @ c
        u = mixed.view(len(tokens), split, segment_rank).transpose(0, 1)
    # Scaled before it is rounded: the product may be beyond float16, and the update not.
    update = torch.bmm(u * entry.scaling, b.view(segment_rank, split, -1).transpose(0, 1))
    update = update.transpose(0, 1).reshape(len(tokens), -1)
    y.index_add_(0, tokens, update.to(y.dtype))


def _update_singles(x: Tensor, y: Tensor, members: list[tuple[Entry, Tensor]], pool: Tensor) -> None:
    """Add the updates of adapters of one shape that have one token each. Their factors are gathered into a batch."""
    first = members[0][0]
    n, d_in, d_out = len(members), x.shape[1], y.shape[1]
    rank, split, segment_rank = first.rank, first.split, first.segment_rank
    size = first.elements(d_in, d_out)
    factors = torch.stack([pool[e.offset : e.offset + size] for e, _ in members]).float()
    a, c, b = factors.split([d_in * segment_rank, size - (d_in + d_out) * segment_rank, segment_rank * d_out], 1)
    tokens = torch.cat([positions for _, positions in members])
    segments = x[tokens].float().view(n, split, 1, -1)
    u = (segments @ a.view(n, split, -1, segment_rank)).view(n, 1, rank)
    if first.mixer:
        u = torch.bmm(u, c.view(n, rank, rank))
    blocks = b.view(n, segment_rank, split, -1).transpose(1, 2)
    update = (u.view(n, split, 1, segment_rank) @ blocks).view(n, d_out)
    scaling = torch.tensor([e.scaling for e, _ in members], device=x.device)
    y.index_add_(0, tokens, (update * scaling[:, None]).to(y.dtype))


def _apply_vectors(y: Tensor, tokens: Tensor, entry: Entry, pool: Tensor) -> None:
    """Apply one adapter's gain and offset, if it has them, to the complete outputs of its tokens."""
    if (vectors := entry.gain_and_offset(pool, y.shape[1])) is not None:
        gain, offset = vectors.float()
        y[tokens] = torch.addcmul(offset, y[tokens].float(), gain).to(y.dtype)
