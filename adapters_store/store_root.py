"""The root directory of a store: making and opening it, its locks, and clearing what killed writers left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from adapters_store.durable import file_lock, make_directory, names_in, put_text, try_file_lock
from adapters_store.errors import NotAStore, StoreCorrupted, StoreWriteFailed, UnsupportedStore
from adapters_store.names import is_part
from adapters_store.records import StoreRecord, read_record, record_text

STORE_FORMAT = "sera-adapter-store"
STORE_VERSION = 1
_MARK = "store.json"
_FOLDERS = ("bundles", "adapters", "retired", "tmp", "locks")
# An ext4 volume mounted as the store's root has this from the start.
_FOREIGN_BUT_HARMLESS = {"lost+found"}
# Locks by hash of the adapter's id: their number is bounded, and deleting an adapter deletes no lock.
_LOCK_STRIPES = 256


class StoreRoot:
    """Directory and locks of a store.

    Locks: every write holds `locks/writers` shared, a change to an adapter its stripe too, in this order.
    Whoever holds `locks/writers` alone therefore knows that nothing is being written, and that what is in
    `tmp` was left by the dead.
    """

    def __init__(self, path: str, create: bool) -> None:
        self.path = path
        self.bundles = f"{path}/bundles"
        self.adapters = f"{path}/adapters"
        self.scratch = f"{path}/tmp"
        self._locks = f"{path}/locks"
        if not self._is_store():
            if not create:
                raise NotAStore(f"{path} is not an adapter store; check the path", param="store")
            self._create()
        self._sweep()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writers' lock shared; turns the system's refusals into `StoreWriteFailed`."""
        with self._refusals_typed(), file_lock(f"{self._locks}/writers", shared=True):
            yield

    @contextmanager
    def changing(self, adapter: str) -> Iterator[None]:
        """Hold one adapter's lock; only inside `writing`."""
        stripe = int.from_bytes(hashlib.sha256(adapter.encode()).digest()[:4], "big") % _LOCK_STRIPES
        with file_lock(f"{self._locks}/adapters-{stripe:02x}"):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the writers' lock alone, after removing leftovers."""
        with self._refusals_typed(), file_lock(f"{self._locks}/writers"):
            self._empty_scratch()
            yield

    def adapter_ids(self, tenant: str | None = None) -> list[tuple[str, str]]:
        """(tenant, name) of every adapter directory, sorted; of one tenant's if given."""
        tenants = [tenant] if tenant is not None else filter(is_part, names_in(self.adapters))
        return [(owner, name) for owner in tenants for name in filter(is_part, names_in(f"{self.adapters}/{owner}"))]

    def _is_store(self) -> bool:
        mark = f"{self.path}/{_MARK}"
        try:
            record = read_record(mark, StoreRecord)
        except FileNotFoundError:
            return False
        except StoreCorrupted as error:
            raise NotAStore(f"{mark} does not describe an adapter store; check the path", param="store") from error
        except OSError as error:
            raise NotAStore(f"{self.path} cannot be opened as a store: {error.strerror}", param="store") from error
        if record.format != STORE_FORMAT:
            raise NotAStore(f"{self.path} is a {record.format!r}, not an adapter store", param="store")
        if record.version != STORE_VERSION:
            raise UnsupportedStore(
                f"{self.path} has store version {record.version}, this release reads {STORE_VERSION}; "
                "upgrade sera-serve",
                param="store",
            )
        return True

    def _create(self) -> None:
        with self._refusals_typed():
            make_directory(self.path)
            # The mark comes last, so a kill in between leaves only these folders.
            foreign = set(names_in(self.path)) - {*_FOLDERS, _MARK} - _FOREIGN_BUT_HARMLESS
            if foreign:
                raise NotAStore(
                    f"{self.path} is no adapter store (it holds {min(foreign)!r}); name an empty directory",
                    param="store",
                )
            self._make_folders()
            mark = StoreRecord(format=STORE_FORMAT, version=STORE_VERSION)
            with file_lock(f"{self._locks}/writers", shared=True):
                put_text(f"{self.path}/{_MARK}", record_text(mark), self.scratch)

    def _make_folders(self) -> None:
        for folder in _FOLDERS:
            make_directory(f"{self.path}/{folder}")

    def _sweep(self) -> None:
        try:
            # A backup may have left out folders that were empty.
            self._make_folders()
            with try_file_lock(f"{self._locks}/writers") as alone:
                if alone:
                    self._empty_scratch()
        except OSError as error:
            # A store on a read-only mount can still be read.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreWriteFailed(
                    f"{self.path} could not be opened: {error.strerror} ({error.filename})", param="store"
                ) from error

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
            # A server's clients are told this too, and need not know where its store is.
            inside = f"{self.path}/"
            named = isinstance(error.filename, str) and error.filename.startswith(inside)
            where = f" ({error.filename.removeprefix(inside)})" if named else ""
            raise StoreWriteFailed(
                f"the store could not be written: {error.strerror or error}{where}; "
                "check free space and permissions, then try again",
                param="store",
            ) from error
