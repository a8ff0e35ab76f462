"""Runs the queued jobs: in threads and processes of its own, a number at a time, each to its end exactly once."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from adapters_store import AdapterStore, Published
from adapters_store.backends.durable import try_file_lock
from adapters_store.errors import AdapterNotFound, StoreError
from sera_serve.access import AccessDatabaseError
from sera_serve.jobs.files import TrainingFileNotFound, TrainingFileNotStored, TrainingFiles, missing_file
from sera_serve.jobs.metrics import metrics_csv
from sera_serve.jobs.paths import JobPaths
from sera_serve.jobs.process import (
    JobProcess,
    JobProcesses,
    clear,
    read_progress,
    read_publishing,
    read_result,
)
from sera_serve.jobs.records import Job, JobEvent, Jobs, LastSteps, NewEvent
from sera_serve.jobs.rows import sha256_of
from sera_serve.trainer.packages import missing_packages

logger = logging.getLogger("sera_serve.jobs")

_TICK_S, _IDLE_S, _RECORD_S = 0.25, 2.0, 1.0
_PAGE = 500
# What cannot be deleted is tried again after so long.
_SWEEP_S = 600.0
# A process that the system ends is started again so often.
_MAX_KILLS = 1
# Kills of the server during a job: so many without a new checkpoint between them, and so many at all, fail the job.
_MAX_SERVER_KILLS, _MAX_SERVER_KILLS_AT_ALL = 3, 20
_FOR_WANT_OF_MEMORY = "maybe for want of memory: send a smaller batch_size, rank, or shorter rows"


class Supervisor:
    """Runs the jobs of a base while this server is the one of its store that does: it holds the base's lock.

    It also shares `jobs/lock`, which a server of a release that runs the jobs of every base has alone. A server whose
    processes have ended gives the locks back after each look: another one may run jobs where this one runs none.

    A job may bring the whole server down, for want of memory. So each start is counted before it, and a server that
    ends on purpose takes its starts back. What is left are starts whose server was killed. Where the next kill would
    fail a job, jobs begin one by one, each after the first checkpoint of the one before: the job that brings the server
    down must not take others with it.

    A thread does everything. It starts the processes too: the system ends a child whose starting thread has ended.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: TrainingFiles,
        paths: JobPaths,
        store: AdapterStore,
        processes: JobProcesses,
        max_jobs: int,
        withdraw: Callable[[Job], None],
        on_finish: Callable[[Job, Published | None], None],
        check_use: Callable[[Job], None],
    ) -> None:
        """Prepare. Nothing runs before `start`.

        Args:
            jobs: The jobs, and the base that the processes train on.
            files: Their files.
            paths: Their directories.
            store: Where adapters are published.
            processes: How to start a job's process.
            max_jobs: Processes at once; with 0, jobs wait for another server of the base.
            withdraw: Deletes what a cancelled or failed job has published, wherever this server knows of it. Called on
                the supervisor's thread; may raise AdapterNotFound.
            on_finish: Called with each job that has succeeded or failed, and what it has published, on the supervisor's
                thread.
            check_use: Called with each job before it begins, on the supervisor's thread. Raises AdapterNotFound where
                the job's tenant may not use the adapter that it goes on from.
        """
        self._jobs = jobs
        self._files = files
        self._paths = paths
        self._store = store
        self._processes = processes
        self._max_jobs = max_jobs
        self._withdraw = withdraw
        self._on_finish = on_finish
        self._check_use = check_use
        self._running: dict[str, JobProcess] = {}
        # Unfinished jobs whose start this supervisor has counted.
        self._counted: set[str] = set()
        self._last_steps: dict[str, LastSteps] = {}
        # The last fault of each job that stands still.
        self._faults: dict[str, str] = {}
        # The last fault for which all jobs stood still.
        self._fault = ""
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._locks: ExitStack | None = None
        # When what is left of files and jobs is next looked for (`time.monotonic`).
        self._sweep_at = 0.0
        # Names of the directories that could not be deleted.
        self._undeleted: set[str] = set()
        # When finished jobs to clear are next looked for, while jobs run: each look tries the locks of other bases.
        self._clear_at = 0.0

    def start(self) -> None:
        """Begin to run jobs; those of a server that was killed go on. Without the trainer's packages none runs here."""
        if self._max_jobs and (missing := missing_packages()):
            logger.info("no training jobs run here: %s missing; pip install 'sera-serve[train]'", ", ".join(missing))
            self._max_jobs = 0
        self._thread = threading.Thread(target=self._serve, name="jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all processes, and return when they have ended. Their jobs go on when a supervisor starts again."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look at the jobs now: one was made or cancelled."""
        self._clear_at = 0.0
        self._wake.set()

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                try:
                    if self._take_lock():
                        try:
                            self._tick()
                        finally:
                            if not self._running:
                                self._release_locks()
                    self._fault = ""
                except Exception as error:  # noqa: BLE001 - a defect must not end all jobs of the server
                    self._note_fault(error)
                self._wake.wait(_TICK_S if self._running else _IDLE_S)
                self._wake.clear()
        finally:
            for process in self._running.values():
                process.kill()
            self._take_back_starts()
            self._release_locks()

    def _take_back_starts(self) -> None:
        if not self._counted:
            return
        try:
            self._jobs.take_back_starts(self._counted)
        except AccessDatabaseError as error:
            logger.error("this end counts as a kill of the server during %d jobs: %s", len(self._counted), error)

    def _note_fault(self, error: Exception) -> None:
        """Log what all jobs stand still for. The next round tries again: once is enough for the log."""
        fault = f"{type(error).__name__}: {error}"
        if fault == self._fault:
            return
        self._fault = fault
        is_known = isinstance(error, AccessDatabaseError | StoreError | OSError)
        logger.error("training jobs stand still: %s", error, exc_info=None if is_known else error)

    def _take_lock(self) -> bool:
        """Become the supervisor of the base's jobs, if none is."""
        if self._locks is not None:
            return True
        # Without a job there is nothing to run, and maybe no right to write.
        if not self._paths.root.is_dir():
            return False
        with ExitStack() as locks:
            if not locks.enter_context(try_file_lock(str(self._paths.lock), shared=True)):
                return False
            if not locks.enter_context(try_file_lock(str(self._paths.lock_of(self._jobs.base)))):
                # The server that runs the jobs may be killed. The next one looks for what it has left.
                self._sweep_at = 0.0
                return False
            self._locks = locks.pop_all()
        return True

    def _release_locks(self) -> None:
        if self._locks is not None:
            self._locks.close()
            self._locks = None

    def _tick(self) -> None:
        if time.monotonic() >= self._sweep_at:
            self._sweep()
        self._jobs.adopt()
        self._check_some_files()
        running = {job.id: job for job in self._jobs.of_status("running")}
        followed = dict(self._running)
        for process in followed.values():
            self._attempt(process.job, partial(self._follow, process, running.get(process.job.id)))
        # Of a server that was killed or stopped. Those that it was killed with most often prove themselves first.
        left = [job for job in running.values() if job.id not in followed]
        free = self._free_processes(running.values())
        for job in sorted(left, key=lambda job: (-job.starts_in_vain, job.number)):
            if free > 0:
                self._attempt(job, partial(self._go_on, job))
                free -= job.id in self._running
        while free > 0 and not self._closing.is_set():
            next_job = self._jobs.next_queued([process.job.tenant for process in self._running.values()])
            # A job that cannot be moved on would be the next one again.
            if next_job is None or not self._attempt(next_job, partial(self._advance, next_job)):
                break
            free -= next_job.id in self._running
        if not self._running or time.monotonic() >= self._clear_at:
            # Before the look: a job that is finished during it has it repeated.
            self._clear_at = time.monotonic() + _IDLE_S
            for job in self._jobs.uncleared():
                self._attempt(job, partial(self._clear, job))

    def _sweep(self) -> None:
        """Delete what killed servers, and earlier failures, have left of files and of jobs. What fails is tried again.

        Raises:
            OSError: The directories cannot be read, or a file cannot be deleted.
        """
        if not self._files.has_records():
            # It was moved away, or is not restored so far. With it, what lies here has its records again.
            return
        self._files.sweep()
        # The directories first: a job is recorded before it has one.
        found = list(self._paths.runs.glob("ftjob-*"))
        kept = self._jobs.with_directories()
        self._sweep_at = math.inf
        for run in found:
            if run.name not in kept:
                self._delete(run)

    def _delete(self, run: Path) -> None:
        """Delete the directory of a job that has finished, or do it later."""
        try:
            clear(run)
        except OSError as error:
            if run.name not in self._undeleted:
                logger.error("what job %s has left cannot be deleted yet, and takes space: %s", run.name, error)
            self._undeleted.add(run.name)
            self._sweep_at = min(self._sweep_at, time.monotonic() + _SWEEP_S)
        else:
            self._undeleted.discard(run.name)

    def _free_processes(self, running: Collection[Job]) -> int:
        """How many processes may begin now."""
        free = self._max_jobs - len(self._running)
        if any(map(self._is_suspect, running)):
            unproven = sum(job.starts_in_vain > 0 for job in running if job.id in self._running)
            return min(free, 1 - unproven)
        return free

    def _is_suspect(self, job: Job) -> bool:
        """Whether the next kill of the server during a job would fail the job."""
        present = job.id in self._counted
        in_vain, at_all = job.starts_in_vain - present, job.starts - present
        return in_vain >= _MAX_SERVER_KILLS - 1 or at_all >= _MAX_SERVER_KILLS_AT_ALL - 1

    def _attempt(self, job: Job, act: Callable[[], None]) -> bool:
        """Do something for a job; what goes wrong with it must not stop the other jobs. Returns whether it went well.

        A fault of the disk or the database may pass, and the next round tries again. After a defect the job has failed:
        its process would hold the place of another one.
        """
        try:
            act()
        except (AccessDatabaseError, StoreError, OSError) as error:
            # Rounds follow each other quickly. Once is enough for the log.
            if self._faults.get(job.id) != str(error):
                self._faults[job.id] = str(error)
                logger.error("job %s stands still: %s", job.id, error)
            return False
        except Exception:
            logger.exception("job %s cannot go on", job.id)
            self._give_up(job)
            return False
        self._faults.pop(job.id, None)
        return True

    def _give_up(self, job: Job) -> None:
        process = self._running.pop(job.id, None)
        try:
            if process is not None:
                process.kill()
            words = "the server met a defect of its own with this job, and its log has the reason"
            self._fail(job, "training_process_failed", words)
        except Exception:
            logger.exception("job %s cannot be ended", job.id)

    def _advance(self, job: Job) -> None:
        """Begin a queued job, or fail it where it cannot begin."""
        try:
            # Its adapter may have been shared when the job was made, and be shared no more.
            self._check_use(job)
        except AdapterNotFound as error:
            self._fail(job, error.code, error.message, "model")
            return
        try:
            self._count_and_begin(job, NewEvent("The job runs"))
        except OSError as error:
            # Without the path, which is nobody's business.
            reason = error.strerror or type(error).__name__
            self._fail(job, "process_not_started", f"the training process could not be started: {reason}")

    def _count_and_begin(self, job: Job, event: NewEvent) -> None:
        # Durable before the process begins: a process that takes all memory leaves no time for it.
        if self._jobs.advance(job.id, "running", event):
            self._counted.add(job.id)
            self._begin(job)

    def _check_some_files(self) -> None:
        """Compare the files of new jobs for a while. The rest waits for the next round, after the jobs that run."""
        began = time.monotonic()
        seen: Counter[str] = Counter()
        turns: list[tuple[int, int, Job]] = []
        for job in self._jobs.of_status("validating_files"):
            # One tenant's many jobs hold up no other tenant's first one.
            turns.append((seen[job.tenant], job.number, job))
            seen[job.tenant] += 1
        for _, _, job in sorted(turns, key=lambda turn: turn[:2]):
            if self._closing.is_set():
                return
            if time.monotonic() - began > _TICK_S:
                self._wake.set()
                return
            self._attempt(job, partial(self._check_files, job))

    def _check_files(self, job: Job) -> None:
        for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
            if file_id is None:
                continue
            try:
                file = self._files.get(file_id, None)
                is_whole = sha256_of(self._files.path(file)) == file.sha256
            except FileNotFoundError:
                missing = missing_file(file_id, param)
                self._fail(job, missing.code, missing.message, param)
                return
            except (TrainingFileNotFound, OSError):
                is_whole = False
            if not is_whole:
                self._fail(job, "file_damaged", f"file {file_id} is not what was uploaded; upload it again", param)
                return
        self._jobs.advance(job.id, "queued", NewEvent("The files are valid; the job waits for its turn"))

    def _begin(self, job: Job) -> None:
        """Start the process of a job; raises OSError. A job that has checkpoints to lose is then tried again."""
        self._running[job.id] = self._processes.start(job, self._paths)

    def _go_on(self, job: Job) -> None:
        """Go on with a job of which there is no process: finish it, if its process had come to an end."""
        self._record_progress(job)
        if self._finish_by_result(job):
            return
        if job.id in self._counted:
            # The database refused to record the end of its last process.
            self._begin(job)
            return
        job = self._jobs.get(job.id, None)
        if job.starts_in_vain >= _MAX_SERVER_KILLS or job.starts >= _MAX_SERVER_KILLS_AT_ALL:
            logger.error("job %s is not started again: the server was killed %d times while it ran", job.id, job.starts)
            words = f"the server ended unexpectedly {job.starts} times while this job ran"
            self._fail(job, "server_killed", f"{words}, {_FOR_WANT_OF_MEMORY}")
            return
        words = "the job goes on from its last checkpoint"
        if job.starts:
            event = NewEvent(f"Unexpected ends of the server while the job ran: {job.starts}; {words}", "warn")
            logger.warning("job %s goes on: unexpected ends of the server while it ran: %d", job.id, job.starts)
        else:
            event = NewEvent(words.capitalize())
        self._count_and_begin(job, event)

    def _follow(self, process: JobProcess, job: Job | None) -> None:
        """Take what a process has reported, and act on its end. `job` None: it was cancelled."""
        if job is None:
            process.kill()
            del self._running[process.job.id]
            self._counted.discard(process.job.id)
            self._clear_at = 0.0
            return
        status = process.status
        # Each write is durable before the next job is looked at.
        if status is not None or time.monotonic() - process.recorded_at > _RECORD_S:
            process.recorded_at = time.monotonic()
            self._record_progress(job)
            if status is None:
                self._processes.tell_limits(job, process.run)
        if process.is_overdue:
            self._end_overdue(process, job)
            return
        if status is None:
            return
        process.kill()
        del self._running[job.id]
        if self._finish_by_result(job):
            return
        if status < 0 and job.kills < _MAX_KILLS:
            words = f"The training process was ended by the system (signal {-status}), maybe for want of memory"
            self._jobs.count_kill(job.id, NewEvent(f"{words}; it goes on from its last checkpoint", "warn"))
            self._begin(job)
        elif status < 0:
            words = f"the training process was ended by the system twice (signal {-status})"
            self._fail(job, "process_killed", f"{words}, {_FOR_WANT_OF_MEMORY}")
        else:
            logger.error("the process of job %s ended with status %d: %s", job.id, status, process.log_tail())
            words = f"the training process ended with status {status}; the server's log has the reason"
            self._fail(job, "training_process_failed", words)

    def _end_overdue(self, process: JobProcess, job: Job) -> None:
        """Fail a job whose process has run for as long as it may, unless it has its result already."""
        process.kill()
        self._record_progress(job)
        if not self._finish_by_result(job):
            words = f"the job ran for {self._processes.timeout_s:g} s, the longest time that one may run here"
            remedy = "send fewer rows or epochs, or ask the operator for a higher training_job_timeout_s"
            self._fail(job, "training_timeout", f"{words}; {remedy}")
        # Not earlier: a job without a process is started again, where the database refused to record its end.
        del self._running[job.id]

    def _record_progress(self, job: Job) -> None:
        while True:
            if job.id not in self._last_steps:
                self._last_steps[job.id] = self._recorded_steps(job)
            found = read_progress(self._paths.run(job.id), job.progress_read, self._last_steps[job.id])
            if found.read == job.progress_read:
                return
            self._jobs.record_progress(job.id, found)
            # Not earlier: what is not recorded is read again.
            self._last_steps[job.id] = found.last
            job = self._jobs.get(job.id, None)
            if job.is_finished:
                return

    def _recorded_steps(self, job: Job) -> LastSteps:
        events, _ = self._jobs.events(job.id, None, None, 100)
        points = [event.data for event in events if event.type == "metrics"]
        trained = max((point["step"] for point in points if "eval_loss" not in point), default=0)
        return LastSteps(trained, max((point["step"] for point in points if "eval_loss" in point), default=0))

    def _finish_by_result(self, job: Job) -> bool:
        """Finish a job whose process has left its result. Returns whether it had."""
        result = read_result(self._paths.run(job.id))
        if result is None:
            return False
        if result["status"] == "succeeded":
            self._keep_metrics(job)
            if self._jobs.succeed(
                job.id, job.spec.adapter, result["version"], result["chosen_step"], result["trained_tokens"]
            ):
                self._finished(job, Published(job.spec.adapter, result["version"], result["digest"]))
        else:
            self._fail(job, result["code"], result["message"], result["param"])
        return True

    def _keep_metrics(self, job: Job) -> None:
        """Make the file of a job's metrics. The job's events have them too, so a full disk fails no job."""
        events: list[JobEvent] = []
        has_more = True
        while has_more:
            page, has_more = self._jobs.events(
                job.id, None, events[-1].seq if events else None, _PAGE, oldest_first=True
            )
            events += page
        content, rows = metrics_csv(event.data for event in events if event.type == "metrics")
        try:
            self._files.add_results(job.id, job.tenant, content, rows)
        except TrainingFileNotStored as error:
            logger.error("the metrics of job %s have no file: %s", job.id, error)

    def _fail(self, job: Job, code: str, message: str, param: str | None = None) -> None:
        if self._jobs.fail(job.id, code, message, param):
            self._finished(job)

    def _finished(self, job: Job, published: Published | None = None) -> None:
        self._clear_at = 0.0
        self._counted.discard(job.id)
        self._last_steps.pop(job.id, None)
        self._faults.pop(job.id, None)
        self._on_finish(self._jobs.get(job.id, None), published)

    def _clear(self, job: Job) -> None:
        """Delete what is left of a finished job; of a cancelled one, also what was published of it."""
        if job.id in self._running:
            return
        if job.base in (None, self._jobs.base):
            self._clear_own(job)
            return
        # Of another base: where a server runs its jobs, that one ends the process first.
        with try_file_lock(str(self._paths.lock_of(job.base))) as is_free:
            if is_free:
                self._clear_own(job)

    def _clear_own(self, job: Job) -> None:
        run = self._paths.run(job.id)
        if job.status != "succeeded" and (publishing := read_publishing(run)) is not None:
            # Its process may have published between the cancellation and its end.
            with suppress(AdapterNotFound):
                if self._has_other(job.spec.adapter, publishing["digest"]):
                    logger.warning("%s is not job %s's any more, and stays", job.spec.adapter, job.id)
                else:
                    self._withdraw(job)
        self._counted.discard(job.id)
        self._last_steps.pop(job.id, None)
        self._files.delete_results()
        # A directory that cannot be deleted must not hold up the others: the sweep tries again.
        self._delete(run)
        self._jobs.mark_cleared(job.id)

    def _has_other(self, name: str, digest: str) -> bool:
        """Whether there is an adapter of this name with other content."""
        try:
            return self._store.resolve(name).digest != digest
        except AdapterNotFound:
            return False
