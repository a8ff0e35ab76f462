"""Rank allocation: the schedule, the importance, the exact smaller layers, and what a run publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_samples import ending_rule, save_tiny_base, settings_for, write_csv
from transformers import TrainerState

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import SeraConfig, SeraLinear
from sera_serve.trainer.allocation import AllocateRanks, BudgetSchedule, RankAllocator, smaller_layer
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import load_options

REQUIRED: dict[str, Any] = {"base": "tiny", "store": "s", "name": "acme/a", "task": "classify", "train": "rows.csv"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return load_base(str(save_tiny_base(tmp_path_factory.mktemp("base"))))


def random_layer(rank: int, split: int, *, use_mixer: bool = True, seed: int = 0) -> SeraLinear:
    torch.manual_seed(seed)
    layer = SeraLinear(nn.Linear(24, 48), SeraConfig(rank, split, 6.0, "all-linear", use_mixer=use_mixer)).double()
    nn.init.normal_(layer.sera_b)
    return layer


def test_the_budget_falls_by_a_cubic() -> None:
    schedule = BudgetSchedule(first=100, last=20, warmup_steps=10, settled_step=50)
    assert [schedule.at(step) for step in (1, 10, 20, 30, 49, 50, 80)] == [
        100,
        100,
        20 + int(80 * 0.75**3),
        30,
        20,
        20,
        20,
    ]
    layers = {"one": random_layer(8, 2), "two": random_layer(8, 2)}
    made = RankAllocator(layers, 4).schedule(100, warmup=0.1, final=0.5)
    assert made == BudgetSchedule(first=16, last=8, warmup_steps=10, settled_step=50)
    # A run of one step ends at the budget too.
    assert RankAllocator(layers, 4).schedule(1, warmup=0.1, final=0.5).at(1) == 8


def test_importance_is_smoothed_sensitivity_times_its_deviation() -> None:
    layer = random_layer(4, 2)
    allocator = RankAllocator({"one": layer}, 2)
    smoothed = {name: torch.zeros_like(p) for name, p in layer.named_parameters() if name.startswith("sera")}
    deviation = {name: torch.zeros_like(tensor) for name, tensor in smoothed.items()}
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        layer.zero_grad()
        layer(torch.randn(5, 24, dtype=torch.float64)).square().sum().backward()
        allocator.observe()
        for name, parameter in layer.named_parameters():
            if name in smoothed and parameter.grad is not None:
                seen = (parameter * parameter.grad).abs().detach()
                smoothed[name] = 0.85 * smoothed[name] + 0.15 * seen
                deviation[name] = 0.85 * deviation[name] + 0.15 * (seen - smoothed[name]).abs()
    score = {name: smoothed[name] * deviation[name] for name in smoothed}
    # split 2, segments of rank 2: unit 0 has the indices 0 and 2 of C, unit 1 has 1 and 3.
    want = []
    for unit, indices in enumerate(([0, 2], [1, 3])):
        c = (score["sera_c"][indices].mean() + score["sera_c"][:, indices].mean()) / 2
        want.append(score["sera_a"][:, unit].mean() + score["sera_b"][unit].mean() + c)
    torch.testing.assert_close(allocator.importance("one"), torch.stack(want).float())


def test_the_most_important_units_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"one": random_layer(8, 2), "two": random_layer(6, 3), "three": random_layer(4, 4)}
    allocator = RankAllocator(layers, 2)
    scores = {"one": [0.1, 0.9, 0.5, 0.5], "two": [0.2, 0.8], "three": [0.7]}
    monkeypatch.setattr(allocator, "importance", lambda path: torch.tensor(scores[path]))
    allocator.choose(7)
    # 2 for 0.9, 3 for 0.8; 4 for 0.7 no longer fit; 2 for the first 0.5.
    assert {path: kept.tolist() for path, kept in allocator.kept.items()} == {
        "one": [False, True, True, False],
        "two": [False, True],
        "three": [False],
    }


@pytest.mark.parametrize("use_mixer", [True, False])
def test_a_masked_unit_comes_back_when_it_matters(use_mixer: bool) -> None:
    """For 150 steps the loss depends on one layer alone, and then on the other one alone."""
    layers = {name: random_layer(4, 1, use_mixer=use_mixer) for name in ("one", "two")}
    allocation = AllocateRanks(RankAllocator(layers, 2), warmup=0.02, final=0.1)
    optimiser = torch.optim.AdamW([p for layer in layers.values() for p in layer.parameters() if p.requires_grad], 1e-2)
    state = TrainerState(max_steps=300)
    allocation.on_train_begin(None, state, None)
    torch.manual_seed(0)
    target = torch.randn(24, 48, dtype=torch.float64)
    kept = []
    for step in range(300):
        x = torch.randn(16, 24, dtype=torch.float64)
        outputs = {name: layer(x) for name, layer in layers.items()}
        used, other = ("one", "two") if step < 150 else ("two", "one")
        optimiser.zero_grad()
        ((outputs[used] - x @ target).square().mean() + 0 * outputs[other].sum()).backward()
        allocation.on_pre_optimizer_step(None, state, None)
        optimiser.step()
        allocation.on_optimizer_step(None, state, None)
        state.global_step += 1
        kept.append({name: int(units.sum()) for name, units in allocation.allocator.kept.items()})
    assert kept[149] == {"one": 4, "two": 0}
    assert kept[-1] == {"one": 0, "two": 4}


@pytest.mark.parametrize(("epochs", "is_noted"), [(1, True), (4, False)])
def test_ranks_that_are_settled_after_a_few_steps_are_told(
    base: FrozenBase, tmp_path: Path, epochs: int, is_noted: bool
) -> None:
    result = run(base, tmp_path, epochs=epochs, batch_size=32)
    # 54 rows by 32: 2 steps an epoch.
    told = "the ranks are settled at step 1 of 2, when their importance says little yet" in " ".join(result.notes)
    assert told == is_noted


@pytest.mark.parametrize("use_mixer", [True, False])
@pytest.mark.parametrize(("rank", "split"), [(8, 2), (12, 4), (6, 1), (8, 8)])
def test_the_smaller_layer_computes_what_the_masked_one_does(rank: int, split: int, use_mixer: bool) -> None:
    layer = random_layer(rank, split, use_mixer=use_mixer)
    allocator = RankAllocator({"one": layer, "two": random_layer(rank, split)}, rank / 2)
    kept = torch.arange(rank // split) % 2 == 0
    allocator.kept["one"] = kept
    x = torch.randn(7, 24, dtype=torch.float64)
    before = layer(x)
    allocator.mask()
    masked = layer(x)
    small = smaller_layer(layer, kept).double()
    assert (small.config.rank, small.config.split, small.config.scaling) == (
        split * int(kept.sum()),
        split,
        layer.config.scaling,
    )
    torch.testing.assert_close(small(x), masked, rtol=1e-13, atol=1e-13)
    if not kept.all():
        assert not torch.allclose(before, masked)


def run(base: FrozenBase, folder: Path, **options: Any) -> TrainResult:
    rows = write_csv(folder / "rows.csv", ending_rule(60))
    fixed: dict[str, Any] = {"epochs": 4, "rank": 8, "budget": 4, "target_modules": "q_proj,v_proj,down_proj"}
    return train_adapter(settings_for(Path("tiny"), folder, rows, **(fixed | options)), base=base)


@pytest.mark.parametrize("options", [{}, {"method": "melora"}, {"method": "lora"}, {"method": "sera-freeze-a"}])
def test_the_published_ranks_meet_the_budget(base: FrozenBase, tmp_path: Path, options: dict[str, Any]) -> None:
    result = run(base, tmp_path, **options)
    bundle = AdapterStore(tmp_path / "store").load(result.digest)
    split = 1 if options.get("method") == "lora" else 4
    ranks = {path: spec.rank for path, spec in bundle.config.modules.items()}
    assert sum(ranks.values()) == 4 * 6
    assert all(rank % split == 0 and bundle.config.modules[path].split == split for path, rank in ranks.items())
    assert all(spec.scaling == 2.0 for spec in bundle.config.modules.values())
    # Nothing of what was masked is left.
    for path, spec in bundle.config.modules.items():
        assert bundle.tensors[f"{path}.sera_a"].shape == (spec.d_in, spec.segment_rank)
        assert bundle.tensors[f"{path}.sera_b"].abs().sum(1).min() > 0
    if options.get("method") != "sera-freeze-a":
        assert result.parameters == bundle.config.parameters - bundle.config.head_parameters
    # The best epoch is one with the last ranks: 7 steps an epoch, settled at step 14.
    assert int(str(bundle.config.training["chosen_step"])) >= 14


def test_the_metrics_are_those_of_the_published_adapter(base: FrozenBase, tmp_path: Path) -> None:
    result = run(base, tmp_path)
    rows = tmp_path / "rows.csv"
    options: dict[str, Any] = {**REQUIRED, "store": tmp_path / "store", "train": rows, "test": rows, "epochs": 1}
    still = load_options(None, options | {"init_from": "acme/tiny", "learning_rate": 1e-12})
    again = train_adapter(still, base=base)
    assert again.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "budget": 8}, "--budget 8 is not below the mean rank 8"),
        ({"rank": 8, "split": 8, "budget": 1}, "leaves a total rank of 6 to 6 layers, and a unit has 8"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(
    base: FrozenBase, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        run(base, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "--budget 0"),
        ({"budget_final": 0.3}, "--budget-final belongs to --budget"),
        ({"budget": 4, "budget_warmup": 0.5, "budget_final": 0.5}, "leave no step between them"),
        ({"method": "head-only", "budget": 4}, "--budget has no meaning for method head-only"),
        ({"rank": 9, "budget": 4}, "split 1 of rank 9 does not belong to this method"),
        ({"rank": 9, "budget": 4}, "greatest common divisor of the rank and --budget 4: give --split"),
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        load_options(None, REQUIRED | options)
