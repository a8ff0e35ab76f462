"""A job that brings the whole server down: it is started again a few times, and takes no other job with it."""

from __future__ import annotations

import json
import time

import pytest

from sera_serve.access import AccessDatabaseError
from sera_serve.jobs import Job
from sera_serve.jobs import supervisor as supervisor_module
from sera_serve.jobs.records import NewEvent
from support.job_platform import CHILDREN, STARTED, Platform
from support.live_server import wait_until


def start(platform: Platform, most: int = 1) -> None:
    platform.supervisor = platform.new_supervisor(most)
    platform.supervisor.start()


def be_killed(platform: Platform) -> None:
    """End the supervisor and its processes with nothing recorded."""

    def record_nothing(*values: object) -> None:
        raise AccessDatabaseError("the server was killed")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(platform.jobs, "take_back_starts", record_nothing, raising=False)
        platform.supervisor.stop()


def save_a_checkpoint(platform: Platform, job: Job) -> None:
    """Report a checkpoint, as a job's process does."""
    with (platform.paths.run(job.id) / "progress.jsonl").open("a") as progress:
        progress.write(json.dumps({"type": "saved", "step": 1}) + "\n")


def waits_for(platform: Platform, count: int) -> None:
    wait_until(lambda: len(STARTED) >= count or platform.ended != [])


def test_a_job_that_brings_the_server_down_is_started_three_times(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    job, other = platform.create("evil"), platform.create("acme")
    for count in (1, 2, 3):
        start(platform)
        waits_for(platform, count)
        be_killed(platform)
    assert [job.id] * 3 == STARTED
    start(platform)
    wait_until(lambda: platform.status(job) == "failed" and len(STARTED) == 4)
    assert STARTED[3:] == [other.id]
    error = platform.jobs.get(job.id, "evil").error
    assert error is not None and error["code"] == "server_killed"
    assert "ended unexpectedly 3 times" in error["message"] and "smaller batch_size" in error["message"]
    assert [ended.id for ended in platform.ended] == [job.id]
    wait_until(lambda: not platform.paths.run(job.id).exists())
    events, _ = platform.jobs.events(job.id, None, None, 10)
    assert sum("Unexpected ends of the server" in event.message for event in events) == 2
    assert f"job {job.id} is not started again" in caplog.text


def test_a_server_that_ends_on_purpose_counts_nothing(platform: Platform) -> None:
    job = platform.create("acme")
    for count in range(1, 7):
        start(platform)
        waits_for(platform, count)
        platform.supervisor.stop()
    start(platform)
    waits_for(platform, 7)
    be_killed(platform)
    assert platform.jobs.get(job.id, None).starts == 1
    start(platform)
    waits_for(platform, 8)
    assert [job.id] * 8 == STARTED and platform.ended == []


def test_a_job_that_saves_checkpoints_goes_on_for_longer(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_MAX_SERVER_KILLS_AT_ALL", 6, raising=False)
    job = platform.create("acme")
    for count in range(1, 7):
        start(platform)
        waits_for(platform, count)
        save_a_checkpoint(platform, job)
        be_killed(platform)
        assert platform.ended == []
    # A server that is killed each time must have an end.
    start(platform)
    wait_until(lambda: platform.status(job) == "failed")
    assert [job.id] * 6 == STARTED


def test_a_checkpoint_that_a_killed_server_has_not_read_counts(platform: Platform) -> None:
    job = platform.create("acme")
    for count in (1, 2, 3):
        start(platform)
        waits_for(platform, count)
        be_killed(platform)
    save_a_checkpoint(platform, job)
    start(platform)
    waits_for(platform, 4)
    assert [job.id] * 4 == STARTED


def test_jobs_beside_it_are_not_failed_for_it(platform: Platform) -> None:
    first, culprit, last = jobs = [platform.create(tenant) for tenant in ("acme", "evil", "beta")]
    for count in (3, 6):
        start(platform, most=3)
        wait_until(lambda count=count: len(STARTED) >= count)  # type: ignore[misc]
        be_killed(platform)
    new = platform.create("late")
    start(platform, most=3)
    wait_until(lambda: len(STARTED) == 7)
    # A round of the supervisor takes a quarter of a second.
    time.sleep(0.6)
    assert STARTED[6:] == [first.id] and platform.status(new) == "queued"
    # Once it has proved itself, the next one begins beside it.
    save_a_checkpoint(platform, first)
    wait_until(lambda: len(STARTED) == 8)
    assert STARTED[7] == culprit.id
    be_killed(platform)
    start(platform, most=3)
    wait_until(lambda: platform.status(culprit) == "failed")
    wait_until(lambda: len(STARTED) == 9)
    assert STARTED[8] == last.id
    save_a_checkpoint(platform, last)
    wait_until(lambda: len(STARTED) == 11)
    assert set(STARTED[9:]) == {first.id, new.id}
    assert [platform.status(job) for job in (*jobs, new)] == ["running", "failed", "running", "running"]


def test_a_process_whose_end_the_database_refused_is_no_kill_of_the_server(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    refusals = [AccessDatabaseError("locked")]
    count_kill = platform.jobs.count_kill

    def refuse(job_id: str, event: NewEvent) -> None:
        if refusals:
            raise refusals.pop()
        count_kill(job_id, event)

    monkeypatch.setattr(platform.jobs, "count_kill", refuse)
    start(platform)
    waits_for(platform, 1)
    CHILDREN[-1].kill()
    waits_for(platform, 2)
    assert platform.jobs.get(job.id, None).starts == 1
    platform.supervisor.stop()
    assert platform.jobs.get(job.id, None).starts == 0


def test_a_start_is_counted_before_the_process_begins(platform: Platform) -> None:
    job = platform.create("acme")
    seen: list[int] = []
    begin = platform.processes.start

    def look(started: Job, paths: object) -> object:
        seen.append(platform.jobs.get(job.id, None).starts)
        return begin(started, paths)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(platform.processes), "start", lambda self, job, paths: look(job, paths))
        start(platform)
        waits_for(platform, 1)
    assert seen == [1]
