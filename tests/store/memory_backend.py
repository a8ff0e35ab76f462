"""A backend in memory: the smallest thing that keeps the promises of `Backend`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from adapters_store import AdapterBundle, BundleLimits, Freed, StoreState
from adapters_store.backends.interface import Change, CommitResult, Manifest, Outcome
from adapters_store.format.containers import config_of
from adapters_store.format.safetensors_file import parse_header
from adapters_store.names import LATEST
from adapters_store.records import VersionRecord


@dataclass
class _Adapter:
    records: dict[int, VersionRecord] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    highest_deleted: int = 0
    commits: int = 0


class MemoryBackend:
    """One lock for everything; references are counted by looking at all records."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._adapters: dict[str, _Adapter] = {}
        self._bundles: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        return "memory"

    def manifest(self, adapter: str) -> Manifest:
        with self._lock:
            held = self._adapters.get(adapter, _Adapter())
            versions = tuple(sorted(held.records))
            aliases = {LATEST: versions[-1]} | held.aliases if versions else {}
            return Manifest(versions, aliases, held.highest_deleted, str(held.commits))

    def alias(self, adapter: str, alias: str) -> int | None:
        return self.manifest(adapter).aliases.get(alias)

    def version(self, adapter: str, version: int) -> VersionRecord | None:
        with self._lock:
            held = self._adapters.get(adapter)
            return held.records.get(version) if held else None

    def commit(self, adapter: str, change: Change, revision: str) -> CommitResult:
        with self._lock:
            held = self._adapters.get(adapter, _Adapter())
            if str(held.commits) != revision:
                return CommitResult(Outcome.CONFLICT)
            if change.add is not None and change.add.digest not in self._bundles:
                return CommitResult(Outcome.BUNDLE_MISSING)
            self._adapters[adapter] = held
            held.commits += 1
            if change.add is not None:
                held.records[change.add.version] = change.add
            held.aliases |= change.set_aliases
            for alias in change.remove_aliases:
                del held.aliases[alias]
            removed = {held.records.pop(version).digest for version in change.remove_versions}
            held.highest_deleted = max([held.highest_deleted, *change.remove_versions])
            if not held.records:
                held.aliases.clear()
            return CommitResult(Outcome.COMMITTED, self._drop(removed - self._needed()))

    def list_page(self, tenant: str | None, after: str, limit: int) -> list[str]:
        with self._lock:
            ids = sorted(adapter for adapter, held in self._adapters.items() if held.records and adapter > after)
        return [adapter for adapter in ids if tenant is None or adapter.split("/")[0] == tenant][:limit]

    def stamps(self, tenant: str) -> dict[str, str]:
        with self._lock:
            return {
                adapter: str(held.commits)
                for adapter, held in self._adapters.items()
                if adapter.split("/")[0] == tenant
            }

    def retired(self, tenant: str) -> set[str]:
        with self._lock:
            deleted = {adapter for adapter, held in self._adapters.items() if held.highest_deleted}
        return {adapter for adapter in deleted if adapter.split("/")[0] == tenant}

    def put_bundle(self, bundle: AdapterBundle, limits: BundleLimits) -> None:
        data = bundle.to_bytes()
        config_of(parse_header(memoryview(data), len(data), limits), limits)
        with self._lock:
            self._bundles[bundle.digest] = data

    def discard_bundle(self, digest: str) -> None:
        with self._lock:
            if digest in self._bundles and digest not in self._needed():
                del self._bundles[digest]

    def bundle_bytes(self, digest: str) -> int | None:
        with self._lock:
            return len(self._bundles[digest]) if digest in self._bundles else None

    def read_bundle(self, digest: str, nbytes: int) -> memoryview | None:
        with self._lock:
            data = self._bundles.get(digest)
        return None if data is None else memoryview(bytearray(data[:nbytes]))

    def bundle_location(self, digest: str) -> str:
        return f"memory:{digest}"

    def check(self) -> StoreState:
        return "writable"

    def collect_garbage(self) -> Freed:
        with self._lock:
            return self._drop(set(self._bundles) - self._needed())

    def _needed(self) -> set[str]:
        return {record.digest for held in self._adapters.values() for record in held.records.values()}

    def _drop(self, digests: set[str]) -> Freed:
        return Freed(tuple(sorted(digests)), sum(len(self._bundles.pop(digest)) for digest in digests))
