"""What an adapter's updates look like: their singular values, norms, and the similarity of their subspaces.

Section 4.5 of the SeRA paper, equation 4, after section 7 of the LoRA paper (Hu et al. 2022). The update of a layer is
D = scaling * A C B, (d_in, d_out). D is never formed: the blocks of A and of B^T have thin QR factors, A = Q_a R_a and
B^T = Q_b R_b, and D = Q_a (scaling * R_a C R_b^T) Q_b^T. The matrix in the middle is at most rank x rank. Its singular
values are those of D, and its left singular vectors times Q_a are those of D. All of it is float64.

A gain of a layer multiplies the columns of D. The change (gain - 1) W of the frozen weight W is left out, because it
needs the base. An offset changes the bias of a layer, and no singular value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.errors import InvalidBundle
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import ModuleSpec

# Names of the linear layers of attention, as the architectures of transformers call them.
_GROUPS: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "q_lin", "q", "wq", "to_q", "query_proj", "q_attn", "linear_q"),
    "key": ("k_proj", "key", "k_lin", "k", "wk", "to_k", "key_proj", "linear_k"),
    "value": ("v_proj", "value", "v_lin", "v", "wv", "to_v", "value_proj", "linear_v"),
    # One layer computes all three. Its singular vectors are of the whole, so it counts as neither query nor value.
    "query-key-value": ("c_attn", "qkv_proj", "query_key_value", "qkv", "wqkv", "in_proj", "att_proj"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}

ENERGIES = (0.9, 0.99)
"""The shares of an update's squared Frobenius norm for which ranks are suggested."""


class NothingToAnalyze(InvalidBundle):
    """The adapter has no layers, or two adapters have no layer in common."""

    code = "nothing_to_analyze"


@dataclass(frozen=True)
class LayerSpectrum:
    """The update of one layer.

    Attributes:
        path: Path of the layer.
        group: See `layer_group`.
        spec: Shape of the layer's factors.
        values: float64 (n,), n <= rank: singular values of the update, in descending order.
        left: float64 (d_in, n): the left singular vectors, which belong to the inputs of the layer.
        norms: Frobenius norms of the stored factors, by name: a, b, and c where the layer has a mixer.
    """

    path: str
    group: str
    spec: ModuleSpec
    values: Tensor
    left: Tensor
    norms: dict[str, float]

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.values.norm())

    @property
    def numerical_rank(self) -> int:
        """Singular values above float64's rounding: largest value * larger width * 2.2e-16."""
        bound = float(self.values.max()) * max(self.spec.d_in, self.spec.d_out) * torch.finfo(torch.float64).eps
        return int((self.values > bound).sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 for a zero update."""
        total = float(self.values.sum())
        if total == 0:
            return 0.0
        shares = self.values[self.values > 0] / total
        return math.exp(float(-(shares * shares.log()).sum()))

    def rank_for(self, energy: float) -> int:
        """The smallest k for which the k largest singular values hold `energy` of the squared norm; 0 for zero."""
        return smallest_rank([self.values], energy)


def layer_group(path: str) -> str:
    """Say what a layer computes: query, key, value, query-key-value (one layer for all), or its own last name."""
    name = path.rpartition(".")[2]
    return _GROUP_OF.get(name.lower(), name)


def layer_spectra(bundle: AdapterBundle) -> list[LayerSpectrum]:
    """Decompose the update of each layer. Blocks.

    Layers of equal shapes are decomposed as one batch.

    Returns:
        One for each layer, by path; layer 2 comes before layer 10.

    Raises:
        NothingToAnalyze: The adapter has no layers.
    """
    modules = bundle.config.modules
    if not modules:
        raise NothingToAnalyze("a head-only adapter has no updates to analyze; choose another adapter", param="adapter")
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, spec in modules.items():
        alike.setdefault((spec.d_in, spec.d_out, spec.rank, spec.split), []).append(path)
    found: dict[str, LayerSpectrum] = {}
    for paths in alike.values():
        values, left = _decompose(bundle, paths)
        for index, path in enumerate(paths):
            spec = modules[path]
            factors = ("a", "c", "b") if spec.use_mixer else ("a", "b")
            norms = {name: float(bundle.tensors[f"{path}.sera_{name}"].double().norm()) for name in factors}
            found[path] = LayerSpectrum(path, layer_group(path), spec, values[index], left[index], norms)
    return [found[path] for path in sorted(modules, key=_natural)]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _decompose(bundle: AdapterBundle, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Singular values (layers, n) and left singular vectors (layers, d_in, n) of layers of one shape."""
    specs = [bundle.config.modules[path] for path in paths]
    split, rank = specs[0].split, specs[0].rank
    a = torch.stack([bundle.tensors[f"{path}.sera_a"].double() for path in paths])
    b = torch.stack([_outer_factor(bundle, path) for path in paths])
    identity = torch.eye(rank, dtype=torch.float64)
    c = torch.stack(
        [
            spec.scaling * (bundle.tensors[f"{path}.sera_c"].double() if spec.use_mixer else identity)
            for path, spec in zip(paths, specs, strict=True)
        ]
    )
    layers, segment = len(paths), rank // split
    # The blocks: A_i is (d_in / split, segment rank), B_i^T is (d_out / split, segment rank).
    rows, row_cores = torch.linalg.qr(a.view(layers, split, -1, segment))
    # The right singular vectors are not needed.
    column_cores = torch.linalg.qr(b.view(layers, segment, split, -1).permute(0, 2, 3, 1), mode="r").R
    mixer = c.view(layers, split, segment, split, segment)
    core = torch.einsum("lipq,liqjs,ljts->lipjt", row_cores, mixer, column_cores)
    core = core.reshape(layers, row_cores.shape[1] * row_cores.shape[2], -1)
    u, values, _ = torch.linalg.svd(core, full_matrices=False)
    left = torch.einsum("liap,lipn->lian", rows, u.view(layers, split, -1, u.shape[-1]))
    return values, left.reshape(layers, specs[0].d_in, -1)


def _outer_factor(bundle: AdapterBundle, path: str) -> Tensor:
    """B as it is stored, (segment_rank, d_out), its columns times the layer's gain."""
    factor = bundle.tensors[f"{path}.sera_b"].double()
    return factor * bundle.tensors[f"{path}.gain"].double() if bundle.config.modules[path].has_gain else factor


def subspace_similarity(first: LayerSpectrum, second: LayerSpectrum) -> Tensor:
    """phi(i, j) = |U1[:, :i]^T U2[:, :j]|_F^2 / min(i, j), equation 4 of the SeRA paper.

    It is 1 where one subspace holds the other, and 0 where they are orthogonal. Two random subspaces of d_in
    dimensions have max(i, j) / d_in on average.

    Returns:
        float64 (n1, n2), entry [i - 1, j - 1] is phi(i, j). n1 and n2 are the numerical ranks: the vectors of zero
        singular values are arbitrary.

    Raises:
        ValueError: The layers have different inputs.
    """
    if first.spec.d_in != second.spec.d_in:
        raise ValueError(f"{first.path} has {first.spec.d_in} inputs, {second.path} has {second.spec.d_in}")
    overlap = first.left[:, : first.numerical_rank].T @ second.left[:, : second.numerical_rank]
    held = overlap.square().cumsum(0).cumsum(1)
    i = torch.arange(1, held.shape[0] + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, held.shape[1] + 1, dtype=torch.float64)
    return held / torch.minimum(i, j)


@dataclass(frozen=True)
class GroupSimilarity:
    """phi of two adapters, averaged over the layers of one group.

    Attributes:
        group: See `layer_group`.
        layers: Layers that the mean is over.
        phi: float64 (n1, n2): the mean over those layers that have i and j singular values above zero.
        unrelated: max(i, j) / d_in at i = j = 1, the value of unrelated subspaces: a mean over the layers.
    """

    group: str
    layers: int
    phi: Tensor
    unrelated: float


def similarity_by_group(first: Sequence[LayerSpectrum], second: Sequence[LayerSpectrum]) -> list[GroupSimilarity]:
    """Average `subspace_similarity` over the layers of each group that both adapters have and that neither leaves at 0.

    Raises:
        NothingToAnalyze: There is no such layer.
    """
    others = {layer.path: layer for layer in second}
    groups: dict[str, list[tuple[LayerSpectrum, Tensor]]] = {}
    for layer in first:
        other = others.get(layer.path)
        if other is not None and layer.numerical_rank and other.numerical_rank:
            groups.setdefault(layer.group, []).append((layer, subspace_similarity(layer, other)))
    if not groups:
        raise NothingToAnalyze(
            "the two adapters have no layer in common that both have trained; choose two with the same target modules",
            param="adapter",
        )
    return [
        GroupSimilarity(
            group,
            len(pairs),
            _mean_of_present([phi for _, phi in pairs]),
            sum(1 / layer.spec.d_in for layer, _ in pairs) / len(pairs),
        )
        for group, pairs in groups.items()
    ]


def _mean_of_present(matrices: Sequence[Tensor]) -> Tensor:
    """The mean of matrices of several shapes, at each place over those that reach it."""
    shape = [max(matrix.shape[axis] for matrix in matrices) for axis in (0, 1)]
    total = torch.zeros(shape, dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.float64)
    for matrix in matrices:
        total[: matrix.shape[0], : matrix.shape[1]] += matrix
        count[: matrix.shape[0], : matrix.shape[1]] += 1
    # A place that one matrix reaches in each axis, and none in both, has no value.
    return total / count


def smallest_rank(values: Sequence[Tensor], energy: float) -> int:
    """The smallest k for which the k largest singular values of each matrix hold `energy` of all squares together.

    Args:
        values: Singular values of each matrix, in descending order.
        energy: A share, above 0 and at most 1.

    Returns:
        k, or 0 if every value is 0.
    """
    longest = max(len(each) for each in values)
    squares = torch.zeros(longest, dtype=torch.float64)
    for each in values:
        squares[: len(each)] += each.square()
    total = float(squares.sum())
    if total == 0:
        return 0
    # The last sum may fall short of the total by rounding.
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.nonzero()[0]) + 1


def representable(rank: int, specs: Sequence[ModuleSpec]) -> tuple[int, int]:
    """Round a rank up to (rank, split) that a new adapter of the same kind can have in all of these layers.

    Rule: where all layers have split 1, the rank stays and the split is 1. Otherwise the rank of one segment stays (the
    smallest of the layers), and the split becomes the smallest number, at least 2, which divides the widths of all
    layers and gives at least this rank.
    """
    if all(spec.split == 1 for spec in specs):
        return rank, 1
    segment = min(spec.segment_rank for spec in specs)
    common = math.gcd(*(width for spec in specs for width in (spec.d_in, spec.d_out)))
    largest = max(spec.split for spec in specs)
    least = max(2, -(-rank // segment))
    split = next((k for k in range(least, common + 1) if common % k == 0), largest)
    return segment * split, split
