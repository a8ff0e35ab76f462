"""The store of adapters: immutable versions, movable aliases, nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from adapters_store.backends.interface import Backend, Change, Manifest, Outcome
from adapters_store.backends.local import LocalBackend
from adapters_store.counting import Held, HeldCounter
from adapters_store.errors import (
    AdapterNotFound,
    AmbiguousDigest,
    InvalidAdapterName,
    StoreCorrupted,
    StoreError,
    TooManyAliases,
    VersionInUse,
)
from adapters_store.format.bundle import DEFAULT_LIMITS, AdapterBundle, validate_bundle
from adapters_store.format.safetensors_file import BundleLimits
from adapters_store.integrity import DamageLog, adapter_faults
from adapters_store.names import LATEST, AdapterRef, check_alias, check_part, parse_adapter, parse_ref
from adapters_store.records import (
    AdapterFacts,
    AdapterInfo,
    AdapterSummary,
    Freed,
    Page,
    Published,
    ResolvedAdapter,
    StoreState,
    VersionRecord,
)
from adapters_store.stored_bundles import StoredBundles

MOST_ALIASES = 100
"""Aliases that one adapter may have beside `latest`. Each is a file that no quota counts."""
_RACES = 3
# Ids read at once where a listing skips adapters that are gone, or goes through the whole store.
_IDS_AT_ONCE = 256
T = TypeVar("T")


class AdapterStore(StoredBundles):
    """Adapters by `tenant/name`, shared by any number of threads and processes.

    `publish`, `set_alias` and `delete` are atomic, and durable when they return. Each reads the adapter's manifest,
    and commits a change under the condition that the manifest is still the same; after a conflict it starts again.
    Reading never waits for a writer. Errors are `StoreError`s. Every method raises `StoreUnavailable` where the store
    was removed or unmounted. FORMAT.md has the local directory and its guarantees.
    """

    def __init__(self, root: Path | str, create: bool = True, limits: BundleLimits = DEFAULT_LIMITS) -> None:
        """Open a store in a local directory, or make one in a new or empty directory.

        What a killed writer left behind is removed. A store of an older version is upgraded.

        Raises:
            NotAStore: The directory is something else, or is absent and `create` is false.
            UnsupportedStore: The store was written by a newer release.
            StoreWriteFailed: It cannot be created.
        """
        self._use(LocalBackend(os.path.abspath(root), create), limits)

    @classmethod
    def over(cls, backend: Backend, limits: BundleLimits = DEFAULT_LIMITS) -> AdapterStore:
        """A store over any backend."""
        store = cls.__new__(cls)
        store._use(backend, limits)
        return store

    def _use(self, backend: Backend, limits: BundleLimits) -> None:
        super().__init__(backend, limits)
        self._damage = DamageLog()
        self._held = HeldCounter(backend, self._damage)

    @property
    def root(self) -> Path:
        """The store's directory."""
        return Path(self._backend.location)

    @property
    def damaged_records(self) -> int:
        """Damaged records and aliases that lists, counts and `resolve` have met so far, each counted once."""
        return len(self._damage)

    def publish(self, bundle: AdapterBundle, name: str, *, keep_latest: bool = False) -> Published:
        """Add a version and move `latest` to it.

        Content that the adapter already has keeps its version, and is not written again; with `keep_latest`, it does
        not move `latest`. Content that another adapter has is written in full, in place of the same bytes: the time of
        a publication must not tell a tenant what other tenants have.

        Raises:
            InvalidAdapterName, InvalidBundle: Refused; the store is unchanged.
            StoreWriteFailed: The disk is full or not writable. The version may be there or not; publishing it
                again is safe. A bundle without a version is not left behind.
        """
        parse_adapter(name)
        validate_bundle(bundle)
        written = False
        outcome = Outcome.BUNDLE_MISSING
        try:
            while True:
                manifest = self._backend.manifest(name)
                manifest.check_aliases(LATEST)
                record = next((held for held in self._records(name, manifest) if held.digest == bundle.digest), None)
                # Also where the last version of this content was deleted meanwhile, and its bundle with it.
                if outcome is Outcome.BUNDLE_MISSING and (record is None or not self._is_stored(bundle.digest)):
                    written = True
                    self._backend.put_bundle(bundle, self._limits)
                added = None
                if record is None:
                    record = added = _describe(bundle, manifest.next_version)
                moved = {} if keep_latest and added is None else {LATEST: record.version}
                change = Change(add=added, set_aliases=moved)
                outcome = self._backend.commit(name, change, manifest.revision).outcome
                if outcome is Outcome.COMMITTED:
                    return Published(name, record.version, bundle.digest)
        except Exception:
            if written:
                # A refused version leaves nothing that takes space.
                with suppress(StoreError, OSError):
                    self._backend.discard_bundle(bundle.digest)
            raise

    def resolve(self, ref: str) -> ResolvedAdapter:
        """Turn a reference into one version, with its task, labels and base; no bundle is opened.

        Args:
            ref: `tenant/name` (its `latest`), `tenant/name@alias`, `tenant/name@v3`, or `tenant/name@` and
                eight or more digits of a digest.

        Raises:
            InvalidAdapterName, AdapterNotFound, AmbiguousDigest: The reference names no version.
        """
        parsed = parse_ref(ref)
        try:
            record = self._find(parsed)
        except StoreCorrupted as error:
            self._damage.report(parsed.adapter, "refused", error)
            raise
        facts = self._facts_of(record)
        return ResolvedAdapter(
            adapter=parsed.adapter,
            version=record.version,
            digest=record.digest,
            task=record.task,
            labels=facts.labels,
            base=facts.base,
            max_length=facts.max_length,
            has_chat_template=facts.has_chat_template,
            multi_label=facts.multi_label,
            image=facts.image,
        )

    def inspect(self, ref: str) -> AdapterInfo:
        """One version with its adapter's versions and aliases; raises as `resolve` does."""
        parsed = parse_ref(ref)
        while True:
            manifest = self._backend.manifest(parsed.adapter)
            record = self._find(parsed)
            # Else it was published after the manifest was read.
            if record.version in manifest.versions:
                break
        manifest.check_aliases()
        summary = self._summary(parsed.adapter, record)
        return AdapterInfo(**vars(summary), versions=manifest.versions, aliases=manifest.aliases)

    def summary(self, ref: str) -> AdapterSummary:
        """One version, without its adapter's other versions; raises as `resolve` does."""
        parsed = parse_ref(ref)
        return self._summary(parsed.adapter, self._find(parsed))

    def list_page(
        self,
        tenant: str | None = None,
        after: str | None = None,
        limit: int = 100,
        between: Callable[[], None] | None = None,
    ) -> Page:
        """One page of the adapters, each by its latest version, in order of id; only that page is read.

        An adapter whose record is damaged is left out, and named once in the log: one file must not hide all others.

        Args:
            tenant: Only this tenant's adapters.
            after: The page begins with the first id above this one, which need not exist.
            limit: Adapters a page, at least 1.
            between: Called before each adapter is read, by a thread that must not work at a stretch.

        Raises:
            InvalidAdapterName: `tenant` is not of the allowed form.
            ValueError: `limit` is below 1.
        """
        if limit < 1:
            raise ValueError("limit must be at least 1")
        found: list[AdapterSummary] = []
        for adapter in self._ids(tenant, after or "", limit + 1):
            if len(found) == limit:
                return Page(tuple(found), next=found[-1].adapter)
            if between is not None:
                between()
            if (summary := self.listed_summary(adapter)) is not None:
                found.append(summary)
        return Page(tuple(found), next=None)

    def listed_summary(self, adapter: str) -> AdapterSummary | None:
        """The latest version of `tenant/name` as lists have it; None where lists leave the adapter out."""
        return self._listed(self.summary, adapter)

    def iter_adapters(self, tenant: str | None = None) -> Iterator[AdapterInfo]:
        """All adapters in order of id, each by its latest version; leaves out and raises as `list_page` does."""
        for adapter in self._ids(tenant, "", _IDS_AT_ONCE):
            if (info := self._listed(self.inspect, adapter)) is not None:
                yield info

    def count_adapters(self) -> int:
        """The number of adapters, read from the names alone; a kill may have left a name too many."""
        return sum(1 for _ in self._ids(None, "", _IDS_AT_ONCE))

    def held(self, tenant: str) -> Held:
        """How many adapters a tenant has, and their bytes. Reads again only what has changed since the last call.

        A version whose record is damaged has an unknown size. It counts as the tenant's largest other version, and is
        named once in the log. So damage frees no room in a quota, and the tenant may still publish, and delete.

        Raises:
            InvalidAdapterName: `tenant` is not of the allowed form.
        """
        check_part(tenant, "tenant")
        return self._held.count(tenant)

    def has_content(self, name: str, digest: str) -> bool | None:
        """Whether a version of an adapter has this content; None where there is no such adapter."""
        parse_adapter(name)
        manifest = self._backend.manifest(name)
        if not manifest.versions:
            return None
        return any(record.digest == digest for record in self._records(name, manifest))

    def aliases(self, name: str) -> tuple[dict[str, int], list[StoreCorrupted]]:
        """Version by alias of adapter `name`, and the damage of those aliases that cannot be read."""
        parse_adapter(name)
        manifest = self._backend.manifest(name)
        return manifest.aliases, [manifest.damaged[alias] for alias in sorted(manifest.damaged)]

    def set_alias(self, name: str, alias: str, ref: str) -> int:
        """Point an alias of adapter `name` to the version that `ref`, a reference to the same adapter, names.

        Returns:
            The version.

        Raises:
            InvalidAdapterName: The alias reads as a version or digest, or `ref` is another adapter's.
            AdapterNotFound: No such version.
            TooManyAliases: The adapter has `MOST_ALIASES`, and this is none of them.
        """
        parse_adapter(name)
        check_alias(alias)
        parsed = parse_ref(ref)
        if parsed.adapter != name:
            raise InvalidAdapterName(f"an alias of {name} cannot point to {ref}; name a version of {name}", param="ref")
        while True:
            # The manifest first: if it is still the same when the change is committed, so is what was found.
            manifest = self._backend.manifest(name)
            if alias not in manifest.alias_names and len(manifest.alias_names - {LATEST}) >= MOST_ALIASES:
                raise TooManyAliases(
                    f"{name} has {MOST_ALIASES} aliases beside {LATEST!r}, the most that an adapter may have; remove "
                    "one, or move one that is there",
                    param="alias",
                )
            version = self._find(parsed).version
            change = Change(set_aliases={alias: version})
            if self._backend.commit(name, change, manifest.revision).outcome is Outcome.COMMITTED:
                return version

    def remove_alias(self, name: str, alias: str) -> int:
        """Remove an alias other than `latest`, and return the version that it had; 0 where it was damaged.

        Raises:
            InvalidAdapterName: The alias is `latest`.
            AdapterNotFound: No such alias.
        """
        parse_adapter(name)
        if check_alias(alias) == LATEST:
            raise InvalidAdapterName("alias 'latest' always exists; point it elsewhere instead", param="alias")
        while True:
            manifest = self._backend.manifest(name)
            if alias not in manifest.alias_names:
                raise self._not_found(name, f"alias {alias!r}")
            change = Change(remove_aliases=(alias,))
            if self._backend.commit(name, change, manifest.revision).outcome is Outcome.COMMITTED:
                return manifest.aliases.get(alias, 0)

    def delete(self, ref: str) -> Freed:
        """Delete a whole adapter (`tenant/name`), or one version of it (any reference with `@`).

        A damaged record does not stop the deletion of its adapter, nor a version's that of the version by number. Its
        bundle then stays until `collect_garbage`.

        `latest` moves to the newest version that remains. Version numbers are never used again. A bundle goes with
        the last version that refers to it, in whichever adapter.

        Returns:
            The bundles that went, and whether the adapter has no version left.

        Raises:
            AdapterNotFound: Nothing to delete.
            VersionInUse: An alias other than `latest` points to the version.
        """
        parsed = parse_ref(ref)
        while True:
            manifest = self._backend.manifest(parsed.adapter)
            if "@" in ref:
                known = isinstance(parsed.selector, int) and parsed.selector in manifest.versions
                version = int(parsed.selector) if known else self._find(parsed).version
                change = self._deletion(parsed.adapter, version, manifest)
            elif manifest.versions:
                change = Change(remove_versions=manifest.versions)
            else:
                raise self._not_found(parsed.adapter, None)
            result = self._backend.commit(parsed.adapter, change, manifest.revision)
            if result.outcome is Outcome.COMMITTED:
                return replace(result.freed, adapter_gone=set(change.remove_versions) >= set(manifest.versions))

    def collect_garbage(self) -> Freed:
        """Go through the whole store: remove bundles that no version refers to, and repair what a kill left.

        `delete` removes bundles itself. This is for what kills have left, and for records that were added by hand.

        Raises:
            StoreCorrupted: A record is damaged: nobody knows which bundle it refers to.
        """
        return self._backend.collect_garbage()

    def check(self) -> StoreState:
        """Whether the store takes new versions. Cheap, and writes nothing; blocks as long as the disk does.

        `full` means that less than 1 MiB, or no file, is free. A store that is full or read-only still serves, and a
        full store still deletes.

        Raises:
            StoreUnavailable: The store was removed or unmounted.
        """
        return self._backend.check()

    def check_integrity(self) -> None:
        """Read everything; raises the first of `faults`.

        Raises:
            StoreCorrupted: The first fault; the message names the file or the alias.
        """
        for found in self.faults():
            if found:
                raise found[0]

    def faults(self, latest_only: bool = False) -> Iterator[tuple[StoreCorrupted, ...]]:
        """Read everything: every version's bundle has its digest, every alias points to a version.

        Others may write meanwhile. What they delete is no fault.

        Args:
            latest_only: Only the latest version of each adapter is read.

        Yields:
            The faults of one adapter after the other, in order of id; none for an adapter that is as it was written.
        """
        for adapter in self._ids(None, "", _IDS_AT_ONCE):
            if (found := adapter_faults(self._backend, self.load, adapter, latest_only)) is not None:
                yield found

    def _find(self, ref: AdapterRef) -> VersionRecord:
        if ref.by_digest:
            return self._by_digest(ref.adapter, str(ref.selector))
        if isinstance(ref.selector, int):
            if (record := self._backend.version(ref.adapter, ref.selector)) is None:
                raise self._not_found(ref.adapter, f"version v{ref.selector}")
            return record
        for _ in range(_RACES):
            version = self._backend.alias(ref.adapter, ref.selector)
            if version is None:
                break
            if (record := self._backend.version(ref.adapter, version)) is not None:
                return record
            # The version was deleted after the alias was read: where does the alias point now?
        raise self._not_found(ref.adapter, None if ref.selector == LATEST else f"alias {ref.selector!r}")

    def _by_digest(self, adapter: str, prefix: str) -> VersionRecord:
        manifest = self._backend.manifest(adapter)
        found = [record for record in self._records(adapter, manifest) if record.digest.startswith(prefix)]
        if len(found) > 1:
            raise AmbiguousDigest(
                f"digest prefix {prefix} fits {len(found)} versions of {adapter}; give more digits",
                param="adapter",
            )
        if not found:
            raise self._not_found(adapter, f"version with digest {prefix}")
        return found[0]

    def _records(self, adapter: str, manifest: Manifest) -> Iterator[VersionRecord]:
        """The records of all versions, oldest first, without those that were deleted meanwhile."""
        for version in manifest.versions:
            if (record := self._backend.version(adapter, version)) is not None:
                yield record

    def _deletion(self, adapter: str, version: int, manifest: Manifest) -> Change:
        """The change that deletes one version."""
        for alias in sorted(manifest.alias_names - {LATEST}):
            if manifest.aliases.get(alias, version) == version:
                points = "is damaged, and may point" if alias in manifest.damaged else "points"
                advice = "move that alias first"
                raise VersionInUse(f"alias {alias!r} {points} to v{version} of {adapter}; {advice}", param="adapter")
        rest = [other for other in manifest.versions if other != version]
        moved = {LATEST: rest[-1]} if rest and manifest.aliases.get(LATEST) == version else {}
        return Change(set_aliases=moved, remove_versions=(version,))

    def _listed(self, read: Callable[[str], T], adapter: str) -> T | None:
        """What `read` tells of an adapter; None for one that lists leave out."""
        try:
            return read(adapter)
        except (AdapterNotFound, InvalidAdapterName):
            # Deleted meanwhile, or a kill came before its first version; or its entry in the index was made by hand.
            return None
        except StoreCorrupted as error:
            self._damage.report(adapter, "left out of lists", error)
            return None

    def _summary(self, adapter: str, record: VersionRecord) -> AdapterSummary:
        facts = self._facts_of(record)
        return AdapterSummary(
            adapter=adapter,
            version=record.version,
            digest=record.digest,
            created_at=record.created_at,
            nbytes=record.nbytes,
            parameters=record.parameters,
            task=record.task,
            method=record.method,
            base=record.base,
            labels=facts.labels,
            ranks=facts.ranks,
            splits=facts.splits,
            modules=facts.modules,
            has_chat_template=facts.has_chat_template,
        )

    def _ids(self, tenant: str | None, after: str, at_once: int) -> Iterator[str]:
        if tenant is not None:
            check_part(tenant, "tenant")
        while True:
            ids = self._backend.list_page(tenant, after, at_once)
            yield from ids
            if len(ids) < at_once:
                return
            after = ids[-1]

    def _not_found(self, adapter: str, what: str | None) -> AdapterNotFound:
        versions = self._backend.manifest(adapter).versions
        if not versions:
            return AdapterNotFound(
                f"adapter {adapter!r} is not in the store; list what is there, or publish it",
                param="adapter",
            )
        known = ", ".join(f"v{version}" for version in versions[-5:])
        if what is None:
            return AdapterNotFound(
                f"adapter {adapter!r} lacks the version that its alias {LATEST} names; name another one of {known}, "
                "or run `sera-serve adapters collect-garbage`",
                param="adapter",
            )
        return AdapterNotFound(f"adapter {adapter!r} has no {what}; its newest are {known}", param="adapter")


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
        facts=AdapterFacts.of(config),
    )
