"""The backend for a local directory: any number of threads and processes of one machine. FORMAT.md has its layout."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from adapters_store.backends.adapter_directory import AdapterDirectory, retired_adapters, version_stamps
from adapters_store.backends.bundle_files import BundleFiles
from adapters_store.backends.interface import Change, CommitResult, Manifest, Outcome
from adapters_store.backends.name_index import SEGMENT_LIMIT, NameIndex
from adapters_store.backends.store_root import OLDEST_VERSION, STORE_VERSION, StoreRoot, is_full, is_read_only
from adapters_store.errors import StoreCorrupted, StoreWriteFailed
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.safetensors_file import BundleLimits
from adapters_store.records import Freed, StoreState, VersionRecord

P = ParamSpec("P")
T = TypeVar("T")


def _reads(read: Callable[Concatenate[LocalBackend, P], T]) -> Callable[Concatenate[LocalBackend, P], T]:
    """Make a method that reads raise `StoreUnavailable` where it finds nothing because the store is gone."""

    @wraps(read)
    def checked(backend: LocalBackend, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            found = read(backend, *args, **kwargs)
        except (OSError, StoreCorrupted):
            backend._root.ensure_reachable()
            raise
        # What was found was there: only the absence of a thing can be the absence of everything.
        if not found or (isinstance(found, Manifest) and not found.versions):
            backend._root.ensure_reachable()
        return found

    return checked


class LocalBackend:
    """A `Backend` over a directory.

    A commit holds the adapter's lock from the comparison of the revision to its last write. Each file appears whole
    or not at all. The order of writes makes every state between safe: `StoreRoot` has the locks, `BundleFiles` the
    references, `NameIndex` the listing.
    """

    def __init__(self, path: str, create: bool, segment_limit: int = SEGMENT_LIMIT) -> None:
        """Open the store in a directory, or make one in a new or empty directory.

        A store of version 1 is upgraded: its references and its name index are written, and the mark last. Where the
        directory must not be written, the store is read as it is.

        Args:
            path: The absolute path of the directory.
            create: Whether to make a store where there is none.
            segment_limit: Ids in one segment of the name index.

        Raises:
            NotAStore, UnsupportedStore, StoreWriteFailed: See `AdapterStore`.
        """
        self._root = StoreRoot(path, create)
        self._bundles = BundleFiles(path, self._root.scratch, self._root.referring)
        self._names = NameIndex(self._root.names, self._root.scratch, self._root.indexing, segment_limit)
        self._current = False
        try:
            self._upgrade()
        except StoreWriteFailed as error:
            if not is_read_only(error):
                raise

    @property
    def location(self) -> str:
        """The directory's path."""
        return self._root.path

    @_reads
    def manifest(self, adapter: str) -> Manifest:
        """See `Backend.manifest`."""
        return self._directory(adapter).manifest()

    @_reads
    def alias(self, adapter: str, alias: str) -> int | None:
        """See `Backend.alias`."""
        return self._directory(adapter).alias(alias)

    @_reads
    def version(self, adapter: str, version: int) -> VersionRecord | None:
        """See `Backend.version`."""
        return self._directory(adapter).record(version)

    def commit(self, adapter: str, change: Change, revision: str) -> CommitResult:
        """See `Backend.commit`."""
        self._upgrade()
        directory = self._directory(adapter)
        try:
            with self._root.writing(), self._root.changing(adapter):
                return self._apply(directory, change, revision)
        except StoreWriteFailed as error:
            if not (change.only_removes and is_full(error)):
                raise
            with self._root.exclusive_on_reserve(), self._root.changing(adapter):
                versions, aliases = set(directory.versions()), set(directory.aliases())
                if not (versions.issuperset(change.remove_versions) and aliases.issuperset(change.remove_aliases)):
                    # The failed attempt came as far as that, or another deletion came first.
                    raise
                return self._apply(directory, change, revision)

    @_reads
    def list_page(self, tenant: str | None, after: str, limit: int) -> list[str]:
        """See `Backend.list_page`."""
        if self._is_current():
            return self._names.page(tenant, after, limit)
        # A store of version 1 that must not be written has no index.
        begin = "" if tenant is None else f"{tenant}/"
        ids = self._root.adapter_ids()
        return [adapter for adapter in ids if adapter.startswith(begin) and adapter > after][:limit]

    @_reads
    def stamps(self, tenant: str) -> dict[str, str]:
        """See `Backend.stamps`."""
        return version_stamps(self._root.path, tenant)

    @_reads
    def retired(self, tenant: str) -> set[str]:
        """See `Backend.retired`."""
        return retired_adapters(self._root.path, tenant)

    def put_bundle(self, bundle: AdapterBundle, limits: BundleLimits) -> None:
        """See `Backend.put_bundle`."""
        with self._root.writing():
            self._bundles.put(bundle, limits)

    def discard_bundle(self, digest: str) -> None:
        """See `Backend.discard_bundle`."""
        # A store that is not upgraded yet lacks references: its bundles look unneeded, and are not.
        if self._is_current():
            with self._root.writing():
                self._bundles.discard(digest)

    def check(self) -> StoreState:
        """See `Backend.check`."""
        return self._root.state()

    @_reads
    def bundle_bytes(self, digest: str) -> int | None:
        """See `Backend.bundle_bytes`."""
        return self._bundles.size(digest)

    @_reads
    def read_bundle(self, digest: str, nbytes: int) -> memoryview | None:
        """See `Backend.read_bundle`."""
        return self._bundles.read(digest, nbytes)

    def bundle_location(self, digest: str) -> str:
        """The path of the bundle's file."""
        return self._bundles.path(digest)

    def collect_garbage(self) -> Freed:
        """See `Backend.collect_garbage`; waits for writes under way, and holds up others while it reads the store."""
        self._upgrade()
        try:
            with self._root.exclusive():
                return self._collect()
        except StoreWriteFailed as error:
            if not is_full(error):
                raise
            with self._root.exclusive_on_reserve():
                return self._collect()

    def _collect(self) -> Freed:
        needed, adapters = self._read_everything(skip_damaged=False)
        for adapter in adapters:
            self._directory(adapter).mend_latest()
        self._names.repair(adapters)
        return self._bundles.repair(needed)

    def _apply(self, directory: AdapterDirectory, change: Change, revision: str) -> CommitResult:
        manifest = directory.manifest()
        if manifest.revision != revision:
            return CommitResult(Outcome.CONFLICT)
        if change.add is not None and not self._add(directory, change.add):
            return CommitResult(Outcome.BUNDLE_MISSING)
        for alias, version in change.set_aliases.items():
            directory.set_alias(alias, version)
        for alias in change.remove_aliases:
            directory.remove_alias(alias)
        freed = self._remove(directory, change.remove_versions) if change.remove_versions else Freed()
        return CommitResult(Outcome.COMMITTED, freed)

    def _add(self, directory: AdapterDirectory, record: VersionRecord) -> bool:
        """Add a version; False if its bundle is not there."""
        try:
            if not self._bundles.hold(record.digest, directory.adapter):
                return False
            if not directory.versions():
                self._names.add([directory.adapter])
            directory.add(record)
        except OSError:
            with suppress(OSError, StoreCorrupted):
                self._forget(directory, record.digest)
            raise
        return True

    def _forget(self, directory: AdapterDirectory, digest: str) -> None:
        """Take back the reference and the name of a version that could not be written."""
        versions, digests = directory.versions(), directory.digests(skip_damaged=True)
        if len(digests) < len(versions) or digest in digests.values():
            # The version is there, or nobody knows.
            return
        self._bundles.release({digest}, directory.adapter)
        if not versions:
            directory.remove_if_empty()
            self._names.remove([directory.adapter])

    def _remove(self, directory: AdapterDirectory, versions: tuple[int, ...]) -> Freed:
        digests = directory.digests(skip_damaged=True)
        remaining = [version for version in directory.versions() if version not in versions]
        released = {digests[version] for version in versions if version in digests}
        released -= {digests[version] for version in remaining if version in digests}
        if any(version not in digests for version in remaining):
            # A damaged record may name any of them.
            released = set()
        self._root.make_lock_files(released)
        trash = None
        if remaining:
            for version in versions:
                directory.remove_version(version)
        else:
            trash = f"{self._root.scratch}/{uuid.uuid4().hex}"
            directory.move_to_trash(trash)
            self._names.remove([directory.adapter])
        freed = self._bundles.release(released, directory.adapter)
        if trash is not None:
            # Out of sight already; what stays here after a kill goes when the store is next opened.
            shutil.rmtree(trash)
        return freed

    def _is_current(self) -> bool:
        if not self._current:
            self._current = self._root.has_indexes() and self._root.version() == STORE_VERSION
        return self._current

    def _upgrade(self) -> None:
        """Write the references and the name index where they are missing: in a store of version 1, or a partial copy.

        The mark says version 1 until both are complete. After a kill the next opening completes them.
        """
        if self._is_current():
            return
        with self._root.exclusive():
            if self._is_current():
                return
            self._root.write_mark(OLDEST_VERSION)
            self._root.make_indexes()
            needed, adapters = self._read_everything(skip_damaged=True)
            self._bundles.add_references(needed)
            self._names.add(adapters)
            self._root.write_mark(STORE_VERSION)

    def _read_everything(self, skip_damaged: bool) -> tuple[dict[str, set[str]], list[str]]:
        """The adapters by digest, and the ids of all adapters, ascending.

        Args:
            skip_damaged: Whether versions of a damaged record are left out; else `StoreCorrupted`.
        """
        needed: dict[str, set[str]] = {}
        adapters = []
        for adapter in self._root.adapter_ids():
            directory = self._directory(adapter)
            for digest in directory.digests(skip_damaged).values():
                needed.setdefault(digest, set()).add(adapter)
            if directory.versions():
                adapters.append(adapter)
        return needed, adapters

    def _directory(self, adapter: str) -> AdapterDirectory:
        return AdapterDirectory(self._root.path, adapter)
