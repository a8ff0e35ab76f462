"""The learning rate of each step: none is 0, short runs train, and results of another schedule are not added to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_compare_plan import plan_of
from trainer_samples import ending_rule, settings_for, write_csv
from transformers import TrainerCallback

from adapters_store import AdapterStore
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.compare.plan import ComparePlan
from sera_serve.trainer.compare.results import ResultsFile
from sera_serve.trainer.compare.runner import CompareRunner
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.schedule import rate_factors, warmup_steps


class Rates(TrainerCallback):  # type: ignore[misc]
    """Keeps the rates of each group at each step."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.found.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize(
    ("steps", "factors"), [(1, [1.0]), (2, [1.0, 1 / 2]), (3, [1.0, 2 / 3, 1 / 3])], ids=lambda value: str(value)[:4]
)
def test_the_rates_of_a_short_run(tiny_base: Path, tmp_path: Path, steps: int, factors: list[float]) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(8))
    settings = settings_for(
        tiny_base, tmp_path, rows, epochs=steps, eval_fraction=0, learning_rate=0.01, head_learning_rate=0.04
    )
    rates = Rates()
    result = train_adapter(settings, callbacks=[rates])
    assert rates.found == [pytest.approx([0.01 * factor, 0.04 * factor]) for factor in factors]
    bundle = AdapterStore(settings.store).load(result.digest)
    moved = [name for name, tensor in bundle.tensors.items() if name.endswith("sera_b") and tensor.any()]
    assert moved == [name for name in bundle.tensors if name.endswith("sera_b")]
    # The bias starts at zero.
    assert bundle.tensors["head.bias"].any()


def test_the_rates_of_a_hundred_steps() -> None:
    factor = rate_factors(0.06, 100)
    rising = [factor(step) for step in range(7)]
    assert rising == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0])
    falling = [factor(step) for step in range(6, 101)]
    assert falling == pytest.approx([1 - i / 94 for i in range(95)])
    assert factor(99) > 0 == factor(100)


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.06, 16, 0), (0.29, 100, 29), (0.07, 100, 7), (0.999, 1, 0), (0.999999, 3, 2)]
)
def test_the_steps_of_the_warm_up_are_whole_ones(ratio: float, steps: int, warmup: int) -> None:
    assert warmup_steps(ratio, steps) == warmup


def test_a_comparison_adds_nothing_to_results_of_another_schedule(tmp_path: Path) -> None:
    plan = ComparePlan.model_validate(plan_of())
    (cell, seed), *_ = plan.ordered()
    spec = plan.spec(cell, seed, cell.variant.learning_rate, "score")
    path = tmp_path / "r.jsonl"
    old = {"run": spec.digest, "purpose": "score", "score": 0.5, "metrics": {"loss": 1.0}}
    path.write_text(json.dumps(old) + "\n")
    runner = CompareRunner(plan, ResultsFile(path), Console(quiet=True), python="/no/python")
    # They can still be shown.
    assert runner.results.records == {spec.digest: old}
    with pytest.raises(
        InvalidConfiguration, match=r"r.jsonl has results \(1\) of another schedule .* give another --results"
    ):
        runner.run()


def test_the_schedule_is_a_part_of_what_a_run_is(tiny_base: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_base, tmp_path, tmp_path / "rows.csv")
    assert settings.identity()["schedule"] == "linear-above-zero"
