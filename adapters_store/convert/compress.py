"""The nearest SeRA of an adapter: block-diagonal A and B and a full C, by alternating least squares.

For one layer, the update M = scaling * A0 C0 B0 is cut into split x split blocks M_ij. The result minimises
`sum_ij |M_ij - A_i C_ij B_j|^2`. For orthonormal A_i and B_j, the best C_ij is A_i^T M_ij B_j^T, and the error is
`|M|^2 - sum_ij |A_i^T M_ij B_j^T|^2`. With all B_j fixed, the best A_i are the leading left singular vectors of
[M_i1 B_1^T ... M_ik B_k^T]; with all A_i fixed likewise the B_j. Each half step is an exact minimum, so that the error
never grows. This is the alternation of De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and
rank-(R1, ..., RN) approximation of higher-order tensors" (2000), for blocks of a matrix.

M is never formed: an orthonormal basis of each block of rows of A0 and of columns of B0 leaves matrices of the LoRA's
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters_store.convert.dense import dense_factors
from adapters_store.convert.peft_errors import UnsupportedAdapter
from adapters_store.convert.peft_import import with_record
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import AdapterConfig, ModuleSpec

# The alternation ends where a step lowers the relative error by less than this, or after so many steps.
_TOLERANCE = 1e-5
_MAX_STEPS = 200


class TooLossy(UnsupportedAdapter):
    """The nearest SeRA is farther from the adapter than allowed."""

    code = "compression_too_lossy"


@dataclass(frozen=True)
class CompressedLayer:
    """The nearest SeRA of one layer.

    Attributes:
        a: (d_in, segment_rank), as `sera_a` of a bundle.
        c: (rank, rank).
        b: (segment_rank, d_out), as `sera_b`.
        errors: |M - A C B| / |M| after each step, in Frobenius norms; the last one is the result's.
    """

    a: Tensor
    c: Tensor
    b: Tensor
    errors: tuple[float, ...]


def compress_bundle(
    bundle: AdapterBundle,
    split: int,
    rank: int | None = None,
    max_error: float | None = None,
    on_layer: Callable[[str, int, float], None] | None = None,
) -> AdapterBundle:
    """Find the nearest SeRA of every layer of an adapter. Blocks.

    Gains, offsets and the head stay as they are. The factors are float32.

    Args:
        bundle: Any adapter with layers.
        split: Blocks of A and B, at least 1; it must divide the widths of every layer.
        rank: Rank of the result, at least 1; None is the layer's own, rounded up to a multiple of `split`.
        max_error: The largest relative error of a layer that is accepted; None accepts any.
        on_layer: Called after each layer with its path, its new rank and the relative error of its update.

    Raises:
        UnsupportedAdapter: There is no layer, or split or rank do not fit one.
        TooLossy: A layer's error is above `max_error`; the message names the layer.
    """
    if not bundle.config.modules:
        raise UnsupportedAdapter(
            "a head-only adapter has no layers to compress; leave --compress out", param="compress"
        )
    if split < 1 or (rank is not None and rank < 1):
        raise UnsupportedAdapter(f"split is {split} and rank {rank}; give numbers of at least 1", param="compress")
    modules: dict[str, ModuleSpec] = {}
    tensors = dict(bundle.tensors)
    errors: dict[str, float] = {}
    for path, spec in bundle.config.modules.items():
        layer_rank = rank or -(-spec.rank // split) * split
        _check_fit(path, spec, split, layer_rank)
        dense = dense_factors(bundle, path)
        result = nearest_sera(dense.scaling * (dense.a @ dense.c), dense.b, split, layer_rank)
        errors[path] = result.errors[-1]
        fields = {"rank": layer_rank, "split": split, "use_mixer": True, "scaling": 1.0}
        modules[path] = spec.model_copy(update=fields)
        tensors |= {f"{path}.sera_a": result.a, f"{path}.sera_c": result.c, f"{path}.sera_b": result.b}
        if on_layer is not None:
            on_layer(path, layer_rank, errors[path])
    worst = max(errors, key=errors.__getitem__)
    if max_error is not None and errors[worst] > max_error:
        raise TooLossy(
            f"the nearest SeRA of {worst} differs from its update by {errors[worst]:.3f} of its norm; the bound is "
            f"{max_error:g}: give a larger rank or a smaller split, or raise --max-error",
            param="max_error",
        )
    fields = bundle.config.model_dump(mode="json") | {
        "method": "sera",
        "modules": {path: spec.model_dump(mode="json") for path, spec in modules.items()},
    }
    config = AdapterConfig.model_validate(fields)
    # Three digits: the last ones depend on the machine.
    note: dict[str, JsonValue] = {"split": split, "largest_error": float(f"{errors[worst]:.2e}")}
    return with_record(AdapterBundle(config, tensors), compressed=note)


def nearest_sera(left: Tensor, right: Tensor, split: int, rank: int) -> CompressedLayer:
    """Find A, C and B, block-diagonal in `split` blocks but C, for which A C B is nearest to `left @ right`.

    Args:
        left: (d_in, r0), of any dtype.
        right: (r0, d_out).
        split: Divides d_in, d_out and rank.
        rank: Rank of the result.

    Returns:
        float32 factors; the error after each step never grows by more than float64's rounding.
    """
    q = rank // split
    rows = left.double().view(split, -1, left.shape[1])
    columns = right.double().T.reshape(split, -1, right.shape[0])
    # M_ij = row_bases_i core_ij column_bases_j^T.
    row_bases, row_cores = torch.linalg.qr(rows)
    column_bases, column_cores = torch.linalg.qr(columns)
    core = torch.einsum("iar,jbr->ijab", row_cores, column_cores)
    norm = max(float(core.norm()), torch.finfo(torch.float64).tiny)
    b = _leading(core.permute(1, 3, 0, 2).reshape(split, core.shape[3], -1), q)
    errors: list[float] = []
    while True:
        a = _leading(torch.einsum("ijab,jbq->iajq", core, b).reshape(split, core.shape[2], -1), q)
        b = _leading(torch.einsum("ijab,iaq->jbiq", core, a).reshape(split, core.shape[3], -1), q)
        c = torch.einsum("iap,ijab,jbq->ijpq", a, core, b)
        errors.append(float((core - torch.einsum("iap,ijpq,jbq->ijab", a, c, b)).norm()) / norm)
        if len(errors) == _MAX_STEPS or (len(errors) > 1 and errors[-2] - errors[-1] < _TOLERANCE):
            break
    return CompressedLayer(
        (row_bases @ a).reshape(-1, q).float().contiguous(),
        c.permute(0, 2, 1, 3).reshape(rank, rank).float().contiguous(),
        (column_bases @ b).permute(2, 0, 1).reshape(q, -1).float().contiguous(),
        tuple(errors),
    )


def _leading(matrices: Tensor, count: int) -> Tensor:
    """The `count` leading left singular vectors of each matrix (batch, n, m): (batch, n, count), zeros beyond n."""
    vectors: Tensor = torch.linalg.svd(matrices, full_matrices=False).U[..., :count]
    return torch.nn.functional.pad(vectors, (0, count - vectors.shape[-1]))


def _check_fit(path: str, spec: ModuleSpec, split: int, rank: int) -> None:
    for name, size in {"d_in": spec.d_in, "d_out": spec.d_out, "rank": rank}.items():
        if size % split:
            raise UnsupportedAdapter(
                f"split {split} does not divide {name} {size} of {path}; choose another split or rank", param="compress"
            )
