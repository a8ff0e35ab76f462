"""Methods of other libraries in our loop: what trains, what stays frozen, and one head for all."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import peft
import pytest
import torch
from image_samples import captioned_images, image_folder
from torch import nn
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl
from transformers import TrainerCallback

from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.baselines import (
    BASELINES,
    NEED_ADAPTERS,
    WITH_LORA_B,
    Baseline,
    BaselineShape,
    MissingLibrary,
    install_baseline,
    same_head,
)
from sera_serve.trainer.compare.one_run import train_one
from sera_serve.trainer.loop import parameter_groups
from sera_serve.trainer.run import TrainingRun, build_task, train_adapter, with_run
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TASKS, TrainingTask
from sera_serve.trainer.tasks.classify import ClassifyTask
from support.vision import random_clip, random_vit

HERE = tuple(name for name in BASELINES if name not in NEED_ADAPTERS)
HIDDEN, LAYERS, ADAPTED = 32, 2, 4


@pytest.fixture
def settings(tiny_encoder: Path, tmp_path: Path) -> TrainSettings:
    train = write_csv(tmp_path / "train.csv", ending_rule(48))
    return settings_for(
        tiny_encoder, tmp_path, train, method="lora", rank=4, epochs=2, target_modules="query,value", batch_size=8
    )


def task_of(settings: TrainSettings) -> tuple[FrozenBase, TrainingTask]:
    """A task over a fresh base."""
    base = load_base(settings.base)
    return base, TASKS["classify"].build(settings, base, TASKS["classify"].load(settings, None), 64)


def expected_parameters(method: Baseline, base: FrozenBase) -> int:
    """Count by hand: two layers with a query and a value of 32 x 32 each."""
    return {
        "peft-lora": ADAPTED * 4 * 2 * HIDDEN,
        "dora": ADAPTED * (4 * 2 * HIDDEN + HIDDEN),
        # B has two blocks: half of its parameters.
        "bd-lora": ADAPTED * 4 * (HIDDEN + HIDDEN // 2),
        "vera": ADAPTED * (4 + HIDDEN),
        # It starts with one and a half times the rank, and has a singular value for each.
        "adalora": ADAPTED * 6 * (2 * HIDDEN + 1),
        "full": sum(p.numel() for n, p in base.model.named_parameters() if not n.startswith("pooler.")),
    }[method]


@pytest.mark.parametrize("method", HERE)
def test_a_baseline_trains_its_own_parameters_and_the_head(settings: TrainSettings, method: Baseline) -> None:
    base, task = task_of(settings)
    callbacks = install_baseline(task, settings, BaselineShape(method, rank=4, blocks=2))
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    own = sum(p.numel() for name, p in trained.items() if not name.startswith("head."))
    assert own == expected_parameters(method, base)
    assert {"head.weight", "head.bias"} <= set(trained)
    assert set(task.model.stored_tensors()) == set(trained)
    assert [type(callback).__name__ for callback in callbacks] == ["_AllocatesRanks"] * (method == "adalora")


@pytest.mark.parametrize("method", WITH_LORA_B)
def test_b_of_lora_has_the_rate_of_lora_plus(settings: TrainSettings, method: Baseline) -> None:
    fast = settings.model_copy(update={"lora_plus_ratio": 16.0, "learning_rate": 0.01})
    _, task = task_of(fast)
    install_baseline(task, fast, BaselineShape(method, rank=4, blocks=2))
    rates = {id(p): group["lr"] for group in parameter_groups(task.model, fast) for p in group["params"]}
    found = {name: rates[id(p)] for name, p in task.model.named_parameters() if p.requires_grad}
    assert len([name for name in found if "lora_B" in name]) == ADAPTED
    assert found == {name: pytest.approx(0.16 if "lora_B" in name else 0.01) for name in found}


@pytest.mark.parametrize("method", HERE)
def test_a_baseline_learns_in_our_loop_and_leaves_the_base(settings: TrainSettings, method: Baseline) -> None:
    rate = 3e-3 if method == "full" else 3e-2
    options = settings.model_copy(update={"learning_rate": rate, "epochs": 6}).model_dump(
        mode="json", exclude_unset=True, exclude={"store", "name"}
    )
    options |= {"pooling": "mean"}
    result = train_one({"settings": options, "baseline": {"method": method, "rank": 4, "blocks": 2}, "test_rows": None})
    assert "error" not in result, result
    assert result["metrics"]["loss"] < math.log(2) - 0.05
    assert result["steps"] == 6 * 6
    assert result["step_ms"] > 0
    assert result["peak_memory_mb"] > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_fine_tuning_is_refused_where_small_steps_change_no_weight(settings: TrainSettings, dtype: str) -> None:
    options = settings.model_copy(update={"dtype": dtype}).model_dump(
        mode="json", exclude_unset=True, exclude={"store", "name"}
    )
    result = train_one({"settings": options, "baseline": {"method": "full"}, "test_rows": None})
    assert f"would train weights in {dtype}, in which" in result["error"]
    assert result["error"].endswith("give the method dtype: float32")


@pytest.mark.parametrize("method", ["full", "vera"])
@pytest.mark.parametrize("task", ["regress", "token-classify", "multi-label"])
def test_a_baseline_trains_every_task_on_texts(
    settings: TrainSettings, tmp_path: Path, task: str, method: Baseline
) -> None:
    texts = [text for text, _ in ending_rule(48)]
    rows: list[dict[str, Any]] = {
        "regress": [{"text": text, "label": len(text)} for text in texts],
        "token-classify": [{"text": text, "spans": [{"start": 0, "end": 1, "label": "first"}]} for text in texts],
        "multi-label": [{"text": text, "label": ["long"] if len(text) > 12 else []} for text in texts],
    }[task]
    train = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = settings.model_copy(update={"train": train, "epochs": 1, "learning_rate": 1e-3}).model_dump(
        mode="json", exclude_unset=True, exclude={"store", "name", "task"}
    )
    options |= {"task": "classify", "multi_label": True} if task == "multi-label" else {"task": task}
    result = train_one({"settings": options, "baseline": {"method": method, "rank": 4}, "test_rows": None})
    assert "error" not in result, result
    assert math.isfinite(result["metrics"]["loss"])


@pytest.mark.parametrize("method", ["full", "peft-lora"])
@pytest.mark.parametrize(
    ("base_of", "task"), [(random_vit, "image-classify"), (random_clip, "image-classify"), (random_clip, "retrieve")]
)
def test_a_baseline_trains_what_images_pass(
    tmp_path: Path, base_of: Callable[[], FrozenBase], task: str, method: Baseline
) -> None:
    rows = captioned_images(tmp_path / "rows") if task == "retrieve" else image_folder(tmp_path / "rows")
    options: dict[str, Any] = {"method": "lora", "rank": 4, "target_modules": "q_proj,v_proj", "task": task}
    settings = TrainSettings(base="-", store=tmp_path / "store", name="a/b", train=rows, **options)

    def check(run: TrainingRun) -> None:
        built = build_task(dataclasses.replace(run, baseline=True))
        install_baseline(built, settings, BaselineShape(method, rank=4, blocks=2))
        model = built.model.train()
        model(**built.collate([built.train_rows[i] for i in range(8)]))["loss"].backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained and not [name for name, p in trained.items() if p.grad is None]

    with_run(settings, check, base=base_of())


@pytest.mark.parametrize("method", HERE)
def test_a_step_changes_nothing_but_what_trains(settings: TrainSettings, method: Baseline) -> None:
    base, task = task_of(settings)
    install_baseline(task, settings, BaselineShape(method, rank=4, blocks=2))
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in task.model.named_parameters()}
    model = task.model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # The second step reaches what the first could not, behind factors that begin at zero.
    for _ in range(2):
        model(**task.collate(task.train_rows[:8]))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, after in model.named_parameters():
        trains, value = before[name]
        assert torch.equal(after, value) != trains, name
    assert not base.model.training


def dropouts_of(model: nn.Module, p: float) -> list[nn.Dropout]:
    """Those with this probability, which the base's own dropout does not have."""
    return [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p == p]


@pytest.mark.parametrize("method", [method for method in HERE if method != "full"])
def test_the_dropout_of_a_baseline_is_on_while_it_trains(settings: TrainSettings, method: Baseline) -> None:
    options = settings.model_copy(update={"dropout": 0.37})
    base, task = task_of(options)
    install_baseline(task, options, BaselineShape(method, rank=4, blocks=2))
    added = dropouts_of(base.model, 0.37)
    assert len(added) == ADAPTED
    own = [module for module in base.model.modules() if isinstance(module, nn.Dropout) and module not in added]
    assert own
    for mode in (True, False):
        task.model.train(mode)
        assert {module.training for module in added} == {mode}
        assert {module.training for module in own} == {False}


class FakeAdapters(ModuleType):
    """Stands in for the library `adapters`: a bottleneck is its dropout alone."""

    def __init__(self) -> None:
        super().__init__("adapters")
        self.DoubleSeqBnConfig = self.SeqBnConfig = SimpleNamespace

    def init(self, base: Any) -> None:
        def add_adapter(name: str, config: SimpleNamespace) -> None:
            base.bottleneck = nn.Sequential(nn.Dropout(config.dropout))

        base.add_adapter, base.train_adapter = add_adapter, lambda name: None


@pytest.mark.parametrize("method", NEED_ADAPTERS)
def test_the_dropout_of_bottlenecks_is_on_while_they_train(
    settings: TrainSettings, method: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "adapters", FakeAdapters())
    options = settings.model_copy(update={"dropout": 0.37})
    base, task = task_of(options)
    install_baseline(task, options, BaselineShape(method))
    (added,) = dropouts_of(base.model, 0.37)
    for mode in (True, False):
        task.model.train(mode)
        assert added.training == mode


def test_adalora_adds_its_term_and_moves_its_budget(settings: TrainSettings) -> None:
    _, task = task_of(settings)
    plain = task.model(**task.collate(task.train_rows[:8]))["loss"]
    (callback,) = install_baseline(task, settings, BaselineShape("adalora", rank=4))
    assert task.model(**task.collate(task.train_rows[:8]))["loss"] > plain
    model = task.model
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    @dataclasses.dataclass
    class State:
        global_step: int

    for step in range(1, 13):
        model(**task.collate(task.train_rows[:8]))["loss"].backward()
        optimiser.step()
        callback.on_optimizer_step(None, State(step), None)
        optimiser.zero_grad()
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    # Four layers began with six singular values each; the target is four a layer.
    assert sum(int((p != 0).sum()) for p in values) == 4 * ADAPTED


def test_an_epoch_above_the_budget_of_adalora_is_not_the_best(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.7])
    monkeypatch.setattr(ClassifyTask, "evaluate", lambda task, rows: {"loss": 1.0, "accuracy": next(scores)})
    best: list[int] = []

    class Seen(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            best.append(state.best_global_step)

    def prepare(task: TrainingTask, settings: TrainSettings) -> list[TrainerCallback]:
        return install_baseline(task, settings, BaselineShape("adalora", rank=4))

    train_adapter(settings.model_copy(update={"epochs": 4}), callbacks=[Seen()], prepare=prepare, baseline=True)
    # Of 24 steps the last 7 have the last ranks.
    assert best == [18]


@pytest.mark.parametrize("method", ["sera", "lora", *HERE])
def test_every_method_starts_from_the_same_head(settings: TrainSettings, method: Any) -> None:
    heads = []
    for _ in range(2):
        _, task = task_of(settings)
        if method in get_args(Baseline):
            install_baseline(task, settings, BaselineShape(method, rank=4, blocks=2))
        torch.rand(len(heads) + 1)
        same_head(task.model, 5)
        assert task.model.head is not None
        heads.append(task.model.head.weight.detach().clone())
    expected = torch.empty(2, HIDDEN).normal_(std=0.02, generator=torch.Generator().manual_seed(5))
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], expected)


def test_a_shape_that_the_library_refuses_is_a_typed_error(settings: TrainSettings) -> None:
    _, task = task_of(settings)
    with pytest.raises(InvalidConfiguration, match="PEFT cannot add bd-lora of rank 4"):
        install_baseline(task, settings, BaselineShape("bd-lora", rank=4, blocks=3))


def test_an_old_library_is_a_typed_error(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft, "BdLoraConfig")
    _, task = task_of(settings)
    with pytest.raises(MissingLibrary, match=r"bd-lora needs PEFT 0\.19 or newer, not .*; pip install --upgrade peft"):
        install_baseline(task, settings, BaselineShape("bd-lora", rank=4, blocks=2))


def test_bottleneck_adapters_name_the_environment_that_they_need(settings: TrainSettings) -> None:
    _, task = task_of(settings)
    with pytest.raises(MissingLibrary, match=r"needs the library adapters .*--adapters-python"):
        install_baseline(task, settings, BaselineShape("houlsby"))


def test_a_failed_run_gives_its_message(settings: TrainSettings) -> None:
    options = settings.model_dump(mode="json", exclude_unset=True, exclude={"store", "name"}) | {"train": "no.csv"}
    result = train_one({"settings": options, "baseline": None, "test_rows": None})
    assert set(result) == {"error"}
    assert "no.csv" in result["error"]


def test_the_test_rows_are_the_same_for_all_runs(settings: TrainSettings) -> None:
    options = settings.model_dump(mode="json", exclude_unset=True, exclude={"store", "name"})
    options |= {"test": options["train"], "epochs": 1, "method": "head-only"}
    for name in ("rank", "target_modules"):
        options.pop(name)
    scores = [
        train_one({"settings": options | {"seed": 0}, "baseline": None, "test_rows": count})["metrics"]["test_loss"]
        for count in (8, 8, None)
    ]
    assert scores[0] == scores[1] != scores[2]
