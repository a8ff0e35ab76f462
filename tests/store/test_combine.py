"""A combination's update is the weighted sum of its parts' updates, for any splits, ranks, mixers and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import BASE, GAINS, HEAD, MODULE, Q, fill, make_bundle, make_classifier
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store import (
    AdapterBundle,
    AdapterConfig,
    AdapterStore,
    Combination,
    ModuleSpec,
    combination_digest,
    combination_size,
    combine,
    dense_factors,
    load_combination,
    parts_of,
    validate_bundle,
)
from adapters_store.errors import CannotCombine, WrongBase

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
SPLITS = (1, 2, 3, 4, 6, 12)


def adapter(shapes: dict[str, dict[str, Any]], seed: int, dtype: torch.dtype = torch.float32) -> AdapterBundle:
    modules = {path: ModuleSpec(d_in=24, d_out=36, **shape) for path, shape in shapes.items()}
    base = make_bundle().config.base
    return fill(AdapterConfig(task="generate", method="sera", base=base, modules=modules), seed, dtype)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, unique=True))
    return {
        layer: {
            "split": (split := draw(st.sampled_from(SPLITS))),
            "rank": split * draw(st.integers(1, 3)),
            "use_mixer": draw(st.booleans()),
            "scaling": draw(st.sampled_from([0.0, 0.5, -2.0, 1 / 3])),
        }
        for layer in layers
    }


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(shapes(), min_size=1, max_size=4), weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_the_update_is_the_weighted_sum(parts: list[dict[str, dict[str, Any]]], weights: list[float]) -> None:
    bundles = [adapter(part, seed) for seed, part in enumerate(parts)]
    total = combine(bundles, weights[: len(bundles)])
    validate_bundle(total)
    for layer in LAYERS:
        added = [
            (bundle, weight) for bundle, weight in zip(bundles, weights, strict=False) if layer in bundle.config.modules
        ]
        assert (layer in total.config.modules) == bool(added)
        if added:
            want = sum(weight * dense_factors(bundle, layer).delta_weight() for bundle, weight in added)
            got = dense_factors(total, layer).delta_weight()
            # Shares of the scaling are rounded to float32; nothing else is rounded.
            size = max(
                abs(weight) * dense_factors(bundle, layer).delta_weight().abs().max() for bundle, weight in added
            )
            # The smallest numbers have fewer digits.
            least = torch.finfo(want.dtype).tiny
            torch.testing.assert_close(got, want, rtol=0, atol=max(float(size) * 1e-5, least))


@pytest.mark.parametrize(
    ("splits", "mixers", "split", "rank", "mixer"),
    [
        ((12, 12), (True, True), 12, 24, True),
        ((12, 4), (False, False), 4, 24, False),
        ((12, 1), (True, False), 1, 24, True),
    ],
)
def test_the_sum_has_the_greatest_common_split(
    splits: tuple[int, int], mixers: tuple[bool, bool], split: int, rank: int, mixer: bool
) -> None:
    bundles = [
        adapter({Q: {"split": part, "rank": 12, "use_mixer": has, "scaling": 1.0}}, part)
        for part, has in zip(splits, mixers, strict=True)
    ]
    spec = combine(bundles, [1.0, 1.0]).config.modules[Q]
    assert (spec.split, spec.rank, spec.use_mixer) == (split, rank, mixer)


def test_equal_shares_are_exact_in_half_precision() -> None:
    bundles = [
        adapter({Q: {"split": 4, "rank": 4, "use_mixer": True, "scaling": 0.7}}, seed, torch.bfloat16)
        for seed in (1, 2)
    ]
    total = combine(bundles, [0.3, 0.3])
    assert total.config.modules[Q].scaling == 0.3 * 0.7
    # Every element is an element of a part, and so a bfloat16 value.
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in total.tensors.values())


def templated(template: str) -> AdapterBundle:
    return make_bundle(chat_template=template, format_version=2)


def other_base(**changes: Any) -> AdapterBundle:
    return make_bundle(base={**BASE, **changes})


@pytest.mark.parametrize(
    ("bundles", "weights", "error", "what"),
    [
        ([make_bundle(), make_classifier()], [1, 1], CannotCombine, "task"),
        ([make_classifier(), make_classifier(1, pooling="mean")], [1, 1], CannotCombine, "pooling"),
        ([make_classifier(), make_classifier(1, labels=["a", "b"])], [1, 1], CannotCombine, "labels"),
        ([make_classifier(), make_classifier(1, max_length=32)], [1, 1], CannotCombine, "max_length"),
        ([make_classifier(), make_classifier(1)], [1, 1], CannotCombine, "different heads"),
        ([make_bundle(), other_base(weights_digest="e" * 64)], [1, 1], WrongBase, "weights_digest"),
        ([make_classifier(), make_classifier(1, multi_label=True, format_version=3)], [1, 1], CannotCombine, "multi"),
        ([make_classifier(), make_classifier(1, head=HEAD, format_version=2)], [1, 1], CannotCombine, "head of part 2"),
        ([make_bundle(), make_bundle(modules={Q: GAINS}, format_version=2)], [1, 1], CannotCombine, "has a gain"),
        ([make_bundle(), make_bundle(modules={Q: {**MODULE, "d_in": 10}})], [1, 1], CannotCombine, "widths of"),
        ([templated("a"), make_bundle(), templated("b")], [1] * 3, CannotCombine, "different chat templates"),
        ([make_bundle()] * 9, [1] * 9, CannotCombine, "1 to 8 adapters"),
        ([], [], CannotCombine, "1 to 8 adapters"),
        ([make_bundle()], [float("nan")], CannotCombine, "finite"),
        ([make_bundle()], [1e300], CannotCombine, "smaller"),
        ([make_bundle()], [-1.7e308], CannotCombine, "smaller"),
    ],
)
def test_refusals_name_the_reason(
    bundles: list[AdapterBundle], weights: list[float], error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        combine(bundles, weights)


LORA = {**MODULE, "split": 1, "use_mixer": False}


@pytest.mark.parametrize(
    ("methods", "modules", "method"),
    [
        (("melora", "melora"), [MODULE, MODULE], "melora"),
        (("lora", "moslora"), [LORA, LORA], "lora"),
        (("lora", "moslora"), [LORA, {**LORA, "use_mixer": True}], "sera"),
        (("melora", "lora"), [{**MODULE, "use_mixer": False}] * 2, "sera"),
    ],
)
def test_a_sum_says_how_it_may_be_read(methods: tuple[str, str], modules: list[dict[str, Any]], method: str) -> None:
    bundles = [make_bundle(method=name, modules={Q: spec}) for name, spec in zip(methods, modules, strict=True)]
    assert combine(bundles, [1, 1]).config.method == method


def test_what_one_part_alone_has_goes_along() -> None:
    head_only = make_classifier(method="head-only", modules={})
    assert combine([head_only, head_only], [1, 1]).config.method == "head-only"
    adapted = make_classifier()
    adapted.tensors.update(head_only.tensors)
    assert combine([head_only, adapted], [1, 1]).config.method == "sera"
    assert combine([make_bundle()] * 7 + [templated("a")], [1] * 8).config.chat_template == "a"


def test_classifiers_of_one_head_keep_it() -> None:
    first, second = make_classifier(0), make_classifier(1)
    second.tensors.update({name: tensor for name, tensor in first.tensors.items() if name.startswith("head.")})
    total = combine([first, second], [0.5, 0.5])
    assert torch.equal(total.tensors["head.weight"], first.tensors["head.weight"])
    assert (total.config.labels, total.config.pooling) == (first.config.labels, first.config.pooling)
    validate_bundle(total)


def test_a_part_more_or_fewer_is_an_error() -> None:
    combination = Combination([make_bundle().config] * 2, [1, 1])
    combination.add(make_bundle())
    with pytest.raises(RuntimeError, match="1 of 2"):
        combination.bundle()


def test_a_digest_names_its_parts() -> None:
    parts = [("b" * 64, 0.1), ("a" * 64, -3.0)]
    digest = combination_digest(parts)
    assert sorted(parts_of(digest)) == sorted(parts)
    assert combination_digest(parts[::-1]) == digest
    assert "/" not in digest
    assert parts_of("a" * 64) == []


def test_a_sum_is_read_from_the_store_and_bounded(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    bundles = [make_bundle(seed) for seed in (0, 1)]
    parts = [(store.publish(bundle, f"acme/a{seed}").digest, 0.5) for seed, bundle in enumerate(bundles)]
    total = load_combination(store, parts, training={"combination": ["acme/a0", "acme/a1"]})
    assert total.config.training == {"combination": ["acme/a0", "acme/a1"]}
    want = combine(bundles, [0.5, 0.5])
    assert all(torch.equal(total.tensors[name], tensor) for name, tensor in want.tensors.items())
    with pytest.raises(CannotCombine, match="greater common divisor"):
        load_combination(store, parts, max_parameters=total.config.parameters - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_a_smaller_dtype_has_the_same_numbers_in_half_the_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    store = AdapterStore(tmp_path / "store")
    shape = {"split": 2, "rank": 4, "use_mixer": True, "scaling": 0.5}
    bundles = [adapter(dict.fromkeys(LAYERS, shape), seed) for seed in (0, 1, 2)]
    parts = [(store.publish(bundle, f"acme/a{i}").digest, 1 / (i + 3)) for i, bundle in enumerate(bundles)]
    whole, half = load_combination(store, parts), load_combination(store, parts, dtype=dtype)
    assert all(torch.equal(half.tensors[name], tensor.to(dtype)) for name, tensor in whole.tensors.items())
    largest = max(store.file_bytes(digest) for digest, _ in parts)
    numbers = whole.config.parameters
    assert combination_size(store, parts) == (whole.nbytes + largest, numbers) == (4 * numbers + largest, numbers)
    assert combination_size(store, parts, dtype=dtype) == (half.nbytes + largest, numbers)
    assert half.nbytes == 2 * numbers
