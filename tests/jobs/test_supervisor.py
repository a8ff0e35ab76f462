"""The supervisor with processes that do nothing: turns of tenants, results that are found, ends that happen once."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sera_serve.access import AccessDatabaseError
from sera_serve.jobs import Job, JobEnded, JobNotFound, JobPaths, JobProcesses, Jobs
from sera_serve.jobs import supervisor as supervisor_module
from sera_serve.jobs.files import FileInUse, TooManyFiles, TrainingFileNotFound, TrainingFileNotStored
from sera_serve.jobs.process import JobProcess, one_gpu
from sera_serve.jobs.records import NewEvent, new_job_id
from sera_serve.jobs.rows import sha256_of
from support.job_platform import CHILDREN, STARTED, SUCCESS, Platform
from support.live_server import wait_until


@pytest.mark.parametrize(
    ("device", "shown", "wanted"),
    [
        ("cpu", "3,5", {}),
        ("cuda", None, {"CUDA_VISIBLE_DEVICES": "0"}),
        ("cuda:1", None, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda:1", "3,5", {"CUDA_VISIBLE_DEVICES": "5"}),
        ("cuda", "GPU-7f,GPU-9c", {"CUDA_VISIBLE_DEVICES": "GPU-7f"}),
    ],
)
def test_a_job_sees_the_gpu_of_its_server_alone(
    device: str, shown: str | None, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert one_gpu(device) == wanted


def test_tenants_take_turns(platform: Platform) -> None:
    many = [platform.create("greedy") for _ in range(3)]
    few = [platform.create("modest") for _ in range(2)]
    for job in (*many, *few):
        platform.jobs.advance(job.id, "queued", NewEvent("waits"))
    order = []
    while (job := platform.jobs.next_queued()) is not None:
        order.append(job.id)
        platform.jobs.advance(job.id, "running", NewEvent("runs"))
        platform.jobs.fail(job.id, "test", "it ends", None)
        time.sleep(0.002)
    assert order == [many[0].id, few[0].id, many[1].id, few[1].id, many[2].id]


def test_a_tenant_with_fewer_running_jobs_is_next(platform: Platform) -> None:
    first, second = platform.create("a"), platform.create("b")
    for job in (first, second):
        platform.jobs.advance(job.id, "queued", NewEvent("waits"))
    assert platform.jobs.next_queued(["a"]).id == second.id  # type: ignore[union-attr]
    assert platform.jobs.next_queued(["a", "b", "b"]).id == first.id  # type: ignore[union-attr]


def test_a_server_that_runs_no_jobs_keeps_them_from_no_other(platform: Platform) -> None:
    job = platform.create("acme")
    idle = platform.new_supervisor(most=0)
    idle.start()
    try:
        wait_until(lambda: platform.status(job) == "queued")
        platform.supervisor.start()
        wait_until(lambda: [job.id] == STARTED)
    finally:
        idle.stop()


def test_a_server_without_the_trainers_packages_leaves_jobs_to_others(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    with monkeypatch.context() as without:
        without.setattr(supervisor_module, "missing_packages", lambda: ["accelerate"])
        platform.supervisor.start()
        wait_until(lambda: platform.status(job) == "queued")
        assert STARTED == []
    platform.supervisor.stop()
    platform.supervisor = platform.new_supervisor()
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)


def test_a_job_runs_and_a_cancelled_one_leaves_nothing(platform: Platform) -> None:
    job, waiting = platform.create("acme"), platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "running" and platform.status(waiting) == "queued")
    platform.jobs.cancel(job.id, "acme")
    platform.supervisor.wake()
    wait_until(lambda: platform.status(waiting) == "running")
    wait_until(lambda: not platform.paths.run(job.id).exists())
    assert [job.id, waiting.id] == STARTED
    assert platform.jobs.unfinished("acme") == 1


def test_a_stopped_supervisor_ends_its_processes_and_the_next_goes_on(platform: Platform) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: bool(STARTED))
    platform.supervisor.stop()
    assert platform.status(job) == "running"
    platform.supervisor = platform.new_supervisor()
    platform.supervisor.start()
    wait_until(lambda: [job.id] * 2 == STARTED)


def test_a_result_that_a_dead_server_has_not_read_ends_the_job_once(platform: Platform) -> None:
    job = platform.create("acme")
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    platform.leave(job, **SUCCESS)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "succeeded")
    wait_until(lambda: not platform.paths.run(job.id).exists())
    assert STARTED == []
    assert [ended.id for ended in platform.ended] == [job.id]
    ended = platform.jobs.get(job.id, "acme")
    assert (ended.fine_tuned_model, ended.trained_tokens) == (job.spec.adapter, 42)
    with pytest.raises(JobEnded):
        platform.jobs.cancel(job.id, "acme")
    assert not platform.jobs.succeed(job.id, "acme/other", 2, 3, 1)


METRICS = [
    {"type": "metrics", "step": 1, "total_steps": 2, "epoch": 0.5, "train_loss": 2.5, "learning_rate": 0.1},
    {"type": "metrics", "step": 2, "total_steps": 2, "epoch": 1.0, "train_loss": 1.5},
    {"type": "metrics", "step": 2, "total_steps": 2, "epoch": 1.0, "train_loss": 1.5, "eval_loss": 1, "eval_f1": 0.5},
]
TABLE = "step,epoch,train_loss,learning_rate,valid_loss,valid_f1\n1,0.5,2.5,0.1,,\n2,1.0,1.5,,1,0.5\n"


def leave_success(platform: Platform, job: Job) -> None:
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    platform.leave(job, **SUCCESS)
    lines = "".join(json.dumps(entry) + "\n" for entry in METRICS)
    (platform.paths.run(job.id) / "progress.jsonl").write_text(lines)


def test_the_metrics_of_a_job_are_a_file_that_goes_with_it(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.jobs.records._MAX_KEPT", 1)
    jobs = [platform.create("acme") for _ in range(2)]
    # As a server leaves it that is killed before it records the success.
    platform.files.add_results(jobs[0].id, "acme", b"old", 1)
    for job in jobs:
        leave_success(platform, job)
    platform.supervisor.start()
    wait_until(lambda: all(not platform.paths.run(job.id).exists() for job in jobs))
    files = []
    for job in jobs:
        found = platform.jobs.get(job.id, "acme").result_file
        assert found is not None
        files.append(platform.files.get(found, "acme"))
    assert all(platform.files.path(file).read_text() == TABLE for file in files)
    assert all((file.purpose, file.rows, file.nbytes) == ("fine-tune-results", 2, len(TABLE)) for file in files)
    wait_until(lambda: platform.jobs.uncleared() == [])
    # Another job makes the oldest one forgotten.
    leave_success(platform, platform.create("acme"))
    platform.supervisor.wake()
    wait_until(lambda: not platform.files.path(files[0]).exists())
    with pytest.raises(TrainingFileNotFound):
        platform.files.get(files[0].id, "acme")
    assert platform.files.get(files[1].id, "acme") == files[1]


def test_a_tenant_deletes_the_metrics_of_a_job(platform: Platform) -> None:
    job = platform.create("acme")
    leave_success(platform, job)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "succeeded")
    file_id = platform.jobs.get(job.id, "acme").result_file
    assert file_id is not None
    with pytest.raises(TrainingFileNotFound):
        platform.files.get(file_id, "evil")
    platform.files.delete(file_id, "acme")
    assert platform.jobs.get(job.id, "acme").result_file is None


def test_results_of_a_job_that_is_cancelled_meanwhile_go(platform: Platform) -> None:
    job = platform.create("acme")
    platform.jobs.advance(job.id, "running", NewEvent("runs"))
    results = platform.files.add_results(job.id, "acme", b"step\n", 0)
    platform.jobs.cancel(job.id, "acme")
    platform.supervisor.start()
    wait_until(lambda: platform.jobs.uncleared() == [])
    assert not platform.files.path(results).exists() and platform.jobs.get(job.id, None).result_file is None


def test_a_full_disk_fails_no_job(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*values: object) -> None:
        raise TrainingFileNotStored("the disk is full")

    monkeypatch.setattr(platform.files, "add_results", full)
    job = platform.create("acme")
    leave_success(platform, job)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "succeeded")
    assert platform.jobs.get(job.id, None).result_file is None


def test_results_count_as_bytes_and_not_as_files(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.jobs.files.MAX_FILES", 2)
    job = platform.create("acme")
    platform.files.add_results(job.id, "acme", b"x", 1)
    platform.create("acme")
    with pytest.raises(TooManyFiles, match="has 2 files"):
        platform.create("acme")
    other = platform.create("beta")
    platform.files.add_results(other.id, "beta", b"x" * (1 << 20), 1)
    with pytest.raises(TooManyFiles):
        platform.create("beta")


def test_a_process_that_the_system_ends_is_started_again_once(platform: Platform) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    for starts in (1, 2):
        wait_until(lambda count=starts: len(STARTED) >= count)  # type: ignore[misc]
        CHILDREN[-1].kill()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["code"] == "process_killed" and "signal 9" in error["message"]
    wait_until(lambda: not platform.paths.run(job.id).exists())
    assert len(STARTED) == 2
    told = [event.message for event in platform.jobs.events(job.id, None, None, 10)[0]]
    assert sum("was ended by the system (signal 9)" in message for message in told) == 1


def test_a_job_that_runs_for_too_long_fails_and_the_next_one_begins(platform: Platform) -> None:
    job, waiting = platform.create("acme"), platform.create("evil")
    platform.processes = replace(platform.processes, timeout_s=0.5)
    platform.supervisor = platform.new_supervisor()
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["code"] == "training_timeout"
    assert "0.5 s" in error["message"] and "training_job_timeout_s" in error["message"]
    assert CHILDREN[0].poll() is not None
    wait_until(lambda: not platform.paths.run(job.id).exists())
    wait_until(lambda: [job.id, waiting.id] == STARTED)


def test_an_overdue_job_is_not_started_again_where_its_end_cannot_be_recorded(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = platform.create("acme")
    platform.processes = replace(platform.processes, timeout_s=0.5)
    platform.supervisor = platform.new_supervisor()
    fail, refused = platform.jobs.fail, list[int]()

    def locked_once(*arguments: Any) -> bool:
        if not refused:
            refused.append(1)
            raise AccessDatabaseError("the database is locked")
        return fail(*arguments)

    monkeypatch.setattr(platform.jobs, "fail", locked_once)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["code"] == "training_timeout"
    assert refused and [job.id] == STARTED


def test_an_overdue_job_that_has_its_result_has_succeeded(platform: Platform) -> None:
    job = platform.create("acme")
    platform.processes = replace(platform.processes, timeout_s=1.0)
    platform.supervisor = platform.new_supervisor()
    platform.supervisor.start()
    wait_until(lambda: bool(STARTED))
    platform.leave(job, **SUCCESS)
    wait_until(lambda: platform.jobs.get(job.id, None).is_finished)
    assert platform.status(job) == "succeeded"


def test_a_message_that_is_no_text_ends_its_job_and_no_other(platform: Platform) -> None:
    odd, other = platform.create("evil"), platform.create("acme")
    platform.jobs.advance(odd.id, "running", NewEvent("runs \ud800"))
    platform.leave(odd, status="failed", code="invalid_training_data", message="label '\ud800' is new", param=None)
    metrics = {"type": "metrics", "step": 1, "total_steps": 2, "train_loss": 1.5, "eval_\udfff": 0.5}
    (platform.paths.run(odd.id) / "progress.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (metrics, metrics | {"type": "checkpoint"}))
    )
    platform.supervisor.start()
    wait_until(lambda: platform.status(odd) == "failed" and platform.status(other) == "running")
    error = platform.jobs.get(odd.id, "evil").error
    assert error == {"code": "invalid_training_data", "message": "label '?' is new", "param": None}
    events, _ = platform.jobs.events(odd.id, "evil", None, 10)
    assert [event.message for event in events if event.type == "message"][:2] == [
        "The job failed: label '?' is new",
        "runs ?",
    ]
    assert [event.data["eval_?"] for event in events if event.type == "metrics"] == [0.5]
    assert [checkpoint.metrics["eval_?"] for checkpoint in platform.jobs.checkpoints(odd.id, None, None, 9)[0]] == [0.5]


def test_a_defect_with_one_job_ends_it_and_no_other(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = platform.create("evil")
    record = platform.jobs.record_progress

    def refuse(job_id: str, *values: Any) -> None:
        if job_id == odd.id:
            raise UnicodeError("no text")
        record(job_id, *values)

    monkeypatch.setattr(platform.jobs, "record_progress", refuse)
    platform.supervisor.start()
    wait_until(lambda: [odd.id] == STARTED)
    other = platform.create("acme")
    (platform.paths.run(odd.id) / "progress.jsonl").write_text('{"type": "message", "message": "m"}\n')
    wait_until(lambda: platform.status(odd) == "failed" and platform.status(other) == "running")
    # Its process is gone, and so is its directory; the server's log has the reason.
    assert CHILDREN[0].wait(timeout=10) < 0
    wait_until(lambda: not platform.paths.run(odd.id).exists())
    error = platform.jobs.get(odd.id, None).error
    assert error is not None and error["code"] == "training_process_failed" and "log" in error["message"]
    assert [ended.id for ended in platform.ended] == [odd.id]


def test_a_defect_before_the_start_ends_its_job_and_no_other(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, other = platform.create("evil"), platform.create("acme")
    path = platform.files.path

    def refuse(file: Any) -> Path:
        if file.id == odd.training_file:
            raise UnicodeError("no text")
        return path(file)

    monkeypatch.setattr(platform.files, "path", refuse)
    platform.supervisor.start()
    wait_until(lambda: platform.status(odd) == "failed" and platform.status(other) == "running")


def test_a_fault_that_passes_stops_its_own_job_alone(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    odd, other = platform.create("evil"), platform.create("acme")
    for job in (odd, other):
        platform.leave(job, **SUCCESS)
        platform.jobs.advance(job.id, "running", NewEvent("runs"))
    succeed, refusals = platform.jobs.succeed, []

    def refuse(job_id: str, *values: Any) -> bool:
        if job_id == odd.id and len(refusals) < 3:
            refusals.append(job_id)
            raise AccessDatabaseError("the database is locked")
        return succeed(job_id, *values)

    monkeypatch.setattr(platform.jobs, "succeed", refuse)
    platform.supervisor.start()
    wait_until(lambda: platform.status(other) == "succeeded")
    assert platform.status(odd) == "running"
    while platform.status(odd) == "running":
        platform.supervisor.wake()
        time.sleep(0.05)
    assert platform.status(odd) == "succeeded" and len(refusals) == 3
    assert caplog.text.count("the database is locked") == 1


def test_one_supervisor_of_a_store_runs_jobs(platform: Platform) -> None:
    platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: len(STARTED) == 1)
    other = platform.new_supervisor(most=5)
    platform.create("acme")
    other.start()
    time.sleep(0.5)
    other.stop()
    assert len(STARTED) == 1


def test_a_clock_that_was_wrong_keeps_no_tenant_waiting(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    jobs = [platform.create(tenant) for tenant in ("early", "early", "early", "other", "other", "other")]
    for job in jobs:
        platform.jobs.advance(job.id, "queued", NewEvent("queued"))
    monkeypatch.setattr(time, "time", lambda: now() + 30 * 86400)
    order = []
    while (turn := platform.jobs.next_queued()) is not None:
        platform.jobs.advance(turn.id, "running", NewEvent("runs"))
        platform.jobs.fail(turn.id, "code", "message", None)
        order.append(turn.tenant)
        monkeypatch.setattr(time, "time", now)
    assert order == ["early", "other"] * 3


def test_a_fault_that_lasts_is_logged_once(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform.create("acme")
    monkeypatch.setattr(supervisor_module, "_IDLE_S", 0.01)
    tried: list[int] = []

    def refused() -> bool:
        tried.append(1)
        raise OSError(errno.EROFS, "Read-only file system", "lock")

    monkeypatch.setattr(platform.supervisor, "_take_lock", refused)
    platform.supervisor.start()
    wait_until(lambda: len(tried) > 5)
    assert caplog.text.count("training jobs stand still") == 1


def test_a_process_that_ends_without_a_result_fails_its_job(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(processes: object, job: Job, paths: JobPaths) -> JobProcess:
        run = paths.run(job.id)
        run.mkdir()
        (run / "log").write_text("Traceback of /srv")
        command = ["sh", "-c", "exit 3"]
        return JobProcess(job, run, subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True), None)

    monkeypatch.setattr(type(platform.processes), "start", start)
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["code"] == "training_process_failed" and "status 3" in error["message"]
    assert "Traceback of /srv" in caplog.text and "Traceback" not in error["message"]


def test_a_process_that_cannot_be_started_tells_no_path(platform: Platform) -> None:
    job = platform.create("acme")
    platform.supervisor._processes = JobProcesses("base", platform.store.root, "cpu", "auto", 1, 0.1, 1 << 20)
    (platform.paths.run(job.id) / "orders.json").mkdir(parents=True)
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and error["message"].endswith("could not be started: Is a directory")


def test_many_files_hold_up_no_running_job_and_no_other_tenant(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = platform.create("modest")
    platform.supervisor.start()
    wait_until(lambda: [running.id] == STARTED)

    def slow(path: Path) -> str:
        time.sleep(0.2)
        return sha256_of(path)

    monkeypatch.setattr(supervisor_module, "sha256_of", slow)
    many = [platform.create("greedy") for _ in range(20)]
    last = platform.create("modest")
    platform.jobs.cancel(running.id, None)
    platform.supervisor.wake()
    wait_until(lambda: CHILDREN[0].poll() is not None, 2)
    wait_until(lambda: platform.status(last) != "validating_files", 2)
    assert platform.status(many[-1]) == "validating_files"
    platform.supervisor.stop()


def test_damaged_bytes_fail_the_job(platform: Platform) -> None:
    job = platform.create("acme")
    platform.paths.file(job.training_file).write_bytes(b"other")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and (error["code"], error["param"]) == ("file_damaged", "training_file")


def test_a_job_says_that_its_file_is_missing(platform: Platform) -> None:
    job = platform.create("acme")
    platform.paths.file(job.training_file).unlink()
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "failed")
    error = platform.jobs.get(job.id, None).error
    assert error is not None and (error["code"], error["param"]) == ("file_missing", "training_file")
    assert error["message"] == f"file {job.training_file} is missing; upload it again"


def test_a_tenant_sees_only_its_own(platform: Platform) -> None:
    job = platform.create("acme")
    with pytest.raises(JobNotFound) as other:
        platform.jobs.get(job.id, "evil")
    with pytest.raises(JobNotFound) as absent:
        platform.jobs.get("ftjob-none", "evil")
    assert other.value.message.replace(job.id, "X") == absent.value.message.replace("ftjob-none", "X")
    for call in (platform.jobs.cancel, platform.jobs.get):
        with pytest.raises(JobNotFound):
            call(job.id, "evil")
    assert platform.jobs.page("evil", None, 10) == ([], False)
    assert platform.files.page("evil", None, 10) == ([], False)
    with pytest.raises(FileInUse):
        platform.files.delete(job.training_file, "acme")


def test_what_cannot_be_deleted_is_told_and_tried_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor_module, "_SWEEP_S", 0.0, raising=False)
    monkeypatch.setattr(supervisor_module, "_IDLE_S", 0.01)
    jobs = [platform.create("acme") for _ in range(2)]
    left, other = (platform.paths.run(job.id) for job in jobs)
    stray = platform.paths.run("ftjob-of-a-deleted-database")
    for run in (left, other, stray):
        (run / "work").mkdir(parents=True)
    for job in jobs:
        platform.jobs.cancel(job.id, None)
    remove, tried = shutil.rmtree, []

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if path == left:
            tried.append(path)
            if ignore_errors:
                return
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr("sera_serve.jobs.process.shutil.rmtree", refuse)
        platform.supervisor.start()
        wait_until(lambda: not other.exists() and not stray.exists())
        wait_until(lambda: len(tried) > 5)
    wait_until(lambda: not left.exists())
    assert caplog.text.count("cannot be deleted yet") == 1 and "Directory not empty" in caplog.text
    assert platform.jobs.uncleared() == []


def test_a_sweep_leaves_what_jobs_still_need(platform: Platform) -> None:
    job, waiting = platform.create("acme"), platform.create("beta")
    of_other_base = Jobs(platform.database, "another base").create(
        new_job_id(), "acme", job.spec, {}, job.training_file, None, None
    )
    kept = [platform.paths.run(made.id) for made in (job, waiting, of_other_base)]
    for run in kept:
        (run / "work").mkdir(parents=True)
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)
    assert all((run / "work").is_dir() for run in kept)
