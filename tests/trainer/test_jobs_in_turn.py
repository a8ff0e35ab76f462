"""Plans whose jobs end one by one, are killed, or stand on an encoder: whole trainings, which take longer."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from jobs_samples import alone, mixed_jobs, trained
from rich.console import Console
from safetensors import SafetensorError
from trainer_samples import ending_rule, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer import checkpoint
from sera_serve.trainer.loop import AdapterTrainer
from sera_serve.trainer.together.jobs import train_jobs
from sera_serve.trainer.together.plan import Plan

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


@pytest.fixture
def encoder(tiny_encoder: Path) -> FrozenBase:
    return load_base(str(tiny_encoder))


class Stopped(BaseException):
    """Stands in for a kill."""


def test_jobs_end_and_begin_one_by_one(base: FrozenBase, tmp_path: Path) -> None:
    jobs = mixed_jobs(tmp_path)
    expected = [result.metrics for result in alone(jobs, base, tmp_path)]
    results = trained(train_jobs(Plan(jobs, 2), base=base))
    assert [result["metrics"] for result in results] == [pytest.approx(want, rel=1e-3, abs=1e-4) for want in expected]
    assert not list((tmp_path / "store.training").glob("**/*"))


def test_a_killed_plan_goes_on(base: FrozenBase, tmp_path: Path) -> None:
    jobs = [j.model_copy(update={"epochs": 1 + 2 * i}) for i, j in enumerate(mixed_jobs(tmp_path, seconds=0)) if i != 2]
    expected = trained(train_jobs(Plan(jobs, 8), base=base))
    for job in jobs:
        AdapterStore(job.store).delete(job.name)
    with pytest.MonkeyPatch.context() as patch:
        original = AdapterTrainer.training_step

        def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.settings.name == jobs[2].name and self.state.global_step == 8:
                raise Stopped
            return original(self, *arguments, **options)

        patch.setattr(AdapterTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train_jobs(Plan(jobs, 8), base=base)
    results = train_jobs(Plan(jobs, 8), base=base)
    assert [result.status for result in results] == ["published earlier", "trained", "trained"]
    assert [(result.result or {}).get("resumed_from") for result in results[1:]] == [8, 8]
    for result, want in zip(results, expected, strict=True):
        assert (result.result or {})["metrics"] == pytest.approx(want["metrics"], rel=1e-3, abs=1e-4)


def test_a_job_whose_checkpoints_the_disk_refuses_fails_alone(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs(tmp_path)[:2]
    original = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "sera" in str(path):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    failed, whole = train_jobs(Plan(jobs, 2), base=base)
    assert (failed.status, whole.status) == ("failed", "trained")
    assert failed.error is not None
    assert failed.error["code"] == "checkpoint_not_written"
    assert "No space left on device" in failed.error["message"]


def test_classifiers_on_an_encoder(encoder: FrozenBase, tmp_path: Path) -> None:
    jobs = [job for job in mixed_jobs(tmp_path) if job.task == "classify"]
    expected = [result.metrics for result in alone(jobs, encoder, tmp_path)]
    results = trained(train_jobs(Plan(jobs, 8), base=encoder))
    assert [result["metrics"] for result in results] == [pytest.approx(want, rel=1e-3, abs=1e-4) for want in expected]


def test_numbers_and_pairs_on_an_encoder(encoder: FrozenBase, tmp_path: Path) -> None:
    numbers = write_csv(tmp_path / "numbers.csv", [[text, str(len(text) / 10)] for text, _ in ending_rule(24)])
    pairs = write_csv(tmp_path / "pairs.csv", [[t, "cat", y] for t, y in ending_rule(24)], ("text", "other", "label"))
    jobs = [
        settings_for(Path("tiny"), tmp_path, numbers, name="acme/length", task="regress"),
        settings_for(Path("tiny"), tmp_path, pairs, name="acme/pairs", text_pair_column="other", batch_size=6),
    ]
    expected = [result.metrics for result in alone(jobs, encoder, tmp_path)]
    results = trained(train_jobs(Plan(jobs, 8), base=encoder))
    for got, want in zip(results, expected, strict=True):
        assert got["metrics"]["loss"] == pytest.approx(want["loss"], rel=1e-3)


def test_progress_names_the_job(base: FrozenBase, tmp_path: Path) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=200)
    train_jobs(Plan(mixed_jobs(tmp_path)[:2], 8), base=base, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for line in ("acme/sera: epoch 2 of 2: loss", "acme/lora: epoch 3 of 3: loss", "acme/lora: version 1 is published"):
        assert line in shown
