"""Faults that pass, kills and missing databases: no job, file or checkpoint is lost for them."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.backends.durable import try_file_lock
from adapters_store.errors import AdapterNotFound
from sera_serve.access import AccessDatabase, AccessDatabaseError
from sera_serve.jobs import Job, Jobs, TrainingFiles
from sera_serve.jobs import files as files_module
from sera_serve.jobs import supervisor as supervisor_module
from sera_serve.jobs.process import write_json
from sera_serve.jobs.records import NewEvent
from sera_serve.jobs.supervisor import Supervisor
from support.job_platform import CHILDREN, STARTED, SUCCESS, Platform
from support.live_server import wait_until


def refuse_starts(platform: Platform, patched: pytest.MonkeyPatch) -> list[str]:
    """Let no process be started. Returns the ids of the jobs that were tried."""
    tried: list[str] = []

    def refuse(processes: object, job: Job, paths: object) -> None:
        tried.append(job.id)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    patched.setattr(type(platform.processes), "start", refuse)
    return tried


def checkpoint_of(platform: Platform, job: Job) -> Path:
    checkpoint = platform.paths.run(job.id) / "work" / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    return checkpoint


def waits_out(platform: Platform, tried: list[str], job: Job) -> None:
    """Wait for more than one try to start a job."""

    def often() -> bool:
        platform.supervisor.wake()
        return tried.count(job.id) > 1

    wait_until(often)


def test_a_job_that_has_run_waits_where_no_process_can_be_made(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)
    checkpoint = checkpoint_of(platform, job)
    platform.supervisor.stop()
    platform.supervisor = platform.new_supervisor()
    with pytest.MonkeyPatch.context() as patched:
        tried = refuse_starts(platform, patched)
        platform.supervisor.start()
        waits_out(platform, tried, job)
        assert platform.status(job) == "running" and checkpoint.is_dir()
    platform.supervisor.wake()
    wait_until(lambda: [job.id] * 2 == STARTED)
    assert checkpoint.is_dir() and platform.jobs.get(job.id, None).starts == 1
    assert caplog.text.count(f"job {job.id} stands still") == 1
    events, _ = platform.jobs.events(job.id, None, None, 10)
    assert sum("goes on from its last checkpoint" in event.message for event in events) == 1


def test_a_job_whose_process_was_ended_waits_where_no_process_can_be_made(platform: Platform) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)
    checkpoint = checkpoint_of(platform, job)
    with pytest.MonkeyPatch.context() as patched:
        tried = refuse_starts(platform, patched)
        CHILDREN[-1].kill()
        waits_out(platform, tried, job)
        assert platform.status(job) == "running" and checkpoint.is_dir()
    platform.supervisor.wake()
    wait_until(lambda: [job.id] * 2 == STARTED)
    held = platform.jobs.get(job.id, None)
    assert checkpoint.is_dir() and (held.kills, held.starts) == (1, 1)


def test_a_new_job_fails_where_no_process_can_be_made(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_starts(platform, monkeypatch)
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["code"] == "process_not_started"


def test_a_job_whose_adapter_is_shared_no_more_does_not_begin(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: Job) -> None:
        if job.tenant == "beta":
            raise AdapterNotFound("adapter 'acme/x' is not in the store", param="adapter")

    ran, job, other = platform.create("beta"), platform.create("beta"), platform.create("acme")
    # One that has begun goes on.
    platform.jobs.advance(ran.id, "running", NewEvent("runs"))
    monkeypatch.setattr(platform, "check_use", refuse)
    platform.supervisor = platform.new_supervisor(most=3)
    platform.supervisor.start()
    wait_until(lambda: bool(platform.ended) and len(STARTED) == 2)
    error = platform.jobs.get(job.id, None).error
    assert error == {"code": "adapter_not_found", "message": "adapter 'acme/x' is not in the store", "param": "model"}
    assert {ran.id, other.id} == set(STARTED) and [ended.id for ended in platform.ended] == [job.id]


@pytest.mark.parametrize("left", [False, True])
def test_without_its_database_a_store_loses_no_file_and_no_checkpoint(
    platform: Platform, tmp_path: Path, left: bool
) -> None:
    job = platform.create("acme")
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    checkpoint = checkpoint_of(platform, job)
    stray = platform.paths.run("ftjob-of-no-record")
    stray.mkdir()
    platform.database.close()
    folder, elsewhere = platform.database.path.parent, tmp_path / "elsewhere"
    folder.rename(elsewhere)
    if left:
        # As a restore leaves it that a full disk has stopped.
        folder.mkdir()
        platform.database.path.touch()
    database = AccessDatabase(platform.store.root)
    files, paths = TrainingFiles(database, platform.paths, 1 << 20), platform.paths
    jobs, store, processes = Jobs(database, "base"), platform.store, platform.processes
    supervisor = Supervisor(jobs, files, paths, store, processes, 1, lambda *_: None, lambda *_: None, lambda *_: None)
    supervisor.start()
    try:
        for _ in range(4):
            supervisor.wake()
            time.sleep(0.1)
        assert files.sweep() == 0
        assert paths.file(job.training_file).is_file() and checkpoint.is_dir() and stray.is_dir()
        # Once it is back, the job goes on, and what has no record goes.
        if left:
            shutil.rmtree(folder)
        elsewhere.rename(folder)
        supervisor.wake()
        wait_until(lambda: [job.id] == STARTED and not stray.exists())
        assert checkpoint.is_dir()
    finally:
        supervisor.stop()
        database.close()


def leave_success(platform: Platform, job: Job) -> None:
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    platform.leave(job, **SUCCESS)


def test_metrics_that_a_killed_server_has_begun_are_written_again(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    job = platform.create("acme")
    leave_success(platform, job)
    part = platform.paths.file(f"file-{job.id.rpartition('-')[2]}.part")
    part.write_bytes(b"st")
    # As a supervisor that has looked for files before.
    platform.supervisor._sweep_at = float("inf")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "succeeded")
    found = platform.jobs.get(job.id, None).result_file
    assert found is not None and platform.files.path(platform.files.get(found, None)).is_file()
    assert not part.exists() and "have no file" not in caplog.text


def test_metrics_that_are_kept_stay_where_a_later_try_fails(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    leave_success(platform, job)
    succeed = platform.jobs.succeed

    def full(*values: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def busy(*values: Any) -> bool:
        # The metrics are recorded by now. The next try finds a full disk, and a database that is free.
        monkeypatch.setattr(files_module, "_copy", full)
        monkeypatch.setattr(platform.jobs, "succeed", succeed)
        raise AccessDatabaseError("the database is locked")

    monkeypatch.setattr(platform.jobs, "succeed", busy)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "succeeded")
    found = platform.jobs.get(job.id, None).result_file
    assert found is not None and platform.files.path(platform.files.get(found, None)).is_file()


def test_metrics_stay_where_their_record_cannot_be_written_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    kept = platform.files.add_results(job.id, "acme", b"step\n", 0)
    other = platform.create("acme")

    def busy(*values: object) -> None:
        raise AccessDatabaseError("the database is locked")

    monkeypatch.setattr(platform.files, "_insert", busy)
    with pytest.raises(AccessDatabaseError):
        platform.files.add_results(job.id, "acme", b"step\n", 0)
    assert platform.files.path(kept).read_bytes() == b"step\n"
    # Those of a first try have no record, so they go.
    with pytest.raises(AccessDatabaseError):
        platform.files.add_results(other.id, "acme", b"step\n", 0)
    assert {path.name for path in platform.paths.files.iterdir()} == {kept.id, job.training_file, other.training_file}


def test_what_the_server_before_has_left_is_swept_by_the_one_that_takes_over(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_IDLE_S", 0.02)
    platform.paths.make()
    with platform.database.writing():
        pass
    platform.supervisor.start()
    wait_until(lambda: platform.supervisor._sweep_at == float("inf"))
    left = platform.paths.file("file-left.part")
    with try_file_lock(str(platform.paths.lock_of("base"))) as is_free:
        assert is_free
        left.write_bytes(b"x")
        wait_until(lambda: platform.supervisor._sweep_at == 0.0)
        assert left.exists()
    wait_until(lambda: not left.exists())


def test_what_a_process_leaves_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    flush, target = os.fsync, tmp_path / "result.json"

    def note(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_json(target, {"status": "succeeded"})
    # The content before the rename, the entry of the folder after it.
    (content, was_there), folder = flushed
    assert content != target.name and not was_there and folder == (tmp_path.name, True)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_rounds_beside_a_running_job_seldom_look_at_every_job(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)
    looks: list[float] = []
    rounds: list[float] = []

    def counted(calls: list[float], act: Callable[[], Iterable[Job]]) -> Callable[[], Iterable[Job]]:
        def call() -> Iterable[Job]:
            calls.append(time.monotonic())
            return act()

        return call

    monkeypatch.setattr(platform.jobs, "uncleared", counted(looks, platform.jobs.uncleared))
    adopt = platform.jobs.adopt

    def counted_adopt() -> None:
        rounds.append(time.monotonic())
        adopt()

    monkeypatch.setattr(platform.jobs, "adopt", counted_adopt)
    wait_until(lambda: len(rounds) > 8)
    assert len(looks) <= 2
    # The end of a job is cleared at once.
    ended = platform.create("acme")
    platform.jobs.cancel(ended.id, None)
    platform.supervisor.wake()
    before = len(rounds)
    wait_until(lambda: platform.jobs.with_directories() == {job.id})
    assert len(rounds) <= before + 2


def test_each_round_finds_the_jobs_without_a_base_by_an_index(platform: Platform) -> None:
    asked: list[str] = []
    with platform.database.writing() as connection:
        connection.set_trace_callback(asked.append)
    platform.jobs.adopt()
    with platform.database.reading() as connection:
        connection.set_trace_callback(None)
        (query,) = (text for text in asked if text.startswith("SELECT"))
        plan = [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert plan and all(step.startswith("SEARCH") for step in plan), plan
