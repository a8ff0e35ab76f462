"""The jobs in the database: what is recorded once, of its own job alone, and which jobs a supervisor is told of."""

from __future__ import annotations

import pytest

from adapters_store import BaseInfo
from sera_serve.jobs import Job, Jobs, TrainingFileNotFound
from sera_serve.jobs.files import FileInUse
from sera_serve.jobs.records import Checkpoint, LastSteps, NewEvent, Reported, base_id, new_job_id
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
    told = {made.id: jobs.events(made.id, made.tenant, None, 9)[0] for made in (job, other)}
    assert [event.message for event in told[job.id]][2:4] == ["again", "half"]
    assert [(event.seq, event.message) for event in told[other.id]][:2] == [(3, "half"), (2, "runs")]
    assert jobs.events(other.id, None, 2, 9, oldest_first=True) == ([told[other.id][0]], False)


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
