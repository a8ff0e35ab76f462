"""Rank, split, alpha and targets by pattern, and what they give in the published adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_samples import ending_rule, save_tiny_base, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.pattern_options import parse_pattern
from sera_serve.trainer.patterns import shapes_by_path, value_for
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings, load_options

REQUIRED: dict[str, Any] = {"base": "tiny", "store": "s", "name": "acme/a", "task": "classify", "train": "rows.csv"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return load_base(str(save_tiny_base(tmp_path_factory.mktemp("base"))))


def shapes(base: FrozenBase, **options: Any) -> dict[str, tuple[int, int, float]]:
    """(rank, split, scaling) by the last two names of each adapted layer."""
    settings = load_options(None, REQUIRED | {"rank": 4} | options)
    found = shapes_by_path(settings, base.module_shapes())
    return {path: (shape.rank, shape.split, shape.scaling) for path, shape in found.items()}


def test_a_pattern_is_read_from_a_flag_a_mapping_and_pairs() -> None:
    flag = parse_pattern("rank_pattern", "q_proj=8, layers.0.*.v_proj=4")
    assert flag == (("q_proj", 8), ("layers.0.*.v_proj", 4))
    assert flag == parse_pattern("rank_pattern", {"q_proj": 8, "layers.0.*.v_proj": 4})
    assert flag == parse_pattern("rank_pattern", [["q_proj", 8], ["layers.0.*.v_proj", 4]])
    assert parse_pattern("alpha_pattern", "q_proj=0.5") == (("q_proj", 0.5),)


def test_the_last_match_wins() -> None:
    pattern = parse_pattern("rank_pattern", "*=2,q_proj=8,layers.0.*=4")
    assert value_for(pattern, "model.layers.0.self_attn.q_proj") == 4
    assert value_for(pattern, "model.layers.1.self_attn.q_proj") == 8
    assert value_for(pattern, "model.layers.1.self_attn.v_proj") == 2
    # A suffix is made of whole names.
    assert value_for(parse_pattern("rank_pattern", "proj=2"), "layers.0.q_proj") is None


def test_each_layer_has_its_own_shape(base: FrozenBase) -> None:
    found = shapes(
        base,
        target_modules="q_proj,layers.1.*.v_proj,*.up_*",
        rank_pattern="q_proj=8,layers.0.*.q_proj=16",
        split_pattern={"layers.0.*.q_proj": 4},
        alpha_pattern="up_proj=2",
    )
    assert found == {
        "model.layers.0.self_attn.q_proj": (16, 4, 2.0),
        "model.layers.1.self_attn.q_proj": (8, 8, 2.0),
        "model.layers.1.self_attn.v_proj": (4, 4, 2.0),
        "model.layers.0.mlp.up_proj": (4, 4, 0.5),
        "model.layers.1.mlp.up_proj": (4, 4, 0.5),
    }
    given = shapes(base, target_modules="q_proj,v_proj", split=2, lora_alpha=8, rank_pattern="q_proj=8")
    assert given["model.layers.0.self_attn.q_proj"] == (8, 2, 1.0)
    assert given["model.layers.0.self_attn.v_proj"] == (4, 2, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank_pattern": "q_porj=8"},
            "--rank-pattern: 'q_porj' matches no layer that is adapted",
        ),
        ({"rank_pattern": "q_porj=8"}, "there is q_proj"),
        ({"rank_pattern": "k_proj=8", "target_modules": "q_proj"}, "'k_proj' matches no layer"),
        ({"rank_pattern": "layers.0.self_att.q_proj=8"}, r"there is model\.layers\.0\.self_attn\.q_proj"),
        ({"split_pattern": "q_proj=3"}, r"layer model\.layers\.0\.self_attn\.q_proj: split 3 does not divide rank 4"),
        ({"rank_pattern": "q_proj=1"}, "layer model.*q_proj: split 1 of rank 1 does not belong to this method"),
        ({"rank_pattern": "q_proj=12", "split_pattern": "q_proj=3"}, "split 3 does not divide the widths 32 -> 32"),
        ({"method": "lora", "split_pattern": "q_proj=2"}, "take method melora"),
        ({"target_modules": "layers.7.*"}, r"target module 'layers\.7\.\*' matches no linear layer"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(base: FrozenBase, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        shapes(base, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": "q_proj"}, "--rank-pattern 'q_proj': 'q_proj' is not of the form pattern=value"),
        ({"rank_pattern": "q_proj=x"}, "q_proj=x needs an integer from 1 to 4096"),
        ({"rank_pattern": "q_proj=0"}, "needs an integer"),
        ({"rank_pattern": {"q_proj": 4.5}}, "needs an integer"),
        ({"rank_pattern": {"q_proj": True}}, "needs an integer"),
        ({"alpha_pattern": "q_proj=nan"}, "needs a positive number"),
        ({"alpha_pattern": {"q_proj": [1]}}, "needs a positive number"),
        ({"rank_pattern": "q_proj=8,q_proj=4"}, "pattern 'q_proj' is there twice"),
        ({"rank_pattern": {}}, "no pattern is given"),
        ({"rank_pattern": "=8"}, "'' is no module name or pattern"),
        ({"rank_pattern": 8}, "a mapping is needed"),
        ({"method": "head-only", "rank_pattern": "q_proj=8"}, "--rank-pattern has no meaning for method head-only"),
        ({"init_from": "acme/b", "alpha_pattern": "q_proj=8"}, "--init-from keeps what --alpha-pattern says"),
    ],
)
def test_what_is_no_pattern_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        load_options(None, REQUIRED | options)


def test_the_order_of_a_pattern_names_the_run() -> None:
    def identity(pattern: str) -> dict[str, Any]:
        return load_options(None, REQUIRED | {"rank_pattern": pattern}).identity()

    assert identity("q_proj=8,layers.0.*=4") != identity("layers.0.*=4,q_proj=8")
    again = TrainSettings(**(REQUIRED | {"rank_pattern": identity("q_proj=8")["rank_pattern"]}))
    assert again.rank_pattern == (("q_proj", 8),)


def test_the_published_adapter_has_the_shapes(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    options = settings_for(
        Path("tiny"),
        tmp_path,
        rows,
        epochs=1,
        target_modules="q_proj,down_proj",
        rank_pattern="layers.0.*=8",
        split_pattern={"layers.0.mlp.*": 2},
        alpha_pattern="down_proj=3",
    )
    result = train_adapter(options, base=base)
    bundle = AdapterStore(tmp_path / "store").load(result.digest)
    found = {path: (spec.rank, spec.split, spec.scaling) for path, spec in bundle.config.modules.items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (8, 8, 2.0),
        "model.layers.0.mlp.down_proj": (8, 2, 3 / 8),
        "model.layers.1.self_attn.q_proj": (4, 4, 2.0),
        "model.layers.1.mlp.down_proj": (4, 4, 3 / 4),
    }
    assert result.parameters == bundle.config.parameters - bundle.config.head_parameters
    assert all(torch.isfinite(tensor).all() for tensor in bundle.tensors.values())
