"""The dense matrices behind an adapter's block-diagonal factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.errors import InvalidBundle
from adapters_store.format.bundle import AdapterBundle


class NotMergeable(InvalidBundle):
    """The adapter has an offset for a layer of the base that has no bias; `param` is the tensor."""

    code = "not_mergeable"


@dataclass(frozen=True)
class DenseFactors:
    """A, C and B of one layer with their zeros written out, float64.

    Attributes:
        a: (d_in, rank), block-diagonal.
        c: (rank, rank), the identity where the layer has no mixer.
        b: (rank, d_out), block-diagonal.
        scaling: Factor of the update.
    """

    a: Tensor
    c: Tensor
    b: Tensor
    scaling: float

    def delta_weight(self) -> Tensor:
        """Semantics: scaling * A C B, (d_in, d_out)."""
        return self.scaling * (self.a @ self.c @ self.b)


def dense_factors(bundle: AdapterBundle, path: str) -> DenseFactors:
    """Write out the factors of the layer at `path`, which must be one of `bundle.config.modules`.

    Blocks are read as FORMAT.md lays them out: rows `i * d_in / split ...` of `sera_a` are block A_i, columns
    `i * d_out / split ...` of `sera_b` are block B_i.
    """
    spec = bundle.config.modules[path]
    a = bundle.tensors[f"{path}.sera_a"].double().view(spec.split, -1, spec.segment_rank)
    b = bundle.tensors[f"{path}.sera_b"].double().view(spec.segment_rank, spec.split, -1)
    c = bundle.tensors[f"{path}.sera_c"].double() if spec.use_mixer else torch.eye(spec.rank, dtype=torch.float64)
    return DenseFactors(torch.block_diag(*a), c, torch.block_diag(*b.transpose(0, 1)), spec.scaling)
