"""Damage in a store: a log that names each damaged file once, and the check of an adapter's versions and aliases."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from adapters_store.backends.interface import Backend, Manifest
from adapters_store.errors import AdapterNotFound, StoreCorrupted
from adapters_store.names import LATEST

logger = logging.getLogger("adapters_store")
# Damaged files that are named; some 200 bytes each. A store with more has lost its disk.
_MOST_NAMED = 10_000


class DamageLog:
    """Names damaged files in the log, each once: lists and counts of a busy server meet the same file all the time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._named: set[str] = set()

    def __len__(self) -> int:
        """How many files were named."""
        return len(self._named)

    def report(self, adapter: str, effect: str, error: StoreCorrupted) -> None:
        """Log that an adapter is damaged, unless the file was named before.

        Args:
            adapter: `tenant/name`.
            effect: What becomes of the adapter, as the end of a sentence.
            error: The damage; `param` is the file.
        """
        file = error.param or error.message
        with self._lock:
            if file in self._named or len(self._named) >= _MOST_NAMED:
                return
            self._named.add(file)
        logger.warning("adapter %s is %s: %s", adapter, effect, error.message)


def adapter_faults(
    backend: Backend, load: Callable[[str], object], adapter: str, latest_only: bool
) -> tuple[StoreCorrupted, ...] | None:
    """All faults of one adapter, while others may write; None where there is no such adapter.

    What others delete meanwhile is no fault.

    Args:
        backend: Has the records.
        load: Reads the bundle of a digest; raises AdapterNotFound and StoreCorrupted.
        adapter: `tenant/name`.
        latest_only: Read no other version than the latest.
    """
    before: str | None = None
    found: tuple[StoreCorrupted, ...] = ()
    while True:
        try:
            manifest = backend.manifest(adapter)
        except OSError as error:
            return (_unreadable(adapter, error),)
        if not manifest.versions:
            return None
        if manifest.revision == before:
            # Nothing was deleted while the faults were found.
            return found
        # None where the alias is damaged.
        latest = manifest.aliases.get(LATEST)
        versions = [version for version in manifest.versions if version == latest or not latest_only]
        found = (*_of_versions(backend, load, adapter, versions), *_of_manifest(adapter, manifest))
        if not found:
            return ()
        before = manifest.revision


def _of_versions(
    backend: Backend, load: Callable[[str], object], adapter: str, versions: list[int]
) -> Iterator[StoreCorrupted]:
    for version in versions:
        try:
            record = backend.version(adapter, version)
            if record is not None:
                load(record.digest)
        except AdapterNotFound:
            yield StoreCorrupted(
                f"the bundle of {adapter}@v{version} is missing; publish it again, or delete the version",
                param=adapter,
            )
        except StoreCorrupted as error:
            yield error
        except OSError as error:
            yield _unreadable(f"{adapter}@v{version}", error)


def _of_manifest(adapter: str, manifest: Manifest) -> Iterator[StoreCorrupted]:
    """The faults of the manifest itself."""
    yield from manifest.damaged.values()
    if isinstance(manifest.highest_deleted, StoreCorrupted):
        yield manifest.highest_deleted
    for alias, version in manifest.aliases.items():
        if version not in manifest.versions:
            yield StoreCorrupted(
                f"alias {adapter}@{alias} points to v{version}, which is not there; point it again",
                param=adapter,
            )


def _unreadable(what: str, error: OSError) -> StoreCorrupted:
    return StoreCorrupted(
        f"{what} cannot be read ({error.strerror}: {error.filename}); check the disk, and the permissions of the file",
        param=what.partition("@")[0],
    )
