"""The jobs in the database: their statuses, events and checkpoints, and which of them is next."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from adapters_store import BaseInfo
from sera_serve.access import AccessDatabase
from sera_serve.errors import Overloaded, SeraServeError
from sera_serve.jobs.cursors import keep_place, place_of
from sera_serve.jobs.files import UNFINISHED, no_file
from sera_serve.jobs.spec import JobSpec

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]
MAX_UNFINISHED = 100
"""Jobs of one tenant that have not finished."""
# Finished jobs of one tenant that are remembered.
_MAX_KEPT = 1000
_MAX_EVENTS = 2000
_MAX_MESSAGE = 2000
_COLUMNS = (
    "id, tenant, status, spec, metadata, training_file, validation_file, key_id, created_at, started_at, finished_at, "
    "estimated_finish, kills, progress_read, trained_tokens, fine_tuned_model, error, number, base, "
    "(SELECT files.id FROM files WHERE files.job = jobs.id), starts, starts_at_checkpoint"
)


class JobNotFound(SeraServeError):
    """There is no job of this id, or it is another tenant's."""

    code = "job_not_found"
    status = 404


class JobEnded(SeraServeError):
    """The job has finished, so it cannot be cancelled."""

    code = "job_ended"
    status = 409


class TooManyJobs(Overloaded):
    """As many jobs of the tenant as allowed have not finished."""

    code = "too_many_jobs"
    status = 429


@dataclass(frozen=True)
class Job:
    """One job. Times are seconds since 1970, or None where it is not so far.

    Attributes:
        id: `ftjob-` and random digits.
        tenant: Whose it is.
        status: One of `STATUSES`.
        spec: What it trains.
        metadata: The client's own notes.
        training_file: Id of a file, which may be deleted once the job has finished.
        validation_file: As `training_file`, or None.
        key_id: The key that made it, or None.
        created_at: When it was made.
        started_at: When a process first began to train it; later than that of every job that began before.
        finished_at: When it succeeded, failed or was cancelled.
        estimated_finish: When it will finish, as far as is known.
        kills: How often the system has ended its process.
        progress_read: Bytes of the process's progress that are recorded.
        trained_tokens: Tokens that it has learned from, once it has succeeded.
        fine_tuned_model: The adapter, once it is published.
        error: `code`, `message` and `param` of a failure.
        number: Jobs in the order in which they came.
        base: `base_id` of the base that it trains on. None in a job of an older release.
        result_file: Id of the file with its metrics, or None: it has not succeeded, or the file was deleted.
        starts: Starts by a server that did not end it on purpose: that server was killed, or runs it now.
        starts_at_checkpoint: What `starts` was at the last checkpoint.
    """

    id: str
    tenant: str
    status: JobStatus
    spec: JobSpec
    metadata: dict[str, str]
    training_file: str
    validation_file: str | None
    key_id: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    estimated_finish: float | None
    kills: int
    progress_read: int
    trained_tokens: int | None
    fine_tuned_model: str | None
    error: dict[str, Any] | None
    number: int
    base: str | None
    result_file: str | None
    starts: int = 0
    starts_at_checkpoint: int = 0

    @property
    def starts_in_vain(self) -> int:
        """Starts in a row of `starts` that have brought no checkpoint, or not yet."""
        return self.starts - self.starts_at_checkpoint

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.finished_at is not None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job: a message, or the metrics of a step. `seq` counts from 1."""

    seq: int
    created_at: float
    level: Level
    type: EventType
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The end of an epoch: its step and metrics; `model` is the version that was published of it, or None."""

    step: int
    created_at: float
    model: str | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class NewEvent:
    """An event that is not recorded yet."""

    message: str
    level: Level = "info"
    type: EventType = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LastSteps:
    """The last steps whose loss, and whose evaluation, are recorded."""

    trained: int = 0
    evaluated: int = 0


@dataclass
class Reported:
    """What a process has reported since it was last asked.

    Attributes:
        read: Bytes of its progress, from the beginning.
        last: The last steps in it.
        events: Of the job.
        checkpoints: Ends of epochs.
        estimated_finish: Seconds since 1970, or None.
        has_saved: Whether it has saved a checkpoint that a process started again goes on from.
    """

    read: int
    last: LastSteps
    events: list[NewEvent]
    checkpoints: list[Checkpoint]
    estimated_finish: float | None = None
    has_saved: bool = False


def new_job_id() -> str:
    """Make the id of a job."""
    return f"ftjob-{secrets.token_hex(12)}"


def base_id(base: BaseInfo) -> str:
    """A name for what makes a base another one: 32 hexadecimal digits."""
    identity = base.model_dump_json(exclude={"name"})
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


class Jobs:
    """The jobs of all tenants. Every method blocks, and raises AccessDatabaseError.

    A job finishes once: whoever finishes it first decides how, a cancellation or its process. Servers of several bases
    may have one store: each sees all jobs, and makes and runs those of its own base.

    Attributes:
        base: `base_id` of this server's base.
    """

    def __init__(self, database: AccessDatabase, base: str) -> None:
        """Use the database of a store, for a base."""
        self._database = database
        self.base = base

    def create(
        self,
        job_id: str,
        tenant: str,
        spec: JobSpec,
        metadata: Mapping[str, str],
        training_file: str,
        validation_file: str | None,
        key_id: str | None,
        check: Callable[[int], None] = lambda unfinished: None,
    ) -> Job:
        """Record a job, which waits for its files to be checked.

        Args:
            job_id: Of `new_job_id`.
            tenant: Whose it is.
            spec: What it trains.
            metadata: The client's own notes.
            training_file: Id of a file.
            validation_file: Id of a file, or None.
            key_id: The key that makes it, or None.
            check: Called with the number of the tenant's unfinished jobs. What it raises refuses the job.

        Raises:
            TooManyJobs: The tenant has as many unfinished jobs as it may have.
            TrainingFileNotFound: A file was deleted meanwhile.
        """
        with self._database.writing() as connection:
            unfinished = _unfinished(connection, tenant)
            check(unfinished)
            if unfinished >= MAX_UNFINISHED:
                raise TooManyJobs(
                    f"tenant {tenant} has {unfinished} jobs that have not finished, the most it may have; cancel one, "
                    "or wait for its end",
                    retry_after=60,
                )
            for param, file_id in (("training_file", training_file), ("validation_file", validation_file)):
                found = connection.execute("SELECT 1 FROM files WHERE id = ?", (file_id,)).fetchone()
                if file_id is not None and found is None:
                    raise no_file(file_id, param)
            notes, now = json.dumps(dict(metadata)), time.time()
            connection.execute(
                "INSERT INTO jobs (id, tenant, status, spec, metadata, training_file, validation_file, key_id, "
                "created_at, base) VALUES (?, ?, 'validating_files', ?, ?, ?, ?, ?, ?, ?)",
                (job_id, tenant, spec.as_json(), notes, training_file, validation_file, key_id, now, self.base),
            )
            _add_events(connection, job_id, [NewEvent(f"Created fine-tuning job: {job_id}")])
            _forget_oldest(connection, tenant)
            return _get(connection, job_id, tenant)

    def get(self, job_id: str, tenant: str | None) -> Job:
        """Return a job. `tenant` None sees the jobs of all tenants.

        Raises:
            JobNotFound: There is none, or it is another tenant's.
        """
        with self._database.reading() as connection:
            return _get(connection, job_id, tenant)

    def page(
        self, tenant: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """Return (jobs, whether there are more), the newest first.

        Args:
            tenant: Whose jobs; None sees those of all tenants.
            after: Id of the last job of the previous page, which may be forgotten meanwhile.
            limit: Most jobs.
            metadata: Only jobs that have these pairs; with no pair, only jobs without metadata.

        Raises:
            JobNotFound: `after` names no job of the tenant.
        """
        where: list[str] = ["1"]
        values: list[Any] = []
        if tenant is not None:
            where.append("tenant = ?")
            values.append(tenant)
        with self._database.reading() as connection:
            if after is not None:
                if (place := place_of(connection, "jobs", after, tenant)) is None:
                    raise _no_job(after, "after")
                where.append("number < ?")
                values.append(place)
            if metadata is not None:
                # SQLite's own JSON functions compare keys with escapes differently from release to release.
                connection.create_function("has_metadata", 1, lambda text: _has(json.loads(text), metadata))
                where.append("has_metadata(metadata)")
            query = f"SELECT {_COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT {limit + 1}"
            rows = connection.execute(query, values).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def unfinished(self, tenant: str) -> int:
        """Number of a tenant's jobs that have not finished."""
        with self._database.reading() as connection:
            return _unfinished(connection, tenant)

    def cancel(self, job_id: str, tenant: str | None) -> Job:
        """Finish a job as cancelled; a job that is cancelled already stays so.

        Raises:
            JobNotFound: As `get`.
            JobEnded: It has succeeded or failed.
        """
        with self._database.writing() as connection:
            job = _get(connection, job_id, tenant)
            if job.status == "cancelled":
                return job
            if job.is_finished:
                raise JobEnded(f"job {job_id} has {job.status}; only a job that has not finished can be cancelled")
            _finish(connection, job_id, "cancelled", {})
            _add_events(connection, job_id, [NewEvent("The job was cancelled")])
            return _get(connection, job_id, tenant)

    def events(
        self, job_id: str, tenant: str | None, after: int | None, limit: int, *, oldest_first: bool = False
    ) -> tuple[list[JobEvent], bool]:
        """Return (events, whether there are more), the newest first, or the oldest first.

        Args:
            job_id: The job.
            tenant: As `get`.
            after: The `seq` of the last event that the caller has, or None.
            limit: Events at most.
            oldest_first: The order.

        Raises:
            JobNotFound: As `get`.
        """
        comes_after, direction = (">", "ASC") if oldest_first else ("<", "DESC")
        with self._database.reading() as connection:
            _get(connection, job_id, tenant)
            rows = connection.execute(
                "SELECT seq, created_at, level, type, message, data FROM job_events WHERE job = ? "
                f"AND (? IS NULL OR seq {comes_after} ?) ORDER BY seq {direction} LIMIT ?",
                (job_id, after, after, limit + 1),
            ).fetchall()
        events = [JobEvent(seq, at, level, kind, text, json.loads(data)) for seq, at, level, kind, text, data in rows]
        return events[:limit], len(events) > limit

    def checkpoints(
        self, job_id: str, tenant: str | None, after: int | None, limit: int
    ) -> tuple[list[Checkpoint], bool]:
        """Return (checkpoints, whether there are more), the newest first; arguments and errors as `events`."""
        with self._database.reading() as connection:
            _get(connection, job_id, tenant)
            rows = connection.execute(
                "SELECT step, created_at, model, metrics FROM job_checkpoints WHERE job = ? "
                "AND (? IS NULL OR step < ?) ORDER BY step DESC LIMIT ?",
                (job_id, after, after, limit + 1),
            ).fetchall()
        found = [Checkpoint(step, at, model, json.loads(metrics)) for step, at, model, metrics in rows]
        return found[:limit], len(found) > limit

    def counts(self) -> dict[JobStatus, int]:
        """How many jobs of each status are remembered, of all tenants."""
        with self._database.reading() as connection:
            found = dict(connection.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in STATUSES}

    def of_status(self, status: JobStatus) -> list[Job]:
        """The jobs of this base and a status, the oldest first."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE status = ? AND base = ? ORDER BY number"
        with self._database.reading() as connection:
            rows = connection.execute(query, (status, self.base)).fetchall()
        return [_job(row) for row in rows]

    def next_queued(self, running: Collection[str] = ()) -> Job | None:
        """The job of this base that is next: the oldest of the tenant with the fewest in `running`, then longest ago.

        Args:
            running: The tenant of each job that runs.
        """
        with self._database.reading() as connection:
            turns = connection.execute(
                "SELECT tenant, min(number), (SELECT max(started_at) FROM jobs AS past WHERE past.tenant = jobs.tenant)"
                " FROM jobs WHERE status = 'queued' AND base = ? GROUP BY tenant",
                (self.base,),
            ).fetchall()
            if not turns:
                return None
            of_tenant = list(running)
            _, number, _ = min(turns, key=lambda turn: (of_tenant.count(turn[0]), turn[2] or 0, turn[1]))
            row = connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE number = ?", (number,)).fetchone()
        return _job(row)

    def advance(self, job_id: str, status: Literal["queued", "running"], event: NewEvent) -> bool:
        """Move an unfinished job on; to `running` counts a start. Returns False if it has finished meanwhile."""
        with self._database.writing() as connection:
            done = connection.execute(
                # Later than the last one, also where the clock was set back: the order decides whose turn is next.
                f"UPDATE jobs SET status = ?, started_at = CASE WHEN ? = 'running' THEN coalesce(started_at, "
                "max(?, (SELECT coalesce(max(started_at), 0) + 0.001 FROM jobs))) END, starts = starts + ? "
                f"WHERE id = ? AND status IN {UNFINISHED}",
                (status, status, time.time(), status == "running", job_id),
            )
            if done.rowcount == 0:
                return False
            _add_events(connection, job_id, [event])
        return True

    def take_back_starts(self, job_ids: Collection[str]) -> None:
        """Count the last start of each job no more: its server ends on purpose."""
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE jobs SET starts = starts - 1, starts_at_checkpoint = min(starts_at_checkpoint, starts - 1) "
                "WHERE id = ? AND starts > 0",
                [(job_id,) for job_id in job_ids],
            )

    def count_kill(self, job_id: str, event: NewEvent) -> None:
        """Record that the system has ended the job's process."""
        with self._database.writing() as connection:
            connection.execute("UPDATE jobs SET kills = kills + 1 WHERE id = ?", (job_id,))
            _add_events(connection, job_id, [event])

    def record_progress(self, job_id: str, found: Reported) -> None:
        """Record what the job's process has reported, once."""
        with self._database.writing() as connection:
            done = connection.execute(
                f"UPDATE jobs SET progress_read = ?, estimated_finish = coalesce(?, estimated_finish), "
                "starts_at_checkpoint = CASE WHEN ? THEN starts ELSE starts_at_checkpoint END "
                f"WHERE id = ? AND progress_read < ? AND status IN {UNFINISHED}",
                (found.read, found.estimated_finish, found.has_saved, job_id, found.read),
            )
            if done.rowcount:
                _add_events(connection, job_id, found.events)
                for held in found.checkpoints:
                    connection.execute(
                        "INSERT OR REPLACE INTO job_checkpoints VALUES (?, ?, ?, ?, ?)",
                        (job_id, held.step, held.created_at, held.model, _json(held.metrics)),
                    )

    def succeed(self, job_id: str, model: str, version: int, chosen_step: int, tokens: int) -> bool:
        """Finish a job whose adapter is published. Returns False if it had finished before: it was cancelled."""
        with self._database.writing() as connection:
            if not _finish(connection, job_id, "succeeded", {"fine_tuned_model": model, "trained_tokens": tokens}):
                return False
            connection.execute(
                "UPDATE job_checkpoints SET model = ? WHERE job = ? AND step = ?",
                (f"{model}@v{version}", job_id, chosen_step),
            )
            _add_events(
                connection,
                job_id,
                [
                    NewEvent(f"New fine-tuned model created: {model}", data={"model": model, "version": version}),
                    NewEvent("The job has successfully completed"),
                ],
            )
        return True

    def fail(self, job_id: str, code: str, message: str, param: str | None) -> bool:
        """Finish a job as failed. Returns False if it had finished before."""
        error = {"code": code, "message": _storable(message)[:_MAX_MESSAGE], "param": param}
        with self._database.writing() as connection:
            if not _finish(connection, job_id, "failed", {"error": json.dumps(error)}):
                return False
            _add_events(connection, job_id, [NewEvent(f"The job failed: {message}", "error", data=error)])
        return True

    def adopt(self) -> None:
        """Take the jobs of older releases, which did not note their base, for jobs of this one."""
        # Unfinished ones, which an index finds: this is asked in each round. Finished ones are cleared without a base.
        which = f"base IS NULL AND status IN {UNFINISHED}"
        with self._database.reading() as connection:
            if connection.execute(f"SELECT 1 FROM jobs WHERE {which}").fetchone() is None:
                return
        with self._database.writing() as connection:
            connection.execute(f"UPDATE jobs SET base = ? WHERE {which}", (self.base,))

    def uncleared(self) -> list[Job]:
        """Finished jobs, of any base, whose directory may still be there, the oldest first, 50 at most."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE is_cleared = 0 AND finished_at IS NOT NULL ORDER BY number LIMIT 50"
        with self._database.reading() as connection:
            rows = connection.execute(query).fetchall()
        return [_job(row) for row in rows]

    def with_directories(self) -> set[str]:
        """Ids of the jobs, of any base, that may have a directory: unfinished ones, and those of `uncleared`."""
        with self._database.reading() as connection:
            query = "SELECT id FROM jobs WHERE is_cleared = 0"
            return {job_id for (job_id,) in connection.execute(query).fetchall()}

    def mark_cleared(self, job_id: str) -> None:
        """Record that nothing of a finished job's process is left, but maybe a directory that cannot be deleted."""
        with self._database.writing() as connection:
            connection.execute("UPDATE jobs SET is_cleared = 1 WHERE id = ?", (job_id,))


def _get(connection: sqlite3.Connection, job_id: str, tenant: str | None) -> Job:
    row = connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None or tenant not in (None, row[1]):
        raise _no_job(job_id)
    return _job(row)


def _job(row: Sequence[Any]) -> Job:
    values: dict[str, Any] = dict(zip((field.name for field in fields(Job)), row, strict=True))
    values["spec"] = JobSpec.from_json(values["spec"])
    values["metadata"] = json.loads(values["metadata"])
    values["error"] = None if values["error"] is None else json.loads(values["error"])
    return Job(**values)


def _has(held: dict[str, str], wanted: Mapping[str, str]) -> bool:
    return wanted.items() <= held.items() if wanted else not held


def _unfinished(connection: sqlite3.Connection, tenant: str) -> int:
    query = f"SELECT count(*) FROM jobs WHERE tenant = ? AND status IN {UNFINISHED}"
    (count,) = connection.execute(query, (tenant,)).fetchone()
    return int(count)


def _finish(connection: sqlite3.Connection, job_id: str, status: JobStatus, values: Mapping[str, Any]) -> bool:
    given = {"status": status, "finished_at": time.time(), "estimated_finish": None, **values}
    assigned = ", ".join(f"{name} = ?" for name in given)
    query = f"UPDATE jobs SET {assigned} WHERE id = ? AND status IN {UNFINISHED}"
    return connection.execute(query, (*given.values(), job_id)).rowcount > 0


def _add_events(connection: sqlite3.Connection, job_id: str, events: Sequence[NewEvent]) -> None:
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM job_events WHERE job = ?", (job_id,)).fetchone()
    now = time.time()
    for event in events:
        # The end of a job is always told.
        if event.type == "metrics" and last >= _MAX_EVENTS:
            continue
        last += 1
        message = _storable(event.message)[:_MAX_MESSAGE]
        row = (job_id, last, now, event.level, event.type, message, _json(event.data or {}))
        connection.execute("INSERT INTO job_events VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _storable(text: str) -> str:
    """A text that the database and an answer can hold: half of a surrogate pair, from a tenant's rows, becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json(values: Mapping[str, Any]) -> str:
    # Without escapes, which would keep halves of surrogate pairs.
    return _storable(json.dumps(dict(values), ensure_ascii=False))


def _forget_oldest(connection: sqlite3.Connection, tenant: str) -> None:
    oldest = connection.execute(
        "SELECT id, number FROM jobs WHERE tenant = ? AND is_cleared = 1 ORDER BY number DESC LIMIT -1 OFFSET ?",
        (tenant, _MAX_KEPT),
    ).fetchall()
    for job_id, number in oldest:
        keep_place(connection, job_id, tenant, number)
        for table, column in (("job_events", "job"), ("job_checkpoints", "job"), ("jobs", "id")):
            connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (job_id,))


def _no_job(job_id: str, param: str = "job_id") -> JobNotFound:
    return JobNotFound(f"job {job_id[:64]!r} does not exist; GET /v1/fine_tuning/jobs lists the jobs", param=param)
