"""The database of a store's platform: keys, shares, quotas and jobs, in one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from adapters_store import STORE_MARK
from sera_serve.errors import SeraServeError

_FOLDER, _FILE = "access", "access.sqlite3"
_BUSY_SECONDS = 5.0
_BUSY = ("SQLITE_BUSY", "SQLITE_LOCKED")
# Tables that a server holds in memory. `revision` counts changes of these alone: jobs write to others each second.
_HELD = ("keys", "shares", "quotas")
_COUNTED = "".join(
    f"""
    CREATE TRIGGER {table}_{change.lower()} AFTER {change} ON {table}
    BEGIN UPDATE revision SET number = number + 1; END;
    """
    for table in _HELD
    for change in ("INSERT", "UPDATE", "DELETE")
)
# One script for each version. A script that was released is never changed: a new one is added.
MIGRATIONS = (
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        scopes TEXT NOT NULL,
        secret_sha256 TEXT NOT NULL,
        name TEXT NOT NULL,
        created_at REAL NOT NULL,
        expires_at REAL,
        revoked_at REAL
    ) STRICT;
    CREATE INDEX keys_of_tenant ON keys (tenant, created_at);
    CREATE TABLE shares (
        adapter TEXT NOT NULL,
        tenant TEXT NOT NULL,
        created_at REAL NOT NULL,
        PRIMARY KEY (adapter, tenant)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE quotas (
        tenant TEXT NOT NULL,
        field TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (tenant, field)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        kind TEXT NOT NULL,
        rows INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX files_of_tenant ON files (tenant, number);
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        status TEXT NOT NULL,
        spec TEXT NOT NULL,
        metadata TEXT NOT NULL,
        training_file TEXT NOT NULL,
        validation_file TEXT,
        key_id TEXT,
        created_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        estimated_finish REAL,
        kills INTEGER NOT NULL DEFAULT 0,
        progress_read INTEGER NOT NULL DEFAULT 0,
        is_cleared INTEGER NOT NULL DEFAULT 0,
        trained_tokens INTEGER,
        fine_tuned_model TEXT,
        error TEXT
    ) STRICT;
    CREATE INDEX jobs_of_tenant ON jobs (tenant, number);
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE TABLE job_events (
        job TEXT NOT NULL,
        seq INTEGER NOT NULL,
        created_at REAL NOT NULL,
        level TEXT NOT NULL,
        type TEXT NOT NULL,
        message TEXT NOT NULL,
        data TEXT NOT NULL,
        PRIMARY KEY (job, seq)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE job_checkpoints (
        job TEXT NOT NULL,
        step INTEGER NOT NULL,
        created_at REAL NOT NULL,
        model TEXT,
        metrics TEXT NOT NULL,
        PRIMARY KEY (job, step)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE files ADD COLUMN job TEXT;
    ALTER TABLE files ADD COLUMN labels INTEGER NOT NULL DEFAULT 0;
    CREATE UNIQUE INDEX files_of_jobs ON files (job) WHERE job IS NOT NULL;
    """,
    """
    ALTER TABLE jobs ADD COLUMN base TEXT;
    """,
    """
    ALTER TABLE jobs ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN starts_at_checkpoint INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE deleted_items (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        number INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX deleted_of_tenant ON deleted_items (tenant, seq);
    """,
    f"""
    CREATE TABLE revision (number INTEGER NOT NULL) STRICT;
    INSERT INTO revision VALUES (0);
    {_COUNTED}
    CREATE INDEX jobs_not_cleared ON jobs (number) WHERE is_cleared = 0;
    """,
)


class AccessDatabaseError(SeraServeError):
    """The database cannot be read or written."""

    code = "access_database_error"
    status = 503


class AccessDatabase:
    """The SQLite file `access/access.sqlite3` in the directory of a store.

    Any number of threads and processes use it at once. It is made by the first write: a store without keys, shares,
    quotas and jobs has none, and a server on a read-only store only reads. It has a rollback journal, not a write-ahead
    log, which cannot be read on a read-only disk.

    Locking: `_lock` guards the connection, and is held for each transaction. Every method blocks.
    """

    def __init__(self, store: Path) -> None:
        """Name the database of a store. Opens nothing yet."""
        self.path = store / _FOLDER / _FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._empty: sqlite3.Connection | None = None
        # Device and inode of the file that is open.
        self._opened: tuple[int, int] | None = None
        self._is_read_only = False
        self._writes = 0
        # Files that were opened, one after the other.
        self._files = 0

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read from: of empty tables where there is no database yet. Several reads see one moment.

        Raises:
            AccessDatabaseError: The file is damaged, locked, or of a newer release.
        """
        with self._lock, self._typed():
            connection = self._open(create=False) or self._nothing()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a write transaction, which is durable when the block ends without an error.

        Raises:
            AccessDatabaseError: The disk is full or not writable, or as `reading`.
        """
        with self._lock, self._typed():
            connection = self._open(create=True)
            assert connection is not None
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                # A reader may keep it from ending. A transaction that is left open would refuse every later use.
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            self._writes += 1

    def version(self) -> tuple[int, int]:
        """A value that changes with each write, of this process or another one, and with another file in place of this.

        Cheap. Raises as `reading`.
        """
        with self._lock, self._typed():
            connection = self._open(create=False)
            if connection is None:
                return 0, self._writes
            (changes,) = connection.execute("PRAGMA data_version").fetchone()
            return int(changes), self._writes

    def revision(self) -> tuple[int, int]:
        """A value that changes with each change of keys, shares or quotas, as `version` does with each write at all.

        Raises as `reading`.
        """
        with self.reading() as connection:
            (number,) = connection.execute("SELECT number FROM revision").fetchone()
            return self._files, int(number)

    def check(self) -> bool:
        """Read the whole file, without a migration or any other write. Returns whether there is a file.

        Raises:
            AccessDatabaseError: As `reading`.
        """
        with self.inspecting() as connection:
            if connection is None:
                return False
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
        return True

    @contextmanager
    def inspecting(self) -> Iterator[sqlite3.Connection | None]:
        """A connection to read from whose tables may be of an older release, and stay so; None where there is no file.

        Raises:
            AccessDatabaseError: As `reading`.
        """
        with self._lock, self._typed():
            if not self._is_there():
                yield None
                return
            with closing(self._connect()) as connection:
                _known_version(connection)
                yield connection

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        with self._lock:
            for connection in (self._connection, self._empty):
                if connection is not None:
                    connection.close()
            self._connection = self._empty = None

    def __del__(self) -> None:
        # A command ends with its process, and closes nothing. Python 3.13 warns of connections that are left open.
        self.close()

    def _open(self, create: bool) -> sqlite3.Connection | None:
        if create and self._is_read_only and os.access(self.path, os.W_OK):
            # It was opened on a disk that was mounted read-only.
            self._close_file()
        if self._connection is not None:
            # Raises where the file is gone: what was read of it is still right, and no file is not an empty one.
            if _identity(self.path) == self._opened:
                return self._connection
            # It was restored from a backup. SQLite would go on with the old file, and would take the new one's journal
            # for that of the old one (https://www.sqlite.org/howtocorrupt.html, section 2.5).
            self._close_file()
            self._writes += 1
        if not self._is_there():
            if not create:
                return None
            # Where its disk is not mounted, a store is an empty directory. What is written there would be lost.
            self.path.parent.parent.joinpath(STORE_MARK).stat()
            # Hashes of secrets are nobody else's business.
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        opened = _identity(self.path)
        connection = self._connect()
        try:
            connection.execute("PRAGMA synchronous = FULL")
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        if opened != self._opened:
            self._files += 1
        self._connection, self._opened = connection, opened
        self._is_read_only = not os.access(self.path, os.W_OK)
        return connection

    def _close_file(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _nothing(self) -> sqlite3.Connection:
        """Empty tables in memory, which are kept: to make them takes a millisecond."""
        if self._empty is None:
            empty = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._migrate(empty)
            self._empty = empty
        return self._empty

    def _is_there(self) -> bool:
        # A full disk may have taken the file and none of its content.
        return self.path.exists() and self.path.stat().st_size > 0

    def _connect(self) -> sqlite3.Connection:
        mode = "rw" if os.access(self.path, os.W_OK) else "ro"
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if _schema_version(connection) == len(MIGRATIONS):
            return
        if _known_version(connection) and not os.access(self.path, os.W_OK):
            raise AccessDatabaseError(
                f"{_FOLDER}/{_FILE} of the store is of an older release, and cannot be written here; run `sera-serve "
                "keys list` once where it can",
                param="store",
            )
        connection.execute("BEGIN IMMEDIATE")
        try:
            known = _known_version(connection)
            for script in MIGRATIONS[known:]:
                for statement in _statements(script):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.commit()
        except BaseException:
            connection.rollback()
            raise

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            # Clients read this too, and the paths of the server are not theirs to know.
            fault = error.strerror if isinstance(error, OSError) else error
            remedy = "check the disk, and the file's permissions"
            if getattr(error, "sqlite_errorname", "").startswith(_BUSY):
                remedy = "try again, and end the process that keeps it locked (fuser -v names it) if this stays"
            raise AccessDatabaseError(
                f"{_FOLDER}/{_FILE} of the store cannot be used ({fault}); {remedy}", param="store"
            ) from error


def _statements(script: str) -> Iterator[str]:
    """The statements of a script. Those that make triggers have semicolons inside."""
    statement = ""
    for part in script.split(";")[:-1]:
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _known_version(connection: sqlite3.Connection) -> int:
    known = _schema_version(connection)
    if known > len(MIGRATIONS):
        raise AccessDatabaseError(
            f"{_FOLDER}/{_FILE} of the store was written by a newer release of sera-serve; use that release",
            param="store",
        )
    return known


def _schema_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
