"""Training on a device that is not the CPU: each tensor is where the others are, and the results are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_samples import captioned_images, image_folder, image_settings
from jobs_samples import mixed_jobs, tensors_of, trained
from span_samples import marked
from test_text_tasks import label_sets, numbers
from torch import Tensor, nn
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer.loop import AdapterTrainer
from sera_serve.trainer.run import TrainingRun, TrainResult, build_task, train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TrainingTask
from sera_serve.trainer.together.jobs import train_jobs
from sera_serve.trainer.together.plan import Plan
from support.other_device import OTHER, TwoDevices, move, other_device
from support.places import PLACES, Place
from support.vision import random_clip, random_vit

PAIRS = [{"prompt": f"p{i % 7}", "completion": "abc" * (1 + i % 3)} for i in range(24)]
# By name: the base, the rows, and the options.
RUNS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "classify": ("decoder", lambda f: write_csv(f / "rows.csv", ending_rule(24)), {}),
    "classify, lora": ("encoder", lambda f: write_csv(f / "rows.csv", ending_rule(24)), {"method": "lora"}),
    "classify, head only": ("encoder", lambda f: write_csv(f / "r.csv", ending_rule(24)), {"method": "head-only"}),
    "classify, patience": (
        "encoder",
        lambda f: write_csv(f / "rows.csv", ending_rule(24)),
        {"patience": 1, "dropout": 0.1, "lora_plus_ratio": 4.0},
    ),
    "several labels": ("decoder", lambda f: write_jsonl(f / "rows.jsonl", label_sets(24)), {"multi_label": True}),
    "regress": ("encoder", lambda f: write_csv(f / "rows.csv", numbers(24)), {"task": "regress"}),
    "spans": ("encoder", lambda f: write_jsonl(f / "rows.jsonl", marked(24)), {"task": "token-classify"}),
    "generate": ("decoder", lambda f: write_jsonl(f / "rows.jsonl", PAIRS), {"task": "generate"}),
    "generate, packed": (
        "decoder",
        lambda f: write_jsonl(f / "rows.jsonl", PAIRS),
        {"task": "generate", "packing": True, "checkpoint_activations": True},
    ),
}


at_each_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each run of an adapter begin with what the first one drew: a GPU draws other numbers."""
    drawn: dict[str, dict[str, Tensor]] = {}

    def build(run: TrainingRun) -> TrainingTask:
        task = build_task(run)
        own = {name: tensor.clone() for name, tensor in task.model.stored_tensors().items()}
        task.model.load_stored_tensors(drawn.setdefault(run.settings.name, own))
        return task

    monkeypatch.setattr("sera_serve.trainer.run.build_task", build)


def train_twice(
    place: Place, make_base: Callable[[], FrozenBase], settings: TrainSettings
) -> list[tuple[TrainResult, Any]]:
    """Results and tensors of a run on the CPU and of one elsewhere."""
    if not place.draws_as_cpu:
        settings = settings.model_copy(update={"dropout": 0.0})
    found = []
    for device in ("cpu", place.device):
        base = make_base()
        own = settings.model_copy(update={"store": settings.store / str(len(found)), "device": device})
        if found:
            base = place.moved(base)
            with place.training(), pytest.MonkeyPatch.context() as patch:
                _check_batches(patch)
                result = train_adapter(own, base=base)
            assert all(place.has(parameter) for parameter in base.model.parameters())
        else:
            result = train_adapter(own, base=base)
        found.append((result, AdapterStore(own.store).load(result.digest).tensors))
    return found


def _check_batches(patch: pytest.MonkeyPatch) -> None:
    """A batch is made on the CPU: the loop pins its memory, which no tensor of a GPU can be."""
    original = AdapterTrainer.__init__

    def init(self: AdapterTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        collate = self.data_collator

        def checked(rows: Any) -> Any:
            batch = collate(rows)
            assert {tensor.device.type for tensor in batch.values()} == {"cpu"}
            return batch

        self.data_collator = checked

    patch.setattr(AdapterTrainer, "__init__", init)


def check_same(found: list[tuple[TrainResult, Any]]) -> None:
    (here, tensors), (there, others) = found
    assert here.metrics == pytest.approx(there.metrics, rel=1e-4)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@at_each_place
@pytest.mark.parametrize("name", RUNS)
def test_texts(name: str, place: Place, tiny_base: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    kind, rows, options = RUNS[name]
    folder = tiny_base if kind == "decoder" else tiny_encoder
    check_same(
        train_twice(place, lambda: load_base(str(folder)), settings_for(folder, tmp_path, rows(tmp_path), **options))
    )


@at_each_place
def test_rank_allocation(place: Place, tiny_base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    settings = settings_for(tiny_base, tmp_path, rows, task="generate", rank=8, split=2, budget=4.0)
    (here, _), (there, _) = train_twice(place, lambda: load_base(str(tiny_base)), settings)
    assert here.parameters == there.parameters
    # Of units of nearly equal importance, rounding chooses.
    assert here.metrics == pytest.approx(there.metrics, rel=1e-2)


@pytest.mark.slow
@at_each_place
def test_several_adapters_at_once(place: Place, tiny_base: Path, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", place.device):
        base, folder = load_base(str(tiny_base)), tmp_path / str(len(found))
        folder.mkdir()
        jobs = [job.model_copy(update={"device": device}) for job in mixed_jobs(folder)]
        if found:
            base = place.moved(base)
            with place.training():
                results = trained(train_jobs(Plan(jobs, 8), base=base))
        else:
            results = trained(train_jobs(Plan(jobs, 8), base=base))
        found.append(
            [
                (result["metrics"]["loss"], tensors_of(job.store, job.name))
                for job, result in zip(jobs, results, strict=True)
            ]
        )
    for job, (loss, tensors), (other_loss, others) in zip(jobs, *found, strict=True):
        if not job.dropout:
            assert loss == pytest.approx(other_loss, rel=1e-4)
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@at_each_place
def test_images(place: Place, tmp_path: Path) -> None:
    rows = image_folder(tmp_path / "rows", 12)
    check_same(train_twice(place, random_vit, image_settings(tmp_path, rows, epochs=2, augment=True)))


@pytest.mark.slow
@at_each_place
def test_captions(place: Place, tmp_path: Path) -> None:
    rows = captioned_images(tmp_path / "rows")
    # Images of one colour have equal captions. Which of the two matches is found first, rounding would say.
    header, *lines = rows.read_text(encoding="utf-8").splitlines()
    numbered = [f"{line} of {i}" for i, line in enumerate(lines)]
    rows.write_text("\n".join([header, *numbered]), encoding="utf-8")
    check_same(train_twice(place, random_clip, image_settings(tmp_path, rows, task="retrieve", epochs=2)))


def test_two_devices_are_noticed() -> None:
    layer = nn.Linear(4, 4)
    move(layer)
    with other_device():
        assert layer(torch.ones(2, 4).to(OTHER)).device == OTHER
        with pytest.raises(TwoDevices):
            layer(torch.ones(2, 4))
        with pytest.raises(TwoDevices):
            torch.ones(4)[torch.zeros(1, dtype=torch.long, device=OTHER)]
        assert torch.ones(4, device=OTHER)[torch.zeros(1, dtype=torch.long)].tolist() == [1.0]
