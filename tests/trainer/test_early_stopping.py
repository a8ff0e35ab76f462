"""Early stopping: when it ends a run, and that a resumed run ends at the same epoch with the same tensors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_samples import ending_rule, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer import loop
from sera_serve.trainer.loop import StopWithoutGain, evaluations_since_best
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings, load_options


class Stopped(RuntimeError):
    """Stands in for a kill."""


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def settings(folder: Path, **options: Any) -> TrainSettings:
    rows = write_csv(folder / "rows.csv", ending_rule(36))
    # A rate so high that the loss rises again.
    defaults = {"epochs": 12, "dropout": 0.3, "learning_rate": 0.3, "patience": 2, "checkpoint_seconds": 0}
    return settings_for(Path("tiny"), folder, rows, **(defaults | options))


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, dict[str, Any]]:
    """A run that ended early, and its record."""
    options = settings(tmp_path_factory.mktemp("undisturbed"))
    result = train_adapter(options, base=load_base(str(tiny_base)))
    return result, dict(AdapterStore(options.store).load(result.digest).config.training)


def test_a_run_ends_two_evaluations_after_its_best_epoch(undisturbed: tuple[TrainResult, dict[str, Any]]) -> None:
    result, record = undisturbed
    assert record["epochs"] == record["chosen_epoch"] + 2 < 12
    assert record["chosen_step"] == 4 * record["chosen_epoch"]
    assert [entry["epoch"] for entry in record["evaluations"]] == list(range(1, record["epochs"] + 1))
    best = record["evaluations"][record["chosen_epoch"] - 1]
    assert {name: best[name] for name in result.metrics} == result.metrics
    keys = [(-entry["accuracy"], entry["loss"]) for entry in record["evaluations"]]
    assert min(keys) == keys[record["chosen_epoch"] - 1]
    assert result.trained_tokens == record["trained_tokens"]
    assert result.trained_tokens % record["epochs"] == 0


def kill_at(base: FrozenBase, options: TrainSettings, step: int, moment: str) -> None:
    original = getattr(loop.SaveByTheClock, moment)

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            raise Stopped
        return original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.SaveByTheClock, moment, killed)
        with pytest.raises(Stopped):
            train_adapter(options, base=base)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["within an epoch", "before the last save", "after the last save"])
def test_a_killed_run_ends_as_an_undisturbed_one(
    base: FrozenBase, undisturbed: tuple[TrainResult, dict[str, Any]], tmp_path: Path, place: str
) -> None:
    expected, record = undisturbed
    last = 4 * record["epochs"]
    step, moment, resumed_from = {
        "within an epoch": (last - 3, "on_step_end", last - 4),
        "before the last save": (last, "on_step_end", last - 1),
        # No step may follow: the run had ended.
        "after the last save": (last, "on_save", last),
    }[place]
    options = settings(tmp_path)
    kill_at(base, options, step, moment)
    torch.manual_seed(4321)
    resumed = train_adapter(options, base=base)
    assert resumed.resumed_from == resumed_from
    assert resumed.digest == expected.digest
    assert resumed.metrics == expected.metrics


def state_of(losses: list[float], best: int | None) -> Any:
    history = [{"loss": 1.0, "step": 1}]
    history += [{"eval_loss": loss, "step": 10 * (i + 1)} for i, loss in enumerate(losses)]
    return SimpleNamespace(log_history=history, best_global_step=best)


def test_evaluations_are_counted_from_the_best_one() -> None:
    assert evaluations_since_best(state_of([], None)) == 0
    assert evaluations_since_best(state_of([3.0], 10)) == 0
    assert evaluations_since_best(state_of([3.0, 2.0, 4.0, 5.0], 20)) == 2
    control = SimpleNamespace(should_training_stop=False)
    StopWithoutGain(3).on_save(None, state_of([3.0, 2.0, 4.0, 5.0], 20), control)
    assert not control.should_training_stop
    StopWithoutGain(2).on_save(None, state_of([3.0, 2.0, 4.0, 5.0], 20), control)
    assert control.should_training_stop


@pytest.mark.parametrize(("name", "value"), [("patience", 1), ("select_by", "loss")])
def test_what_evaluations_decide_needs_some(name: str, value: Any) -> None:
    options = {"base": "embedded", "store": "s", "name": "acme/a", "task": "classify", "train": "t.csv", name: value}
    with pytest.raises(InvalidConfiguration, match=f"{flag(name)} needs evaluations; give --eval"):
        load_options(None, {**options, "eval_fraction": 0.0})
    assert getattr(load_options(None, options), name) == value
    assert getattr(load_options(None, {**options, "eval_fraction": 0.0, "eval": "e.csv"}), name) == value
    assert getattr(load_options(None, {**options, "eval_fraction": 0.0, "task": "image-classify"}), name) == value
