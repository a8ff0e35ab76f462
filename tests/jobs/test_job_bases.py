"""Which server runs a job: one of the job's own base, or of a release that runs the jobs of every base."""

from __future__ import annotations

import fcntl
import time

from sera_serve.jobs import Jobs
from sera_serve.jobs.records import new_job_id
from support.job_platform import STARTED, Platform
from support.live_server import wait_until


def test_a_job_is_run_on_its_own_base_alone(platform: Platform) -> None:
    job = platform.create("acme")
    other = platform.new_supervisor(base="another base")
    other.start()
    try:
        time.sleep(0.5)
        assert platform.status(job) == "validating_files" and not STARTED
        # Beside the other one.
        platform.supervisor.start()
        wait_until(lambda: [job.id] == STARTED)
        # A job is of the server that it was sent to; any server takes a cancellation.
        second = Jobs(platform.database, "another base")
        made = second.create(new_job_id(), "acme", job.spec, {}, job.training_file, None, None)
        wait_until(lambda: [job.id, made.id] == STARTED)
        second.cancel(job.id, None)
        wait_until(lambda: not platform.paths.run(job.id).exists(), 5)
        assert platform.status(made) == "running"
    finally:
        other.stop()


def test_what_a_cancelled_job_left_goes_where_nobody_serves_its_base(platform: Platform) -> None:
    job = platform.create("acme")
    platform.supervisor.start()
    wait_until(lambda: [job.id] == STARTED)
    platform.supervisor.stop()
    platform.jobs.cancel(job.id, None)
    assert platform.paths.run(job.id).is_dir()
    other = platform.new_supervisor(base="another base")
    other.start()
    wait_until(lambda: not platform.paths.run(job.id).exists(), 5)
    other.stop()


def test_a_job_that_has_no_base_noted_is_run(platform: Platform) -> None:
    job = platform.create("acme")
    with platform.database.writing() as connection:
        connection.execute("UPDATE jobs SET base = NULL")
    platform.supervisor.start()
    wait_until(lambda: platform.status(job) == "running")


def test_a_server_that_runs_the_jobs_of_every_base_is_left_alone(platform: Platform) -> None:
    job = platform.create("acme")
    with platform.paths.lock.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        platform.supervisor.start()
        time.sleep(0.5)
        assert platform.status(job) == "validating_files"
    platform.supervisor.wake()
    wait_until(lambda: platform.status(job) == "running")
