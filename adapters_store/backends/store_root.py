"""The root directory of a local store: making and opening it, its locks, and clearing what killed writers left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adapters_store.backends.durable import (
    file_lock,
    make_directory,
    make_empty_file,
    names_in,
    put_text,
    try_file_lock,
)
from adapters_store.backends.name_index import FIRST_SEGMENT
from adapters_store.backends.record_files import StoreRecord, read_record, record_text
from adapters_store.backends.reserve import Reserve
from adapters_store.errors import NotAStore, StoreCorrupted, StoreUnavailable, StoreWriteFailed, UnsupportedStore
from adapters_store.names import is_part
from adapters_store.records import StoreState

STORE_FORMAT = "sera-adapter-store"
STORE_VERSION = 2
# Version 1 has no `references` and no `names`.
OLDEST_VERSION = 1
STORE_MARK = "store.json"
"""The file that makes a directory a store."""
_FOLDERS = ("bundles", "adapters", "retired", "tmp", "locks")
_INDEXES = ("references", f"names/{FIRST_SEGMENT}")
# An ext4 volume mounted as the store's root has this directory from the start.
_FOREIGN_BUT_HARMLESS = {"lost+found"}
# Locks by hash of the adapter's id: their number is bounded, and deleting an adapter deletes no lock.
_LOCK_STRIPES = 256
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# With less, no version fits any more.
_FULL_BYTES = 1 << 20


class StoreRoot:
    """Directory and locks of a store.

    Locks, in the order in which a writer takes them:

    0. `locks/gate`, shared, for a moment: a writer gives it back before it asks for the next lock;
    1. `locks/writers`, shared, for every write;
    2. the stripe of the adapter, for a change to an adapter;
    3. the stripe of a digest, or the lock of the name index; one at a time.

    `exclusive` holds `locks/gate` alone until it has `locks/writers` alone. Without the gate, new writers would share
    `locks/writers` again and again, and `exclusive` might wait for ever. With it, new writers wait at the gate, and
    those that are inside come to an end. No owner of any other lock ever waits for the gate, so no two wait for each
    other. An older release does not know the gate: while it writes, `exclusive` may wait longer. The opening of a store
    makes the gate's file. Where the file is absent, as on a disk that was full then, writers and `exclusive` go without
    it.

    The owner of `locks/writers` alone (`exclusive`) therefore knows that no process writes, and that `tmp` holds
    nothing but what killed writers left.
    """

    def __init__(self, path: str, create: bool) -> None:
        self.path = path
        self.adapters = f"{path}/adapters"
        self.names = f"{path}/names"
        self.scratch = f"{path}/tmp"
        self._locks = f"{path}/locks"
        self._reserve = Reserve(path)
        if self.version() is None:
            if not create:
                raise NotAStore(f"{path} is not an adapter store; check the path", param="store")
            try:
                self._create()
            except OSError as error:
                raise StoreWriteFailed(
                    f"no store can be made at {path}: {error.strerror or error}; name another directory, or mend its "
                    "free space and permissions",
                    param="store",
                ) from error
        self._sweep()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writers' lock shared; turns the system's refusals into `StoreWriteFailed`."""
        with self._refusals_typed():
            with self._gate(shared=True):
                pass
            with file_lock(f"{self._locks}/writers", shared=True):
                self.ensure_reachable()
                yield

    @contextmanager
    def changing(self, adapter: str) -> Iterator[None]:
        """Hold one adapter's lock; only inside `writing`."""
        stripe = int.from_bytes(hashlib.sha256(adapter.encode()).digest()[:4], "big") % _LOCK_STRIPES
        with file_lock(f"{self._locks}/adapters-{stripe:02x}"):
            yield

    @contextmanager
    def referring(self, digest: str) -> Iterator[None]:
        """Hold the lock of a digest's references; only inside `writing` or `exclusive`."""
        with file_lock(f"{self._locks}/bundles-{digest[:2]}"):
            yield

    def make_lock_files(self, digests: Iterable[str]) -> None:
        """Make the files of the locks that a deletion takes last; only inside `writing` or `exclusive`.

        A full disk refuses them then before the deletion is seen, not between its steps.
        """
        for lock in (self.indexing(), *map(self.referring, digests)):
            with lock:
                pass

    @contextmanager
    def indexing(self) -> Iterator[None]:
        """Hold the lock of the name index; only inside `writing` or `exclusive`."""
        with file_lock(f"{self._locks}/names"):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the writers' lock alone, after removing leftovers."""
        with self._refusals_typed(), ExitStack() as held:
            with self._gate(shared=False):
                held.enter_context(file_lock(f"{self._locks}/writers"))
            self.ensure_reachable()
            self._empty_scratch()
            yield

    @contextmanager
    def exclusive_on_reserve(self) -> Iterator[None]:
        """As `exclusive`, for what frees space: the reserve is free meanwhile, and no other writer can take it."""
        with self.exclusive():
            self._reserve.spend()
            try:
                yield
            finally:
                self._fill_reserve()

    def ensure_reachable(self) -> None:
        """Raise `StoreUnavailable` if the store was removed or unmounted."""
        try:
            os.stat(f"{self.path}/{STORE_MARK}")
        except OSError as error:
            # A server's clients are told this too, and need not know where its store is.
            raise StoreUnavailable(
                f"the store cannot be reached: {STORE_MARK}: {error.strerror}; mount or restore the store's directory",
                param="store",
            ) from error

    def state(self) -> StoreState:
        """Whether the store takes new versions; raises `StoreUnavailable` if it is gone."""
        self.ensure_reachable()
        space = os.statvfs(self.path)
        if space.f_flag & os.ST_RDONLY or not os.access(self.scratch, os.W_OK):
            return "read_only"
        # A file system without a fixed number of files reports 0 of 0.
        no_file = space.f_files > 0 and space.f_favail == 0
        return "full" if no_file or space.f_bavail * space.f_frsize < _FULL_BYTES else "writable"

    def adapter_ids(self) -> list[str]:
        """The id of every adapter directory, in order; reads the whole store."""
        tenants = filter(is_part, names_in(self.adapters))
        pairs = ((owner, name) for owner in tenants for name in names_in(f"{self.adapters}/{owner}"))
        return sorted(f"{owner}/{name}" for owner, name in pairs if is_part(name))

    def version(self) -> int | None:
        """The version of the store in this directory; None if there is no store.

        Raises:
            NotAStore: The directory is something else.
            UnsupportedStore: The store was written by a newer release.
        """
        mark = f"{self.path}/{STORE_MARK}"
        try:
            record = read_record(mark, StoreRecord)
        except FileNotFoundError:
            return None
        except StoreCorrupted as error:
            raise NotAStore(f"{mark} does not describe an adapter store; check the path", param="store") from error
        except OSError as error:
            raise NotAStore(f"{self.path} cannot be opened as a store: {error.strerror}", param="store") from error
        if record.format != STORE_FORMAT:
            raise NotAStore(f"{self.path} is a {record.format!r}, not an adapter store", param="store")
        if not OLDEST_VERSION <= record.version <= STORE_VERSION:
            raise UnsupportedStore(
                f"{self.path} has store version {record.version}, this release reads {STORE_VERSION}; "
                "upgrade sera-serve",
                param="store",
            )
        return record.version

    def has_indexes(self) -> bool:
        """Whether the directories of references and names are there."""
        return all(os.path.isdir(f"{self.path}/{folder}") for folder in _INDEXES)

    def make_indexes(self) -> None:
        """Make the directories of references and names, empty; a no-op where they exist."""
        for folder in _INDEXES:
            make_directory(f"{self.path}/{folder}")

    def write_mark(self, version: int) -> None:
        """Record that this directory is a store of this version; only under a lock of writers."""
        mark = StoreRecord(format=STORE_FORMAT, version=version)
        put_text(f"{self.path}/{STORE_MARK}", record_text(mark), self.scratch)

    def _create(self) -> None:
        make_directory(self.path)
        if foreign := _foreign_names(self.path):
            if self.version() is not None:
                # Another process has made it meanwhile, and uses it already.
                return
            raise NotAStore(
                f"{self.path} is no adapter store (it holds {min(foreign)!r}); name an empty directory",
                param="store",
            )
        self._make_folders()
        with file_lock(f"{self._locks}/writers", shared=True):
            self.make_indexes()
            self.write_mark(STORE_VERSION)

    def _make_folders(self) -> None:
        for folder in _FOLDERS:
            make_directory(f"{self.path}/{folder}")

    def _sweep(self) -> None:
        try:
            # A backup may have left out folders that were empty.
            self._make_folders()
            with suppress(OSError):
                make_empty_file(f"{self._locks}/gate")
            with try_file_lock(f"{self._locks}/writers") as exclusive:
                if exclusive:
                    self._empty_scratch()
                    # Not while another process deletes with the reserve.
                    self._fill_reserve()
        except OSError as error:
            # A store on a read-only mount can still be read.
            if error.errno not in _READ_ONLY:
                raise StoreWriteFailed(
                    f"{self.path} could not be opened: {error.strerror} ({error.filename})", param="store"
                ) from error

    @contextmanager
    def _gate(self, shared: bool) -> Iterator[None]:
        with ExitStack() as held:
            # A disk that refuses this refuses the next lock, too.
            with suppress(OSError):
                held.enter_context(file_lock(f"{self._locks}/gate", shared=shared, create=False))
            yield

    def _fill_reserve(self) -> None:
        # A store that is full already has no reserve until something was deleted.
        with suppress(OSError):
            self._reserve.fill()

    def _empty_scratch(self) -> None:
        for name in os.listdir(self.scratch):
            leftover = f"{self.scratch}/{name}"
            if os.path.isdir(leftover):
                shutil.rmtree(leftover)
            else:
                os.unlink(leftover)

    @contextmanager
    def _refusals_typed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.ensure_reachable()
            # A server's clients are told this too, and need not know where its store is.
            inside = f"{self.path}/"
            # Of a move, the file that was to be there: the unfinished one is gone.
            path = error.filename2 or error.filename
            where = f" ({path.removeprefix(inside)})" if isinstance(path, str) and path.startswith(inside) else ""
            raise StoreWriteFailed(
                f"the store could not be written: {error.strerror or error}{where}; "
                "check free space and permissions, then try again",
                param="store",
            ) from error


def is_new_store(path: Path | str) -> bool:
    """Whether a store would be made at a path: nothing is there, or an empty directory. Makes nothing."""
    folder = os.path.abspath(path)
    if not os.path.lexists(folder):
        return True
    return os.path.isdir(folder) and not os.path.lexists(f"{folder}/{STORE_MARK}") and not _foreign_names(folder)


def _foreign_names(path: str) -> set[str]:
    # The mark comes last, so a kill while a store is made leaves only these folders.
    return set(names_in(path)) - {*_FOLDERS, "reserve", "references", "names", STORE_MARK} - _FOREIGN_BUT_HARMLESS


def is_full(error: StoreWriteFailed) -> bool:
    """Whether a write failed because the disk or a quota is full."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL


def is_read_only(error: StoreWriteFailed) -> bool:
    """Whether a write failed because the store must not be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _READ_ONLY
