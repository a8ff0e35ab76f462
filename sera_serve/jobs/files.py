"""Files of training rows and of jobs' results: bytes below `jobs/files/`, everything else in the database."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from adapters_store.backends.durable import sync
from sera_serve.access import AccessDatabase
from sera_serve.errors import SeraServeError, counted
from sera_serve.jobs.cursors import keep_place, place_of
from sera_serve.jobs.paths import JobPaths
from sera_serve.jobs.rows import RowKind, check_rows

MAX_FILES = 1000
"""Files that one tenant may upload."""
Purpose = Literal["fine-tune", "fine-tune-results"]
FileKind = RowKind | Literal["metrics"]
UNFINISHED = "('validating_files', 'queued', 'running')"
"""The statuses of jobs that have not finished, for SQL."""
_COLUMNS = "id, tenant, filename, purpose, bytes, sha256, kind, rows, created_at, number, job, labels"
# The database of an older release may have no such table yet.
_HAS_FILES = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'files'"
_PART = ".part"


class TrainingFileNotFound(SeraServeError):
    """There is no file of this id, or it is another tenant's."""

    code = "file_not_found"
    status = 404


class TrainingFileMissing(SeraServeError):
    """The file is recorded, and its bytes are gone: a disk lost them, or a copy of the store left them out."""

    code = "file_missing"
    status = 404


class FileInUse(SeraServeError):
    """A job that has not finished needs the file."""

    code = "file_in_use"
    status = 409


class TooManyFiles(SeraServeError):
    """The files of the tenant take as much space as the server gives to one tenant."""

    code = "too_many_files"
    status = 422


class TrainingFileNotStored(SeraServeError):
    """The file cannot be written to the store, or read from it."""

    code = "file_not_stored"
    status = 507


@dataclass(frozen=True)
class TrainingFile:
    """One file: uploaded, or the metrics of a job.

    Attributes:
        id: `file-` and random digits.
        tenant: Whose it is.
        filename: What the client called it. It names nothing here.
        purpose: `fine-tune` of an uploaded file, `fine-tune-results` of a job's.
        nbytes: Size.
        sha256: Of the bytes, hexadecimal.
        kind: What each row has: `metrics` in a job's file.
        rows: Number of rows.
        created_at: Seconds since 1970.
        number: Files in the order in which they came.
        job: Id of the job whose results they are, or None.
        labels: Number of different labels. It is 0 for rows without labels, and for files of older releases.
    """

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    nbytes: int
    sha256: str
    kind: FileKind
    rows: int
    created_at: float
    number: int
    job: str | None = None
    labels: int = 0


class TrainingFiles:
    """The files of all tenants. Every method blocks, and raises AccessDatabaseError.

    A file is written under another name, synced, renamed, and then recorded. Whoever writes holds a lock of the file,
    so `sweep` deletes only what a killed server has left.
    """

    def __init__(self, database: AccessDatabase, paths: JobPaths, max_tenant_bytes: int) -> None:
        """Use a database and directories.

        Args:
            database: Of the store.
            paths: Of the store.
            max_tenant_bytes: Bytes that all files of one tenant may have.
        """
        self._database = database
        self._paths = paths
        self._max_tenant_bytes = max_tenant_bytes

    def add(self, tenant: str, filename: str, source: BinaryIO) -> TrainingFile:
        """Check the rows of a file, and keep it.

        Raises:
            InvalidTrainingFile: A row cannot be used.
            TooManyFiles: The tenant has no space left.
            TrainingFileNotStored: The disk is full or not writable.
        """
        checked = check_rows(source)
        check = partial(self._check_space, tenant=tenant, nbytes=checked.nbytes)
        with self._database.reading() as connection:
            check(connection)
        values = {
            "id": f"file-{secrets.token_hex(12)}",
            "tenant": tenant,
            "filename": filename,
            "purpose": "fine-tune",
            "bytes": checked.nbytes,
            "sha256": checked.sha256,
            "kind": checked.kind,
            "rows": checked.rows,
            "labels": checked.labels,
        }
        # The limit again with the record: other uploads of the tenant may have come between.
        return self._keep(source, values, check)

    def add_results(self, job_id: str, tenant: str, content: bytes, rows: int) -> TrainingFile:
        """Keep the metrics of a job, instead of those that an earlier process of it may have left.

        No limit refuses them. Their bytes count as the tenant's. One server at a time does this for a job.

        Raises:
            TrainingFileNotStored: The disk is full or not writable.
        """
        values = {
            "id": results_id(job_id),
            "tenant": tenant,
            "filename": f"{job_id}.csv",
            "purpose": "fine-tune-results",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "kind": "metrics",
            "rows": rows,
            "job": job_id,
        }
        return self._keep(io.BytesIO(content), values)

    def _keep(
        self,
        source: BinaryIO,
        values: Mapping[str, Any],
        check: Callable[[sqlite3.Connection], None] = lambda connection: None,
    ) -> TrainingFile:
        """Write a file, and record it by the values of its columns, after a last check in the same transaction."""
        file_id = values["id"]
        kept, part = self._paths.file(file_id), self._paths.file(file_id + _PART)
        try:
            self._paths.make()
            # Of a server that was killed while it wrote results: these have the same name each time.
            part.unlink(missing_ok=True)
            with part.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Results that an earlier try has left may be recorded: they stay, whatever comes of this try.
                left = [part] if kept.exists() else [part, kept]
                try:
                    _copy(source, file)
                    part.rename(kept)
                    sync(str(self._paths.files))
                    return self._insert(values, check)
                except BaseException:
                    for path in left:
                        path.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise TrainingFileNotStored(
                f"the file could not be written to the store ({error.strerror or error}); free space on its disk",
                param="file",
            ) from error

    def get(self, file_id: str, tenant: str | None, param: str = "file_id") -> TrainingFile:
        """Return a file. `tenant` None sees the files of all tenants; `param` is what named the file.

        Raises:
            TrainingFileNotFound: There is none, or it is another tenant's.
        """
        with self._database.reading() as connection:
            row = connection.execute(f"SELECT {_COLUMNS} FROM files WHERE id = ?", (file_id,)).fetchone()
        if row is None or tenant not in (None, row[1]):
            raise no_file(file_id, param)
        return _file(row)

    def page(
        self,
        tenant: str | None,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> tuple[list[TrainingFile], bool]:
        """Return (files, whether there are more), the newest first by default; of one purpose, or of both.

        The page begins after the file `after`, which may have been deleted meanwhile.

        Raises:
            TrainingFileNotFound: `after` names no file of the tenant.
        """
        comes_after, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        where: list[str] = ["1"]
        values: list[Any] = []
        if tenant is not None:
            where.append("tenant = ?")
            values.append(tenant)
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        with self._database.reading() as connection:
            if after is not None:
                place = place_of(connection, "files", after, tenant)
                if place is None:
                    raise no_file(after, "after")
                where.append(f"number {comes_after} ?")
                values.append(place)
            order_by = f"ORDER BY number {direction} LIMIT {limit + 1}"
            query = f"SELECT {_COLUMNS} FROM files WHERE {' AND '.join(where)} {order_by}"
            rows = connection.execute(query, values).fetchall()
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def path(self, file: TrainingFile) -> Path:
        """Where the bytes of a file lie."""
        return self._paths.file(file.id)

    def open(self, file_id: str, tenant: str | None) -> tuple[TrainingFile, BinaryIO]:
        """A file, and its bytes to read from. The caller closes them.

        Raises:
            TrainingFileNotFound: As `get`.
            TrainingFileMissing: The bytes are gone.
            TrainingFileNotStored: The disk does not give them.
        """
        file = self.get(file_id, tenant)
        try:
            return file, self.path(file).open("rb")
        except FileNotFoundError as error:
            raise missing_file(file_id, "file_id") from error
        except OSError as error:
            raise TrainingFileNotStored(
                f"file {file_id} cannot be read ({error.strerror}); delete it, and upload it again", param="file_id"
            ) from error

    def delete(self, file_id: str, tenant: str | None) -> TrainingFile:
        """Delete a file, and return what it was.

        Raises:
            TrainingFileNotFound: As `get`.
            FileInUse: A job that has not finished needs it.
        """
        file = self.get(file_id, tenant)
        with self._database.writing() as connection:
            used = connection.execute(
                f"SELECT id FROM jobs WHERE status IN {UNFINISHED} AND ? IN (training_file, validation_file)",
                (file_id,),
            ).fetchone()
            if used is not None:
                raise FileInUse(
                    f"job {used[0]} needs file {file_id}; cancel the job, or wait for its end", param="file_id"
                )
            if connection.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount == 0:
                raise no_file(file_id)
            keep_place(connection, file_id, file.tenant, file.number)
        # A kill before this line leaves bytes without a record, which `sweep` deletes.
        with suppress(OSError):
            self.path(file).unlink(missing_ok=True)
        return file

    def delete_results(self) -> None:
        """Delete the results of jobs that have not succeeded, and of those that are remembered no more."""
        query = (
            f"SELECT {_COLUMNS} FROM files WHERE job IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM jobs WHERE jobs.id = files.job AND status NOT IN ('failed', 'cancelled'))"
        )
        with self._database.reading() as connection:
            found = [_file(row) for row in connection.execute(query).fetchall()]
        for file in found:
            with suppress(TrainingFileNotFound):
                self.delete(file.id, None)

    def has_records(self) -> bool:
        """Whether the store has its database. Without it, no file has a record, and none may be deleted for that."""
        # A read opens the database. From then on, a database that is moved away is an error and not an empty one.
        with self._database.reading(), suppress(FileNotFoundError):
            return self._database.path.stat().st_size > 0
        return False

    def sweep(self) -> int:
        """Delete bytes that no record names and nobody writes. Returns their number; raises OSError."""
        if not self._paths.files.is_dir() or not self.has_records():
            return 0
        swept = 0
        # A disk that is mounted there may have other entries of its own.
        for path in self._paths.files.glob("file-*"):
            if self._is_recorded(path.name):
                continue
            with suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Another server receives it.
                    continue
                if not self._is_recorded(path.name):
                    path.unlink()
                    swept += 1
        return swept

    def _is_recorded(self, file_id: str) -> bool:
        try:
            self.get(file_id, None)
        except TrainingFileNotFound:
            return False
        return True

    def _check_space(self, connection: sqlite3.Connection, tenant: str, nbytes: int) -> None:
        # The server makes the results of jobs, so their number refuses no upload.
        query = "SELECT count(*) FILTER (WHERE job IS NULL), coalesce(sum(bytes), 0) FROM files WHERE tenant = ?"
        count, used = connection.execute(query, (tenant,)).fetchone()
        if count >= MAX_FILES or used + nbytes > self._max_tenant_bytes:
            raise TooManyFiles(
                f"tenant {tenant} has {counted(count, 'file')} of {used} bytes; the limits are {MAX_FILES} files and "
                f"{self._max_tenant_bytes} bytes: delete some",
                param="file",
            )

    def _insert(self, values: Mapping[str, Any], check: Callable[[sqlite3.Connection], None]) -> TrainingFile:
        given = {**values, "created_at": time.time()}
        columns, marks = ", ".join(given), ", ".join("?" * len(given))
        with self._database.writing() as connection:
            check(connection)
            connection.execute(f"INSERT OR REPLACE INTO files ({columns}) VALUES ({marks})", tuple(given.values()))
            row = connection.execute(f"SELECT {_COLUMNS} FROM files WHERE id = ?", (given["id"],)).fetchone()
        return _file(row)


def missing_files(database: AccessDatabase, paths: JobPaths) -> list[str]:
    """Ids of the recorded files whose bytes are not there, or are of another size. Blocks, and changes nothing.

    Raises:
        AccessDatabaseError: The database cannot be read.
    """
    rows = _recorded(database)
    missing = [file_id for file_id, nbytes in rows.items() if _size_of(paths.file(file_id)) != nbytes]
    # A server may have deleted some meanwhile.
    still_there = _recorded(database) if missing else {}
    return [file_id for file_id in missing if file_id in still_there]


def _recorded(database: AccessDatabase) -> dict[str, int]:
    """Bytes by id of all files."""
    with database.inspecting() as connection:
        if connection is None or not connection.execute(_HAS_FILES).fetchone()[0]:
            return {}
        return dict(connection.execute("SELECT id, bytes FROM files ORDER BY number").fetchall())


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def results_id(job_id: str) -> str:
    """The id of the file with a job's metrics. A job that is finished twice has one."""
    return f"file-{job_id.rpartition('-')[2]}"


def no_file(file_id: str, param: str = "file_id") -> TrainingFileNotFound:
    """The refusal of a file that is not there, or that the caller may not know of."""
    return TrainingFileNotFound(f"file {file_id[:64]!r} does not exist; GET /v1/files lists the files", param=param)


def missing_file(file_id: str, param: str) -> TrainingFileMissing:
    """The error of a file that is recorded, and whose bytes are gone."""
    return TrainingFileMissing(f"file {file_id} is missing; upload it again", param=param)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target)
    target.flush()
    os.fsync(target.fileno())


def _file(row: tuple[object, ...]) -> TrainingFile:
    return TrainingFile(*row)  # type: ignore[arg-type]
