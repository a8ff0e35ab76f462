"""Bundles that cannot be served are refused before they are published."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

import adapters_store
import sera_kernels
from adapters_store import AdapterBundle, expected_shapes
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.errors import AdapterOverflow, AdapterTooLarge
from sera_serve.residency import DevicePool, check_servable, pack
from sera_serve.residency.bundle_check import check_ranks
from sera_serve.residency.loader import AdapterLoader
from sera_serve.residency.packing import lay_out, packed_elements
from support.factories import random_adapter, with_hidden_layer, with_vectors

ALL = SeraConfig(8, 8, 8.0, "all-linear")
SHAPES = [ALL, SeraConfig(8, 1, 8.0, "all-linear"), SeraConfig(4, 4, 4.0, ("q_proj", "down_proj"), use_mixer=False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATH = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in the thread that publishes."""
    torch.set_num_threads(1)


def pool_of(base: FrozenBase, dtype: torch.dtype = torch.float32, nbytes: int = 1 << 20) -> DevicePool:
    return DevicePool(nbytes, len(base.module_shapes()), 2, dtype)


def with_scaling(bundle: AdapterBundle, scaling: float) -> AdapterBundle:
    modules = dict(bundle.config.modules)
    modules[PATH] = modules[PATH].model_copy(update={"scaling": scaling})
    return AdapterBundle(bundle.config.model_copy(update={"modules": modules}), dict(bundle.tensors))


def with_factor(bundle: AdapterBundle, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> AdapterBundle:
    return AdapterBundle(bundle.config, bundle.tensors | {name: change(bundle.tensors[name])})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labels", [None, ["no", "yes"]])
def test_an_ordinary_adapter_passes_and_nothing_is_written(
    dtype: torch.dtype, shape: SeraConfig, labels: list[str] | None, base: FrozenBase, index: dict[str, int]
) -> None:
    pool = pool_of(base, dtype)
    check_servable(random_adapter(base, shape, 1, labels), index, pool)
    check_servable(random_adapter(base, shape, 2, labels, strength=0.0), index, pool)
    assert not pool.data.any() and not pool.placements()
    pool.check_invariants()


@pytest.mark.parametrize("shape", [*SHAPES, SeraConfig(3, 1, 8.0, ("q_proj",))])
def test_the_size_is_known_without_the_weights(shape: SeraConfig, base: FrozenBase, index: dict[str, int]) -> None:
    for labels in (None, ["no", "yes"], ["a", "b", "c", "d", "e"]):
        bundle = random_adapter(base, shape, 1, labels)
        bundles = [bundle, with_vectors(bundle, ["q_proj"], ["down_proj", "q_proj"])]
        if labels is not None:
            bundles.append(with_hidden_layer(bundle, "relu", 5))
        for made in bundles:
            assert packed_elements(made.config) == lay_out(made, index)[0].elements


@pytest.mark.parametrize("split", [1, 32])
def test_a_rank_is_at_most_twice_the_wider_width(
    split: int, base: FrozenBase, index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.format.validation._ANY_WIDTH", 16)

    # The layer is (64, 32): its rank may be 128.
    def made(rank: int) -> AdapterBundle:
        return random_adapter(base, SeraConfig(rank, split, 8.0, ("k_proj",), use_mixer=False), 1)

    most, more = made(128), made(160)
    check_ranks(most.config)
    made_by_name = {"most": nullcontext(most), "more": nullcontext(more)}
    loader = AdapterLoader(made_by_name.__getitem__, index, pool_of(base))
    assert loader.read("most").layout.modules[0]["rank"] == 128
    for check in (lambda: check_ranks(more.config), lambda: loader.read("more")):
        with pytest.raises(
            AdapterTooLarge, match=r"rank 160 of .* more than 128, the most for a layer of widths 64 and 32"
        ) as refusal:
            check()
        assert refusal.value.param == "adapter_config.modules.model.layers.0.self_attn.k_proj.rank"


def test_a_rank_that_no_gpu_computes_is_refused_on_every_device(base: FrozenBase, index: dict[str, int]) -> None:
    assert adapters_store.MOST_RANK == sera_kernels.MOST_RANK == 4096

    def made(rank: int) -> AdapterBundle:
        # In a layer of BERT-base, rank 4,608 with split 768 takes 23,040 parameters.
        spec = random_adapter(base, ALL, 1).config.modules[PATH]
        spec = spec.model_copy(update={"d_in": 768, "d_out": 3072, "rank": rank, "split": 768, "use_mixer": False})
        config = random_adapter(base, ALL, 1).config.model_copy(update={"modules": {PATH: spec}})
        tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
        return AdapterBundle(config, tensors)

    most, more = made(3840), made(4608)
    check_ranks(most.config)
    loader = AdapterLoader({"more": nullcontext(more)}.__getitem__, index, pool_of(base))
    for check in (lambda: check_ranks(more.config), lambda: loader.read("more")):
        with pytest.raises(
            AdapterTooLarge, match=r"rank 4608 of .* more than 4096, the most for any layer; "
        ) as refusal:
            check()
        assert (refusal.value.status, refusal.value.code) == (422, "adapter_too_large")
        assert refusal.value.param == f"adapter_config.modules.{PATH}.rank"


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_the_pool_fits(dtype: torch.dtype, base: FrozenBase, index: dict[str, int]) -> None:
    bundle = random_adapter(base, ALL, 1)
    packed = pack(bundle, index, dtype)
    nbytes = packed.layout.elements * dtype.itemsize
    check_servable(bundle, index, pool_of(base, dtype, nbytes))
    with pytest.raises(AdapterTooLarge, match=f"takes {nbytes} bytes, .* {nbytes - 4}; raise pool_mib") as refusal:
        check_servable(bundle, index, pool_of(base, dtype, nbytes - 4))
    assert (refusal.value.status, refusal.value.param) == (422, "adapter")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sera_a", lambda t: torch.full_like(t, 1e30)),
        ("sera_b", lambda t: torch.full_like(t, 1e30)),
        # One element in thousands.
        ("sera_b", lambda t: t.index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(3e38))),
        ("sera_c", lambda t: torch.full_like(t, -3e38)),
    ],
    ids=["a", "b", "one element", "c"],
)
def test_values_that_overflow_are_refused(
    dtype: torch.dtype,
    shape: SeraConfig,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    base: FrozenBase,
    index: dict[str, int],
) -> None:
    bundle = with_factor(random_adapter(base, shape, 1), f"{PATH}.{name}", change)
    with pytest.raises(AdapterOverflow, match="smaller scaling") as refusal:
        check_servable(bundle, index, pool_of(base, dtype))
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (422, "adapter_overflow", PATH)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_of_squares_counts(shape: SeraConfig, base: FrozenBase, index: dict[str, int]) -> None:
    """A finite update whose squares overflow: the next normalization would make zeros of it."""
    bundle = with_factor(random_adapter(base, shape, 1), f"{PATH}.sera_b", lambda t: t / t.abs().max() * 1e19)
    with pytest.raises(AdapterOverflow) as refusal:
        check_servable(bundle, index, pool_of(base))
    assert refusal.value.param == PATH


@pytest.mark.parametrize(
    ("scaling", "dtype"),
    [(1e308, torch.float32), (-1e39, torch.bfloat16), (1e5, torch.float16), (1e308, torch.float16)],
)
def test_a_scaling_beyond_the_dtype_is_refused(
    scaling: float, dtype: torch.dtype, base: FrozenBase, index: dict[str, int]
) -> None:
    # Its update is zero: what would be computed is 0 times infinity.
    bundle = with_scaling(random_adapter(base, ALL, 1, strength=0.0), scaling)
    with pytest.raises(AdapterOverflow, match="scaling") as refusal:
        check_servable(bundle, index, pool_of(base, dtype))
    assert refusal.value.param == PATH


@pytest.mark.parametrize("vector", ["gain", "offset"])
def test_vectors_that_overflow_are_refused(vector: str, base: FrozenBase, index: dict[str, int]) -> None:
    bundle = with_vectors(random_adapter(base, ALL, 1), gain=("down_proj",), offset=("down_proj",))
    check_servable(bundle, index, pool_of(base))
    bundle = with_factor(bundle, f"{PATH}.{vector}", lambda t: torch.full_like(t, 1e20))
    with pytest.raises(AdapterOverflow) as refusal:
        check_servable(bundle, index, pool_of(base))
    assert refusal.value.param == PATH


def test_a_hidden_layer_that_overflows_is_refused(base: FrozenBase, index: dict[str, int]) -> None:
    bundle = with_hidden_layer(random_adapter(base, ALL, 1, labels=["no", "yes"]), "relu", 8)
    check_servable(bundle, index, pool_of(base))
    bundle = with_factor(bundle, "head.dense.weight", lambda t: torch.full_like(t, 3e38))
    with pytest.raises(AdapterOverflow) as refusal:
        check_servable(bundle, index, pool_of(base))
    assert refusal.value.param == "head"


@pytest.mark.parametrize(
    ("name", "dtype"), [*(("head.weight", dtype) for dtype in DTYPES), ("head.bias", torch.float16)]
)
def test_a_head_that_overflows_is_refused(
    name: str, dtype: torch.dtype, base: FrozenBase, index: dict[str, int]
) -> None:
    bundle = random_adapter(base, ALL, 1, labels=["no", "yes"])
    bundle = with_factor(bundle, name, lambda t: torch.full_like(t, 3e38))
    with pytest.raises(AdapterOverflow) as refusal:
        check_servable(bundle, index, pool_of(base, dtype))
    assert refusal.value.param == "head"
