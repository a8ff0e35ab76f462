"""Singular values and subspaces through the factors, against the singular values of the dense update."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bundle_factory import GAINS, MODULE, classifier_fields, config_fields, fill

from adapters_store import AdapterBundle, AdapterConfig, dense_factors
from adapters_store.convert.spectrum import (
    NothingToAnalyze,
    layer_group,
    layer_spectra,
    representable,
    similarity_by_group,
    smallest_rank,
    subspace_similarity,
)
from adapters_store.format.config import ModuleSpec

SHAPES: dict[str, dict[str, Any]] = {
    "sera": MODULE,
    "default split": {"d_in": 24, "d_out": 16, "rank": 8, "split": 8, "use_mixer": True, "scaling": 2.0},
    "lora": {"d_in": 10, "d_out": 7, "rank": 3, "split": 1, "use_mixer": False, "scaling": -0.25},
    "melora": {"d_in": 12, "d_out": 8, "rank": 4, "split": 4, "use_mixer": False, "scaling": 1.0},
    "moslora": {"d_in": 6, "d_out": 9, "rank": 4, "split": 1, "use_mixer": True, "scaling": 1.5},
    "rank above the widths of blocks": {
        "d_in": 4,
        "d_out": 8,
        "rank": 12,
        "split": 2,
        "use_mixer": True,
        "scaling": 1.0,
    },
    "no update": {**MODULE, "scaling": 0.0},
}
Q1, Q2 = "model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.q_proj"


def bundle_of(modules: dict[str, dict[str, Any]], seed: int = 0) -> AdapterBundle:
    fields = config_fields(modules=modules)
    # The constructor finds it.
    del fields["format_version"]
    return fill(AdapterConfig.model_validate(fields), seed)


def dense_svd(bundle: AdapterBundle, path: str) -> tuple[Any, Any]:
    u, values, _ = np.linalg.svd(dense_factors(bundle, path).delta_weight().numpy())
    return u, values


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_vectors_are_those_of_the_dense_update(name: str) -> None:
    bundle = bundle_of({Q1: SHAPES[name], Q2: SHAPES[name]})
    layers = layer_spectra(bundle)
    assert [layer.path for layer in layers] == [Q1, Q2]
    for layer in layers:
        delta = dense_factors(bundle, layer.path).delta_weight()
        _, values = dense_svd(bundle, layer.path)
        count = min(len(values), len(layer.values))
        np.testing.assert_allclose(layer.values[:count], values[:count], atol=1e-12 * max(values.max(), 1))
        assert np.all(values[count:] < 1e-12 * max(values.max(), 1))
        # Left singular vectors: orthonormal, and D^T u_i has the length of the i-th singular value.
        kept = layer.left[:, : layer.numerical_rank]
        torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1], dtype=torch.float64))
        torch.testing.assert_close((delta.T @ kept).norm(dim=0), layer.values[: layer.numerical_rank])
        assert layer.norm == pytest.approx(float(delta.norm()), abs=1e-12)
        assert layer.norms["a"] == pytest.approx(float(dense_factors(bundle, layer.path).a.norm()))
        assert ("c" in layer.norms) == SHAPES[name]["use_mixer"]
        assert layer.numerical_rank == np.linalg.matrix_rank(delta.numpy())


def test_a_gain_multiplies_the_columns_of_the_update() -> None:
    bundle = bundle_of({Q1: GAINS})
    (layer,) = layer_spectra(bundle)
    delta = dense_factors(bundle, Q1).delta_weight() * bundle.tensors[f"{Q1}.gain"].double()
    expected = torch.linalg.svdvals(delta)[: len(layer.values)]
    torch.testing.assert_close(layer.values, expected)


@pytest.mark.parametrize(("first", "second"), [("sera", "sera"), ("sera", "moslora"), ("default split", "lora")])
def test_similarity_is_that_of_dense_singular_vectors(first: str, second: str) -> None:
    width = SHAPES[first]["d_in"]
    one, two = bundle_of({Q1: SHAPES[first]}), bundle_of({Q1: {**SHAPES[second], "d_in": width}}, seed=5)
    phi = subspace_similarity(layer_spectra(one)[0], layer_spectra(two)[0])
    (u1, s1), (u2, s2) = dense_svd(one, Q1), dense_svd(two, Q1)
    assert phi.shape == (int((s1 > 1e-9).sum()), int((s2 > 1e-9).sum()))
    for i in range(1, phi.shape[0] + 1):
        for j in range(1, phi.shape[1] + 1):
            expected = np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2 / min(i, j)
            assert float(phi[i - 1, j - 1]) == pytest.approx(expected, abs=1e-9)


def test_an_adapter_is_similar_to_itself_and_not_to_an_orthogonal_one() -> None:
    bundle = bundle_of({Q1: SHAPES["lora"]})
    (own,) = layer_spectra(bundle)
    torch.testing.assert_close(subspace_similarity(own, own).diagonal(), torch.ones(3, dtype=torch.float64))
    # One holds the other: 1 wherever i or j is the whole rank.
    torch.testing.assert_close(subspace_similarity(own, own)[:, -1], torch.ones(3, dtype=torch.float64))
    tensors = dict(bundle.tensors)
    tensors[f"{Q1}.sera_a"] = torch.linalg.qr(tensors[f"{Q1}.sera_a"], mode="complete").Q[:, 3:6]
    (other,) = layer_spectra(AdapterBundle(bundle.config, tensors))
    assert float(subspace_similarity(own, other).max()) < 1e-12


def test_layers_are_averaged_by_what_they_compute() -> None:
    value = "model.layers.2.self_attn.v_proj"
    narrow = {**MODULE, "rank": 2}
    first = bundle_of({Q1: MODULE, Q2: narrow, value: MODULE})
    second = bundle_of({Q1: MODULE, Q2: MODULE, value: {**MODULE, "scaling": 0.0}}, seed=1)
    one, two = layer_spectra(first), layer_spectra(second)
    assert [layer.spec for layer in one] == [first.config.modules[layer.path] for layer in one]
    # The value layer of the second adapter was not trained.
    (query,) = similarity_by_group(one, two)
    parts = [subspace_similarity(a, b) for a, b in zip(one, two, strict=True) if a.group == "query"]
    assert (query.group, query.layers, query.phi.shape) == ("query", 2, (4, 4))
    torch.testing.assert_close(query.phi[:2], (parts[0][:2] + parts[1]) / 2)
    torch.testing.assert_close(query.phi[2:], parts[0][2:])
    assert query.unrelated == pytest.approx(1 / 8)
    with pytest.raises(NothingToAnalyze, match="no layer in common"):
        similarity_by_group(layer_spectra(bundle_of({Q1: MODULE})), layer_spectra(bundle_of({Q2: MODULE})))


def test_unrelated_subspaces_have_the_similarity_of_chance() -> None:
    shape = {"d_in": 64, "d_out": 64, "rank": 16, "split": 16, "use_mixer": True, "scaling": 1.0}
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(60)]
    one, two = (bundle_of(dict.fromkeys(paths, shape), seed) for seed in (1, 2))
    (found,) = similarity_by_group(layer_spectra(one), layer_spectra(two))
    assert float(found.phi[-1, -1]) == pytest.approx(16 * found.unrelated, rel=0.1)


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("model.layers.0.self_attn.q_proj", "query"),
        ("encoder.layer.3.attention.self.query", "query"),
        ("transformer.layer.1.attention.q_lin", "query"),
        ("vision_model.encoder.layers.0.self_attn.v_proj", "value"),
        ("transformer.layer.1.attention.v_lin", "value"),
        ("block.0.layer.0.SelfAttention.k", "key"),
        ("transformer.h.0.attn.c_attn", "query-key-value"),
        ("layers.0.attn.Wqkv", "query-key-value"),
        ("model.layers.0.mlp.up_proj", "up_proj"),
    ],
)
def test_groups_of_layers(path: str, group: str) -> None:
    assert layer_group(path) == group


def test_the_smallest_rank_that_keeps_the_energy() -> None:
    values = torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert smallest_rank([values], 0.9) == 1
    assert smallest_rank([values], 0.91) == 2
    assert smallest_rank([values], 1.0) == 2
    # Together: (9 + 4) of 19 is 0.68, (9 + 1 + 4 + 4) of 19 is 0.95.
    other = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    assert smallest_rank([values, other], 0.9) == 2
    assert smallest_rank([values, other], 0.99) == 3
    assert smallest_rank([torch.zeros(3, dtype=torch.float64)], 0.9) == 0


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (5, (24, 16, 8, 8), (8, 8)),
        (3, (24, 16, 8, 8), (4, 4)),
        (1, (24, 16, 8, 8), (2, 2)),
        (5, (24, 18, 12, 6), (6, 3)),
        (3, (9, 9, 9, 9), (3, 3)),
        (7, (24, 16, 16, 1), (7, 1)),
    ],
)
def test_a_rank_is_rounded_to_one_that_fits(rank: int, shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    d_in, d_out, own_rank, split = shape
    spec = ModuleSpec(d_in=d_in, d_out=d_out, rank=own_rank, split=split, use_mixer=True, scaling=1.0)
    found = representable(rank, [spec])
    assert found == expected
    ModuleSpec(d_in=d_in, d_out=d_out, rank=found[0], split=found[1], use_mixer=True, scaling=1.0)


def test_the_effective_rank() -> None:
    assert layer_spectra(bundle_of({Q1: SHAPES["no update"]}))[0].effective_rank == 0
    tensors = {f"{Q1}.sera_a": torch.eye(4), f"{Q1}.sera_b": torch.eye(4)}
    shape = {"d_in": 4, "d_out": 4, "rank": 4, "split": 1, "use_mixer": False, "scaling": 1.0}
    config = AdapterConfig.model_validate(config_fields(modules={Q1: shape}))
    assert layer_spectra(AdapterBundle(config, tensors))[0].effective_rank == pytest.approx(4)
    assert math.isclose(layer_spectra(AdapterBundle(config, tensors))[0].norm, 2)
    tensors[f"{Q1}.sera_b"] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert layer_spectra(AdapterBundle(config, tensors))[0].effective_rank == pytest.approx(3)


def test_a_head_alone_has_no_spectrum() -> None:
    config = AdapterConfig.model_validate(classifier_fields(method="head-only", modules={}))
    with pytest.raises(NothingToAnalyze, match="head-only"):
        layer_spectra(fill(config))
