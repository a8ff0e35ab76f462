"""Several adapters trained over one base in one process are those of runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_samples import alone, mixed_jobs, tensors_of, trained
from trainer_samples import ending_rule, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer.loop import AdapterTrainer
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.together import jobs as together_jobs
from sera_serve.trainer.together.jobs import train_jobs
from sera_serve.trainer.together.plan import Plan
from sera_serve.trainer.together.records import PublishedJobs
from sera_serve.trainer.together.shared_pass import SharedPass


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


@pytest.fixture
def encoder(tiny_encoder: Path) -> FrozenBase:
    return load_base(str(tiny_encoder))


class Watch:
    """Notes the losses of each run by the name of its adapter."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        losses = self.losses
        log = AdapterTrainer.log

        def noting(self: Any, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if "loss" in logs:
                losses.setdefault(self.settings.name, []).append(logs["loss"])
            log(self, logs, *arguments, **options)

        monkeypatch.setattr(AdapterTrainer, "log", noting)


@pytest.mark.slow
def test_jobs_of_all_kinds_are_those_of_runs_of_their_own(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs(tmp_path)
    separate, together = Watch(), Watch()
    with monkeypatch.context() as patch:
        separate.install(patch)
        expected = alone(jobs, base, tmp_path)
    with monkeypatch.context() as patch:
        together.install(patch)
        results = trained(train_jobs(Plan(jobs, 8), base=base))
    for job, want, got in zip(jobs, expected, results, strict=True):
        assert together.losses[job.name] == pytest.approx(separate.losses[job.name], rel=1e-4, abs=1e-5)
        assert got["metrics"] == pytest.approx(want.metrics, rel=1e-3, abs=1e-4)
        assert (got["parameters"], got["trained_tokens"]) == (want.parameters, want.trained_tokens)
        ours, theirs = tensors_of(job.store, job.name), tensors_of(tmp_path / "alone", job.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-3)
    # A head on states of the frozen base has no pass to share.
    assert results[2]["digest"] == expected[2].digest


def poison(patch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Let the factors of one job become NaN before a step."""
    original = AdapterTrainer.training_step

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.settings.name == name and self.state.global_step == step:
            for tensor in self.task.model.stored_tensors().values():
                tensor.fill_(float("nan"))
        return original(self, *arguments, **options)

    patch.setattr(AdapterTrainer, "training_step", poisoned)


def test_a_job_that_fails_ends_alone(base: FrozenBase, tmp_path: Path) -> None:
    jobs = mixed_jobs(tmp_path)
    diverging = jobs[1].model_copy(
        update={"learning_rate": 10.0, "epochs": 40, "weight_decay": 1.0, "name": "acme/nan"}
    )
    missing = jobs[0].model_copy(update={"train": tmp_path / "none.csv", "name": "acme/none"})
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, "acme/nan", step=3)
        results = train_jobs(Plan([diverging, jobs[0], missing, jobs[3]], 8), base=base)
    assert [result.status for result in results] == ["failed", "trained", "failed", "trained"]
    assert (results[0].error or {})["type"] == "TrainingFailed"
    assert "lower --learning-rate" in (results[0].error or {})["message"]
    assert "none.csv" in (results[2].error or {})["message"]
    (want,) = alone([jobs[0]], base, tmp_path)
    assert (results[1].result or {})["metrics"] == pytest.approx(want.metrics, rel=1e-3, abs=1e-4)
    # The plan started again trains the failed jobs alone.
    again = train_jobs(Plan([jobs[0], jobs[1], jobs[3]], 8), base=base)
    assert [result.status for result in again] == ["published earlier", "trained", "published earlier"]
    assert (again[0].result or {})["digest"] == (results[1].result or {})["digest"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_pass_that_fails_ends_the_jobs_that_are_in_it_alone(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    original = getattr(SharedPass, direction)
    passes = 0

    def failing(self: SharedPass, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return original(self, *arguments)

    monkeypatch.setattr(SharedPass, direction, failing)
    first, second, _, third = mixed_jobs(tmp_path)
    results = train_jobs(Plan([first, second, third], 2), base=base)
    assert [result.status for result in results] == ["failed", "failed", "trained"]
    assert [(result.error or {})["message"] for result in results[:2]] == ["no memory is left"] * 2


def test_a_job_whose_adapter_was_deleted_is_trained_again(base: FrozenBase, tmp_path: Path) -> None:
    jobs = mixed_jobs(tmp_path)[:2]
    # With a job that fails, the plan remembers what it has published.
    missing = jobs[0].model_copy(update={"train": tmp_path / "none.csv", "name": "acme/none"})
    assert [result.status for result in train_jobs(Plan([*jobs, missing], 8), base=base)][:2] == ["trained"] * 2
    AdapterStore(jobs[0].store).delete(jobs[0].name)
    again = train_jobs(Plan([*jobs, missing], 8), base=base)
    assert [result.status for result in again] == ["trained", "published earlier", "failed"]
    assert AdapterStore(jobs[0].store).resolve(jobs[0].name).digest == (again[0].result or {})["digest"]


def test_an_error_of_the_system_without_a_file_is_told_without_one(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(settings: TrainSettings, **options: Any) -> None:
        raise OSError("the connection was lost")

    monkeypatch.setattr(together_jobs, "train_adapter", unreachable)
    (failed,) = train_jobs(Plan(mixed_jobs(tmp_path)[:1], 1), base=base)
    assert failed.error == {
        "type": "OSError",
        "message": "the connection was lost",
        "param": None,
        "code": "os_error",
    }


def test_a_folder_that_the_user_has_made_stays(base: FrozenBase, tmp_path: Path) -> None:
    work = tmp_path / "scratch"
    work.mkdir()
    (done,) = train_jobs(Plan([mixed_jobs(tmp_path)[0].model_copy(update={"work_dir": work})], 1), base=base)
    assert done.status == "trained"
    assert not list(work.iterdir())


def test_a_killed_plan_of_one_job_ends_with_the_very_tensors(base: FrozenBase, tmp_path: Path) -> None:
    """With dropout, whose random numbers are the job's own."""
    job = mixed_jobs(tmp_path, seconds=0)[0]
    (want,) = trained(train_jobs(Plan([job], 8), base=base))
    AdapterStore(job.store).delete(job.name)
    with pytest.MonkeyPatch.context() as patch:
        original = AdapterTrainer.training_step

        def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == 5:
                raise Stopped
            return original(self, *arguments, **options)

        patch.setattr(AdapterTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train_jobs(Plan([job], 8), base=base)
    torch.manual_seed(7)
    (got,) = trained(train_jobs(Plan([job], 8), base=base))
    assert (got["resumed_from"], got["digest"]) == (5, want["digest"])


class Stopped(BaseException):
    """Stands in for a kill."""


def test_a_published_job_is_known_by_the_contents_of_its_images(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterStore, "has_content", lambda store, name, digest: digest == "d")
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"first")
    rows = write_csv(tmp_path / "rows.csv", ending_rule(8), ("image", "label"))
    job = settings_for(Path("tiny"), tmp_path, rows, task="image-classify", images=images)

    def published() -> PublishedJobs:
        return PublishedJobs(
            tmp_path / "published", AdapterStore(tmp_path / "store", create=True), base.info, resume=True
        )

    published().save(job, {"digest": "d"})
    assert published().load(job) == {"digest": "d"}
    (images / "a.png").write_bytes(b"other")
    assert published().load(job) is None
