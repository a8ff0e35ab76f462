"""The nearest SeRA of a LoRA: exact where one exists, never worse from step to step, honest about its error."""

from __future__ import annotations

import pytest
import torch
from bundle_factory import fill, make_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store import AdapterBundle, AdapterConfig, ModuleSpec, compress_bundle
from adapters_store.convert.compress import TooLossy, nearest_sera
from adapters_store.convert.dense import dense_factors
from adapters_store.convert.peft_errors import UnsupportedAdapter


def lora(d_in: int = 48, d_out: int = 32, rank: int = 4, seed: int = 0) -> AdapterBundle:
    spec = ModuleSpec(d_in=d_in, d_out=d_out, rank=rank, split=1, use_mixer=False, scaling=0.7)
    config = AdapterConfig(task="generate", method="lora", base=make_bundle().config.base, modules={"a.b": spec})
    return fill(config, seed)


@settings(max_examples=25, deadline=None)
@given(
    split=st.sampled_from([1, 2, 4, 8]),
    segment_rank=st.integers(1, 4),
    rank=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_no_step_makes_the_error_larger(split: int, segment_rank: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(48, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, 32, generator=generator, dtype=torch.float64)
    result = nearest_sera(left, right, split, split * segment_rank)
    assert all(after <= before + 1e-12 for before, after in zip(result.errors, result.errors[1:], strict=False))
    assert 0 <= result.errors[-1] <= 1 + 1e-12
    a = torch.block_diag(*result.a.double().view(split, -1, segment_rank))
    b = torch.block_diag(*result.b.double().view(segment_rank, split, -1).transpose(0, 1))
    difference = left @ right - a @ result.c.double() @ b
    assert difference.norm() / (left @ right).norm() == pytest.approx(result.errors[-1], abs=1e-6)


@pytest.mark.parametrize(("split", "rank"), [(1, 4), (2, 8), (4, 16)])
def test_exact_where_every_block_has_the_rank(split: int, rank: int) -> None:
    bundle = lora()
    result = compress_bundle(bundle, split, rank, max_error=1e-6)
    spec = result.config.modules["a.b"]
    assert (spec.split, spec.rank, spec.use_mixer) == (split, rank, True)
    assert result.config.method == "sera"
    expected = dense_factors(bundle, "a.b").delta_weight()
    found = dense_factors(result, "a.b").delta_weight()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_sera_is_found_again() -> None:
    spec = ModuleSpec(d_in=48, d_out=32, rank=8, split=4, use_mixer=True, scaling=2.0)
    base = make_bundle().config.base
    sera = fill(AdapterConfig(task="generate", method="sera", base=base, modules={"a.b": spec}), 3)
    seen: list[tuple[str, int, float]] = []
    compress_bundle(sera, 4, on_layer=lambda *layer: seen.append(layer))
    ((path, rank, error),) = seen
    assert (path, rank) == ("a.b", 8) and error < 1e-6


def test_it_is_better_than_a_random_start() -> None:
    """The singular vectors of one side alone are the start; the alternation improves on them."""
    bundle = lora(rank=6)
    dense = dense_factors(bundle, "a.b")
    errors = nearest_sera(dense.a, dense.b, 4, 8).errors
    assert 2 < len(errors) < 100
    assert errors[-1] < errors[0]


def test_a_loss_above_the_bound_is_refused_and_named() -> None:
    seen: list[tuple[str, int, float]] = []
    with pytest.raises(TooLossy, match=r"a\.b") as refusal:
        compress_bundle(lora(), 4, max_error=0.1, on_layer=lambda *layer: seen.append(layer))
    assert refusal.value.param == "max_error"
    ((_, _, error),) = seen
    assert error > 0.1
    compress_bundle(lora(), 4, on_layer=lambda *layer: seen.append(layer))
    assert seen[1] == seen[0]
    # Of several layers the worst one counts, in whatever order: a rank of 1 is exact.
    (spec,) = lora().config.modules.values()
    modules = {"a.0": spec.model_copy(update={"rank": 1}), "a.b": spec, "a.c": spec.model_copy(update={"rank": 1})}
    with pytest.raises(TooLossy, match=r"a\.b"):
        compress_bundle(fill(lora().config.model_copy(update={"modules": modules})), 4, max_error=0.1)


@pytest.mark.parametrize(("split", "rank"), [(5, None), (4, 6), (32, 32)])
def test_a_split_that_does_not_divide_is_refused(split: int, rank: int | None) -> None:
    with pytest.raises(UnsupportedAdapter, match="does not divide"):
        compress_bundle(lora(), split, rank)


@pytest.mark.parametrize(("split", "rank"), [(0, None), (-2, None), (4, 0)])
def test_sizes_below_one_are_refused(split: int, rank: int | None) -> None:
    with pytest.raises(UnsupportedAdapter, match="give numbers of at least 1") as refusal:
        compress_bundle(lora(), split, rank)
    assert refusal.value.param == "compress"
    assert compress_bundle(lora(), 1, 1).config.modules["a.b"].rank == 1


def test_the_record_and_the_rest_of_the_bundle_stay() -> None:
    bundle = lora()
    result = compress_bundle(bundle, 2)
    assert result.config.base == bundle.config.base
    record = result.config.training["import"]
    assert isinstance(record, dict)
    assert record["compressed"] == {"split": 2, "largest_error": pytest.approx(0.7, abs=0.3)}
