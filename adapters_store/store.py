"""The store of adapters in a local directory: immutable versions, movable aliases, nothing half-written."""

from __future__ import annotations

import os
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path

from adapters_store.bundle import DEFAULT_LIMITS, AdapterBundle, validate_bundle
from adapters_store.bundle_files import BundleFiles
from adapters_store.config import AdapterConfig
from adapters_store.errors import AdapterNotFound, InvalidAdapterName, StoreCorrupted, VersionInUse
from adapters_store.names import LATEST, check_alias, check_part, parse_adapter, parse_ref
from adapters_store.records import AdapterInfo, Collected, Published, ResolvedAdapter, VersionRecord
from adapters_store.safetensors_file import BundleLimits
from adapters_store.shelf import AdapterShelf
from adapters_store.store_root import StoreRoot

# `AdapterStore.list` hides the built-in inside the class.
AdapterInfos = list[AdapterInfo]


class AdapterStore:
    """Adapters by `tenant/name`, shared by any number of threads and processes on one machine.

    `publish`, `set_alias` and `delete` are atomic, and durable when they return: FORMAT.md has the directory
    and the order of writes. Reading takes no lock. Errors are `StoreError`s.
    """

    def __init__(self, root: Path | str, create: bool = True, limits: BundleLimits = DEFAULT_LIMITS) -> None:
        """Open a store, or make one in a new or empty directory; what a killed writer left behind is removed.

        Raises:
            NotAStore: The directory is something else, or is absent and `create` is false.
            UnsupportedStore: It was written by a newer release.
            StoreWriteFailed: It cannot be created.
        """
        self._root = StoreRoot(os.path.abspath(root), create)
        self._files = BundleFiles(self._root.bundles, self._root.scratch, limits)

    @property
    def root(self) -> Path:
        """The store's directory."""
        return Path(self._root.path)

    def publish(self, bundle: AdapterBundle, name: str) -> Published:
        """Add a version and move `latest` to it; content that the adapter already has keeps its version.

        Raises:
            InvalidAdapterName, InvalidBundle: Refused; the store is unchanged.
            StoreWriteFailed: The disk is full or not writable. The version may be there or not; publishing it
                again is safe.
        """
        shelf = self._shelf(name)
        validate_bundle(bundle)
        with self._root.writing():
            self._files.put(bundle)
            with self._root.changing(name):
                record = shelf.with_digest(bundle.digest)
                if record is None:
                    record = _describe(bundle, shelf.next_version())
                    shelf.add(record)
                shelf.point(LATEST, record.version)
        return Published(name, record.version, bundle.digest)

    def resolve(self, ref: str) -> ResolvedAdapter:
        """Turn a reference into one version.

        Args:
            ref: `tenant/name` (its `latest`), `tenant/name@alias`, `tenant/name@v3`, or `tenant/name@` and
                eight or more digits of a digest.

        Raises:
            InvalidAdapterName, AdapterNotFound, AmbiguousDigest: It names no version.
        """
        parsed = parse_ref(ref)
        record = self._shelf(parsed.adapter).find(parsed)
        c = self.config(record.digest)
        return ResolvedAdapter(parsed.adapter, record.version, record.digest, c.task, None, c.base, c.max_length)

    def load(self, digest: str) -> AdapterBundle:
        """Read the bundle of a digest; every check of an upload is made again, and the digest taken anew.

        Raises:
            AdapterNotFound: It was deleted.
            StoreCorrupted: The file is not what was published.
        """
        return self._files.load(digest)

    def config(self, digest: str) -> AdapterConfig:
        """The configuration of a bundle, without reading its tensors; raises as `load` does."""
        return self._files.config(digest)

    def inspect(self, ref: str) -> AdapterInfo:
        """One version with its adapter's versions and aliases; raises as `resolve` does."""
        parsed = parse_ref(ref)
        shelf = self._shelf(parsed.adapter)
        record = shelf.find(parsed)
        return AdapterInfo(
            adapter=parsed.adapter,
            version=record.version,
            digest=record.digest,
            created_at=record.created_at,
            nbytes=record.nbytes,
            parameters=record.parameters,
            task=record.task,
            method=record.method,
            base=record.base,
            versions=tuple(shelf.versions()),
            aliases=shelf.aliases(),
        )

    def list(self, tenant: str | None = None) -> AdapterInfos:
        """The latest version of every adapter, or of one tenant's, in order of id; no bundle is opened."""
        if tenant is not None:
            check_part(tenant, "tenant")
        infos = []
        for owner, name in self._root.adapter_ids(tenant):
            try:
                infos.append(self.inspect(f"{owner}/{name}"))
            except AdapterNotFound:
                # Deleted meanwhile, or a kill came before its first version.
                continue
        return infos

    def aliases(self, name: str) -> dict[str, int]:
        """Version by alias of one adapter, or `AdapterNotFound`."""
        parse_adapter(name)
        return self.inspect(name).aliases

    def set_alias(self, name: str, alias: str, ref: str) -> None:
        """Point an alias of adapter `name` to the version that `ref`, a reference to the same adapter, names.

        Raises:
            InvalidAdapterName: The alias reads as a version or digest, or `ref` is another adapter's.
            AdapterNotFound: No such version.
        """
        shelf = self._shelf(name)
        check_alias(alias)
        parsed = parse_ref(ref)
        if parsed.adapter != name:
            raise InvalidAdapterName(f"an alias of {name} cannot point to {ref}; name a version of {name}", param="ref")
        with self._root.writing(), self._root.changing(name):
            shelf.point(alias, shelf.find(parsed).version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias other than `latest`.

        Raises:
            InvalidAdapterName: The alias is `latest`.
            AdapterNotFound: No such alias.
        """
        shelf = self._shelf(name)
        if check_alias(alias) == LATEST:
            raise InvalidAdapterName("alias 'latest' always exists; point it elsewhere instead", param="alias")
        with self._root.writing(), self._root.changing(name):
            shelf.unpoint(alias)

    def delete(self, ref: str) -> None:
        """Delete a whole adapter (`tenant/name`), or one version of it (any reference with `@`).

        `latest` moves to the newest version that remains. Bundles stay until `collect_garbage`; version
        numbers are never used again.

        Raises:
            AdapterNotFound: Nothing to delete.
            VersionInUse: An alias other than `latest` points to the version.
        """
        parsed = parse_ref(ref)
        shelf = self._shelf(parsed.adapter)
        with self._root.writing(), self._root.changing(parsed.adapter):
            version = shelf.find(parsed).version
            if "@" not in ref:
                self._bury(shelf)
                return
            aliases = shelf.aliases()
            if holders := sorted(a for a, held in aliases.items() if held == version and a != LATEST):
                raise VersionInUse(
                    f"alias {holders[0]!r} points to v{version} of {parsed.adapter}; move that alias first",
                    param="adapter",
                )
            rest = [other for other in shelf.versions() if other != version]
            if not rest:
                self._bury(shelf)
                return
            if aliases[LATEST] == version:
                shelf.point(LATEST, rest[-1])
            shelf.remove_version(version)

    def collect_garbage(self) -> Collected:
        """Remove bundles that no version refers to, and leftovers; waits for writes under way."""
        with self._root.alone():
            shelves = [self._shelf(f"{owner}/{name}") for owner, name in self._root.adapter_ids()]
            return self._files.keep_only({record.digest for shelf in shelves for record in shelf.records()})

    def check_integrity(self) -> None:
        """Read everything: every version's bundle has its digest, every alias points to a version.

        Raises:
            StoreCorrupted: The first thing found wrong; the message names the file or the alias.
        """
        for owner, name in self._root.adapter_ids():
            shelf = self._shelf(f"{owner}/{name}")
            for record in shelf.records():
                try:
                    self._files.load(record.digest)
                except AdapterNotFound as error:
                    raise StoreCorrupted(
                        f"the bundle of {shelf.adapter}@v{record.version} is missing; publish it again",
                        param=shelf.adapter,
                    ) from error
            versions = shelf.versions()
            for alias, version in shelf.aliases().items():
                if version not in versions:
                    raise StoreCorrupted(
                        f"alias {shelf.adapter}@{alias} points to v{version}, which is not there; point it again",
                        param=shelf.adapter,
                    )

    def _shelf(self, adapter: str) -> AdapterShelf:
        return AdapterShelf(self._root.path, *parse_adapter(adapter))

    def _bury(self, shelf: AdapterShelf) -> None:
        grave = f"{self._root.scratch}/{uuid.uuid4().hex}"
        shelf.remove(grave)
        # Out of sight already; what stays here after a kill goes when the store is next opened.
        shutil.rmtree(grave)


def _describe(bundle: AdapterBundle, version: int) -> VersionRecord:
    config = bundle.config
    return VersionRecord(
        version=version,
        digest=bundle.digest,
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        nbytes=bundle.nbytes,
        parameters=config.parameters,
        task=config.task,
        method=config.method,
        base=config.base.name,
    )
