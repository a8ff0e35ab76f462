"""The records of jobs and files: what is recorded once, of its own job alone, and what a supervisor is told of."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from adapters_store import BaseInfo
from sera_serve.jobs import Job, JobProcesses, Jobs, TrainingFileNotFound
from sera_serve.jobs import files as files_module
from sera_serve.jobs.files import FileInUse, TooManyFiles
from sera_serve.jobs.records import Checkpoint, LastSteps, NewEvent, Reported, base_id, new_job_id
from sera_serve.jobs.spec import _MOST_POINTS, auto_batch_size, auto_epochs
from support.job_platform import Platform


def running(platform: Platform, tenant: str) -> Job:
    job = platform.create(tenant)
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    return platform.jobs.get(job.id, None)


def reported(read: int, *, loss: float = 1.0, event: str = "half", **fields: float) -> Reported:
    ends = [Checkpoint(step, 1.0, None, {"loss": loss}) for step in (1, 2)]
    return Reported(read, LastSteps(), [NewEvent(event)], ends, **fields)  # type: ignore[arg-type]


def test_what_a_process_reports_is_recorded_once_and_for_its_own_job_alone(platform: Platform) -> None:
    jobs = platform.jobs
    job, other = running(platform, "acme"), running(platform, "evil")
    for made in (job, other, job, other):
        jobs.record_progress(made.id, reported(10, estimated_finish=5.0))
    # Checkpoints that a process reports again, without an estimate.
    jobs.record_progress(job.id, reported(20, loss=0.5, event="again"))
    assert jobs.get(job.id, None).estimated_finish == 5.0
    jobs.succeed(job.id, "acme/a", 3, 2, 42)
    jobs.record_progress(job.id, reported(30, event="late"))
    ended = jobs.get(job.id, None)
    assert (ended.progress_read, ended.estimated_finish) == (20, None)
    held = {made.id: jobs.checkpoints(made.id, made.tenant, None, 9)[0] for made in (job, other)}
    assert [(end.step, end.model) for end in held[job.id]] == [(2, "acme/a@v3"), (1, None)]
    assert [end.metrics["loss"] for end in held[job.id]] == [0.5, 0.5]
    assert [(end.step, end.model) for end in held[other.id]] == [(2, None), (1, None)]
    assert jobs.checkpoints(job.id, None, 2, 9) == ([held[job.id][1]], False)
    assert jobs.checkpoints(job.id, None, None, 2) == (held[job.id], False)
    told = {made.id: jobs.events(made.id, made.tenant, None, 9)[0] for made in (job, other)}
    assert [event.message for event in told[job.id]][2:4] == ["again", "half"]
    assert [(event.seq, event.message) for event in told[other.id]][:2] == [(3, "half"), (2, "runs")]
    assert jobs.events(other.id, None, 2, 9, oldest_first=True) == ([told[other.id][0]], False)
    assert jobs.events(other.id, None, None, 3) == (told[other.id], False)
    assert jobs.page("acme", None, 1) == ([ended], False)


def test_a_start_that_is_taken_back_leaves_the_job_as_it_was(platform: Platform) -> None:
    jobs, job = platform.jobs, running(platform, "acme")
    jobs.record_progress(job.id, reported(10, has_saved=True))
    assert jobs.get(job.id, None).starts_in_vain == 0
    for _ in range(2):
        jobs.take_back_starts([job.id])
    jobs.advance(job.id, "running", NewEvent("goes on"))
    jobs.record_progress(job.id, reported(20))
    again = jobs.get(job.id, None)
    # The checkpoint is of a start that is counted no more; when it first began stays.
    assert (again.starts, again.starts_in_vain, again.started_at) == (1, 1, job.started_at)


def test_a_job_needs_files_that_are_there_still(platform: Platform) -> None:
    job = platform.create("acme")
    with pytest.raises(TrainingFileNotFound) as gone:
        platform.jobs.create(new_job_id(), "acme", job.spec, {}, job.training_file, "file-gone", None)
    assert gone.value.param == "validation_file" and platform.jobs.unfinished("acme") == 1
    validation = platform.create("acme").training_file
    platform.jobs.create(new_job_id(), "acme", job.spec, {}, job.training_file, validation, None)
    for other in platform.jobs.page("acme", None, 9)[0][1:]:
        platform.jobs.cancel(other.id, None)
    for needed in (job.training_file, validation):
        with pytest.raises(FileInUse):
            platform.files.delete(needed, "acme")


def test_a_base_has_its_own_jobs_and_all_that_have_ended(platform: Platform) -> None:
    info = BaseInfo(name="a", architecture="b", config_digest="c", weights_digest="d", hidden_size=8)
    assert base_id(info) == base_id(info.model_copy(update={"name": "another name"}))
    assert base_id(info) != base_id(info.model_copy(update={"weights_digest": "e"}))
    jobs, others = platform.jobs, Jobs(platform.database, "another base")
    first, second, third = (running(platform, "acme") for _ in range(3))
    for job in (first, third):
        jobs.advance(job.id, "queued", NewEvent("waits"))
    others.adopt()
    assert others.next_queued() is None and others.of_status("running") == []
    made = others.create(new_job_id(), "acme", first.spec, {}, first.training_file, None, None)
    assert [job.id for job in jobs.of_status("queued")] == [first.id, third.id]
    for job in (third, second):
        others.cancel(job.id, None)
    # Those that have ended may still have a directory, which a sweep leaves alone.
    assert [job.id for job in others.uncleared()] == [second.id, third.id]
    assert jobs.with_directories() == {first.id, second.id, third.id, made.id}
    others.mark_cleared(second.id)
    assert jobs.with_directories() == {first.id, third.id, made.id}


def test_jobs_are_counted_by_status(platform: Platform) -> None:
    first, second = platform.create("a"), platform.create("b")
    platform.jobs.advance(first.id, "queued", NewEvent("waits"))
    platform.jobs.cancel(second.id, "b")
    counts = platform.jobs.counts()
    assert {status: count for status, count in counts.items() if count} == {"queued": 1, "cancelled": 1}
    assert "succeeded" in counts


def test_jobs_are_found_by_their_metadata(platform: Platform) -> None:
    odd = 'a"]\\ \u00e4'
    first = platform.create("acme", {"team": "blue", odd: odd})
    second, bare = platform.create("acme", {"team": "blue"}), platform.create("acme")

    def found(wanted: dict[str, str] | None, limit: int = 10) -> list[str]:
        return [job.id for job in platform.jobs.page("acme", None, limit, wanted)[0]]

    assert found(None) == [bare.id, second.id, first.id]
    assert found({"team": "blue"}) == [second.id, first.id]
    assert found({"team": "blue", odd: odd}) == [first.id]
    assert found({"team": "Blue"}) == found({"blue": "team"}) == []
    assert found({}) == [bare.id]
    page, has_more = platform.jobs.page("acme", None, 1, {"team": "blue"})
    assert [job.id for job in page] == [second.id] and has_more
    assert platform.jobs.page("evil", None, 10, {"team": "blue"}) == ([], False)


def test_a_file_that_is_being_kept_is_not_swept_and_is_counted_with_others(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_FILES", 2)
    platform.create("acme")
    copy, flush = files_module._copy, os.fsync
    synced: list[tuple[str, int]] = []

    def meanwhile(source: BinaryIO, target: BinaryIO) -> None:
        monkeypatch.setattr(files_module, "_copy", copy)
        platform.create("acme")
        copy(source, target)
        assert platform.files.sweep() == 0

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, os.fstat(descriptor).st_size))
        flush(descriptor)

    monkeypatch.setattr(files_module, "_copy", meanwhile)
    with pytest.raises(TooManyFiles):
        platform.create("acme")
    kept = sorted(path.name for path in platform.paths.files.iterdir())
    assert kept == sorted(file.id for file in platform.files.page("acme", None, 9)[0])
    # The bytes before their name, both before the record.
    monkeypatch.setattr(os, "fsync", note)
    made = platform.create("beta")
    file = platform.files.get(made.training_file, "beta")
    assert synced[0] == (f"{file.id}.part", file.nbytes) and synced[1][0] == "files"
    assert platform.files.page("beta", None, 1) == ([file], False)
    # It was recorded between the look for its record and its lock.
    looks = iter([False, True] * 3)
    monkeypatch.setattr(platform.files, "_is_recorded", lambda file_id: next(looks))
    assert platform.files.sweep() == 0 and platform.files.path(file).is_file()


STEPS = [
    {"type": "metrics", "step": 1, "total_steps": 3, "train_loss": 2.5},
    {"type": "metrics", "step": 1, "total_steps": 3, "eval_loss": 1.0},
    {"type": "metrics", "step": 2, "total_steps": 3, "train_loss": 1.5},
    {"type": "metrics", "step": 2, "total_steps": 3, "eval_loss": 0.5},
    {"type": "metrics", "step": 3, "total_steps": 3, "train_loss": 1.0, "seconds_left": 60},
]


def test_steps_that_a_job_repeats_after_its_checkpoint_are_told_once(platform: Platform) -> None:
    job = running(platform, "acme")
    progress = platform.paths.run(job.id) / "progress.jsonl"
    progress.parent.mkdir()
    # A server that is killed, with what it knew; then the next one. The process goes on from the first step.
    for steps in (STEPS[:3], [*STEPS[1:], {"type": "message", "message": "half"}]):
        with progress.open("a") as file:
            file.writelines(json.dumps(step) + "\n" for step in steps)
        platform.new_supervisor()._record_progress(platform.jobs.get(job.id, None))
    assert 50 < (platform.jobs.get(job.id, None).estimated_finish or 0) - time.time() < 70
    events, _ = platform.jobs.events(job.id, None, None, 20, oldest_first=True)
    texts = ("1/3: train loss=2.5000", "1/3: eval loss=1.0000", "2/3: train loss=1.5000", "2/3: eval loss=0.5000")
    assert [event.message for event in events][2:6] == [f"Step {text}" for text in texts]
    assert [event.message for event in events][6:] == ["Step 3/3: train loss=1.0000", "half"]


def test_a_process_has_its_rows_and_the_base_of_its_server(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(platform.create("acme"), validation_file=platform.create("acme").training_file)
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for base, named in (("model", str(tmp_path / "model")), ("hub/model", "hub/model")):
        run = JobProcesses(base, platform.store.root, "cpu", "auto", 1, 0.1, 1 << 20).prepare(job, platform.paths)
        settings = json.loads((run / "orders.json").read_text())["settings"]
        assert (settings["base"], settings["eval"]) == (named, "validation_file.jsonl")
    for name, file_id in ((settings["train"], job.training_file), (settings["eval"], job.validation_file)):
        assert (run / name).resolve() == platform.paths.file(str(file_id)).resolve()
    assert run.stat().st_mode & 0o077 == 0
    assert settings["log_steps"] == 1


def test_steps_are_counted_in_whole_batches_and_auto_stands_for_less_of_more_rows(platform: Platform) -> None:
    spec = replace(platform.create("acme").spec, epochs=3, rows=4001, batch_size=4)
    assert spec.steps == 3003
    settings = spec.train_settings("base", platform.store.root, device="cpu", dtype="auto")
    assert 3003 / settings["log_steps"] <= _MOST_POINTS < 3003 / (settings["log_steps"] - 1)
    assert [auto_epochs(rows) for rows in (0, 1, 500, 1000, 9000)] == [10, 10, 6, 3, 3]
    assert [auto_batch_size(rows) for rows in (1, 128, 320, 512, 9000)] == [4, 4, 10, 16, 16]
