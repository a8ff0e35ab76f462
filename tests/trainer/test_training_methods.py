"""The methods by the names that people type: what trains, what the bundle says, and LoRA+."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_samples import ending_rule, save_tiny_base, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attach_layers, attached_layers, detach_adapter
from sera_serve.trainer.loop import parameter_groups
from sera_serve.trainer.methods import METHODS, Method
from sera_serve.trainer.patterns import shapes_by_path
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings, load_options

REQUIRED: dict[str, Any] = {"base": "tiny", "store": "s", "name": "acme/a", "task": "classify", "train": "rows.csv"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return load_base(str(save_tiny_base(tmp_path_factory.mktemp("base"))))


def run(base: FrozenBase, folder: Path, **options: Any) -> TrainResult:
    rows = write_csv(folder / "rows.csv", ending_rule(40))
    fixed = {"epochs": 1, "target_modules": "q_proj,v_proj", "rank": 8}
    if options.get("method") == "head-only":
        fixed = {"epochs": 1}
    return train_adapter(settings_for(Path("tiny"), folder, rows, **fixed, **options), base=base)


# q_proj is 32 -> 32 and v_proj 32 -> 16, in two layers.
@pytest.mark.parametrize(
    ("method", "stored", "parameters"),
    [
        ("sera", "sera", 2 * (64 + 48 + 2 * 64)),
        ("sera-freeze-a", "sera", 2 * (32 + 16 + 2 * 64)),
        ("sera-freeze-b", "sera", 2 * (32 + 32 + 2 * 64)),
        ("sera-c-only", "sera", 2 * 2 * 64),
        ("melora", "melora", 2 * (64 + 48)),
        ("moslora", "moslora", 2 * (8 * (64 + 48) + 2 * 64)),
        ("lora", "lora", 2 * 8 * (64 + 48)),
        ("lora-fa", "lora-fa", 2 * 8 * (32 + 16)),
        ("head-only", "head-only", 0),
    ],
)
def test_each_method_trains_its_factors(
    base: FrozenBase, tmp_path: Path, method: Method, stored: str, parameters: int
) -> None:
    result = run(base, tmp_path, method=method)
    assert result.parameters == parameters
    bundle = AdapterStore(tmp_path / "store").load(result.digest)
    assert bundle.config.method == stored
    assert bundle.config.training.get("method") == (method if method != stored else None)
    # Every adapter moves the base: with a frozen B of zeros, it would not.
    for path in bundle.config.modules:
        assert all(tensor.abs().sum() > 0 for name, tensor in bundle.tensors.items() if name.startswith(path))


def test_every_method_is_tested() -> None:
    (mark,) = test_each_method_trains_its_factors.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(METHODS)


def test_frozen_factors_keep_their_first_values(base: FrozenBase, tmp_path: Path) -> None:
    for method, still in (("sera-freeze-a", {"a"}), ("sera-freeze-b", {"b"}), ("sera-c-only", {"a", "b"})):
        folder = tmp_path / method
        folder.mkdir()
        slow = run(base, folder, method=method, learning_rate=1e-12)
        fast = run(base, folder, method=method, name="acme/fast")
        store = AdapterStore(folder / "store")
        before, after = store.load(slow.digest).tensors, store.load(fast.digest).tensors
        factors = {name: name.rpartition("sera_")[2] for name in before if "sera_" in name}
        for name, factor in factors.items():
            assert torch.equal(before[name], after[name]) == (factor in still), (method, name)


def test_a_frozen_variant_goes_on_as_itself(base: FrozenBase, tmp_path: Path) -> None:
    run(base, tmp_path, method="sera-c-only")
    rows = tmp_path / "rows.csv"
    options = {**REQUIRED, "store": tmp_path / "store", "train": rows, "init_from": "acme/tiny", "epochs": 1}
    result = train_adapter(TrainSettings(**options), base=base)
    assert result.parameters == 2 * 2 * 64
    config = AdapterStore(tmp_path / "store").load(result.digest).config
    assert (config.method, config.training["method"]) == ("sera", "sera-c-only")


def test_lora_plus_gives_b_its_own_rate(base: FrozenBase) -> None:
    settings = load_options(
        None, REQUIRED | {"rank": 8, "learning_rate": 0.01, "lora_plus_ratio": 16, "target_modules": "q_proj"}
    )
    attach_layers(base.model, shapes_by_path(settings, base.module_shapes()))
    try:
        layers = attached_layers(base.model).values()
        groups = parameter_groups(base.model, settings)
        assert [group["lr"] for group in groups] == [0.01, 0.16]
        assert {id(p) for p in groups[1]["params"]} == {id(layer.sera_b) for layer in layers}
        assert len(groups[0]["params"]) == 2 * len(layers)
        (plain,) = parameter_groups(base.model, settings.model_copy(update={"lora_plus_ratio": None}))
        assert len(plain["params"]) == 3 * len(layers)
    finally:
        detach_adapter(base.model)


@pytest.mark.parametrize("method", ["sera-freeze-b", "sera-c-only"])
def test_lora_plus_needs_a_b_that_trains(method: str) -> None:
    with pytest.raises(InvalidConfiguration, match="B does not train"):
        load_options(None, REQUIRED | {"method": method, "lora_plus_ratio": 4})
    with pytest.raises(InvalidConfiguration, match="--lora-plus-ratio has no meaning for method head-only"):
        load_options(None, REQUIRED | {"method": "head-only", "lora_plus_ratio": 4})
