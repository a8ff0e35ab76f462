"""The interface between `AdapterStore` and the place where the data lies: a local directory, later an object store.

A backend keeps two kinds of things:

- **Manifests**, one for each adapter id: its version records, its aliases, and the highest version ever deleted.
  A manifest changes by a conditional put: `commit` applies a change if the manifest still has the revision that the
  caller has read (the revision of an absent adapter stands for "put if absent"), and says so if it has another one.
- **Bundles**, immutable, by content digest. A backend keeps a bundle as long as a committed version refers to it.
  The commit that removes the last reference removes the bundle, and says so.

The interface has no paths and no locks. How a backend makes a commit atomic and durable is its own affair.
A bundle that no version refers to may vanish at any time. A commit of a version without a bundle is therefore refused
(`BUNDLE_MISSING`), and the caller puts the bundle again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from adapters_store.errors import StoreCorrupted
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.safetensors_file import BundleLimits
from adapters_store.records import Freed, StoreState, VersionRecord


@dataclass(frozen=True)
class Manifest:
    """What a store holds of one adapter at one moment.

    Attributes:
        versions: Version numbers, ascending; empty for an adapter that does not exist.
        aliases: Version by alias. `latest` is there whenever a version is.
        highest_deleted: The highest version ever deleted, 0 if there is none; the damage where its record is damaged.
        revision: Changes with each of the above; compared by `Backend.commit`, not read.
        damaged: The damage by alias, for aliases that are there and cannot be read. `latest` may be one of them.
    """

    versions: tuple[int, ...]
    aliases: dict[str, int]
    highest_deleted: int | StoreCorrupted
    revision: str
    damaged: Mapping[str, StoreCorrupted] = field(default_factory=dict)

    @property
    def next_version(self) -> int:
        """A number that no version of this adapter has or ever had; raises `StoreCorrupted` where nobody knows one."""
        if isinstance(self.highest_deleted, StoreCorrupted):
            raise self.highest_deleted
        return max([*self.versions, self.highest_deleted]) + 1

    @property
    def alias_names(self) -> set[str]:
        """All aliases, those that are damaged included."""
        return self.aliases.keys() | self.damaged.keys()

    def check_aliases(self, *names: str) -> None:
        """Raise `StoreCorrupted` if one of these aliases is damaged; without names, if any is."""
        for alias in sorted(self.damaged):
            if not names or alias in names:
                raise self.damaged[alias]


@dataclass(frozen=True)
class Change:
    """A change of one manifest, applied in the order of these fields.

    Attributes:
        add: A new version, of a number above all that the adapter ever had.
        set_aliases: Version by alias, for the aliases to set.
        remove_aliases: Aliases to remove.
        remove_versions: Versions to remove. With the last version the adapter goes, its aliases included.
    """

    add: VersionRecord | None = None
    set_aliases: Mapping[str, int] = field(default_factory=dict)
    remove_aliases: tuple[str, ...] = ()
    remove_versions: tuple[int, ...] = ()

    @property
    def only_removes(self) -> bool:
        """Whether the change makes an adapter smaller. It may move aliases away from the versions that go."""
        return self.add is None and bool(self.remove_aliases or self.remove_versions)


class Outcome(Enum):
    """What became of a commit."""

    COMMITTED = "committed"
    CONFLICT = "conflict"
    BUNDLE_MISSING = "bundle missing"


@dataclass(frozen=True)
class CommitResult:
    """What became of a commit, and which bundles lost their last reference by it and are gone."""

    outcome: Outcome
    freed: Freed = field(default_factory=Freed)


class Backend(Protocol):
    """A place for the data of a store; any number of threads and processes use it at once.

    Adapter ids, aliases and digests in the arguments are of the allowed form: `AdapterStore` checks them.
    A read sees every commit that was acknowledged before the read began. Writes are durable when they return.

    Raises:
        StoreWriteFailed: A write was refused by the system.
        StoreCorrupted: A record does not hold what was written.
        StoreUnavailable: The place is gone. Nothing is reported absent because the place is.
    """

    @property
    def location(self) -> str:
        """The name of the place, for people."""

    def manifest(self, adapter: str) -> Manifest:
        """The manifest of an adapter; an empty one for an adapter that does not exist.

        It tells damage, and raises none: an adapter with a damaged alias can be deleted, and the alias set or removed.
        """

    def alias(self, adapter: str, alias: str) -> int | None:
        """The version that an alias points to. As in `manifest`, but reads as little as possible."""

    def version(self, adapter: str, version: int) -> VersionRecord | None:
        """The record of one version."""

    def commit(self, adapter: str, change: Change, revision: str) -> CommitResult:
        """Apply a change to the manifest if its revision is `revision`.

        A crash leaves a state between the old and the new one that lies on the way through the change's fields,
        and no new version without its bundle.
        """

    def list_page(self, tenant: str | None, after: str, limit: int) -> list[str]:
        """The first ids of adapters above `after`, in the order of their characters' codes; of one tenant's if given.

        An id of an adapter that does not exist may be among them, an id of an existing adapter is never left out.
        Fewer than `limit` ids mean that there are no more.
        """

    def stamps(self, tenant: str) -> dict[str, str]:
        """A text for each adapter of a tenant, which changes whenever the adapter's versions do.

        An empty text says nothing: the versions may have changed. An adapter without versions may be among them.
        """

    def retired(self, tenant: str) -> set[str]:
        """Adapters of a tenant that ever lost a version: a record of each is kept, also where the adapter is gone."""

    def put_bundle(self, bundle: AdapterBundle, limits: BundleLimits) -> None:
        """Store a bundle in its single-file form, in place of whatever is there under its digest.

        Raises:
            InvalidBundle: The bundle exceeds the limits that a reader applies; nothing was stored.
        """

    def discard_bundle(self, digest: str) -> None:
        """Remove a bundle that no version refers to; a no-op where one does, or where nobody knows."""

    def bundle_bytes(self, digest: str) -> int | None:
        """The size of a stored bundle, or None."""

    def read_bundle(self, digest: str, nbytes: int) -> memoryview | None:
        """The first `nbytes` bytes of a stored bundle, fewer if it is shorter, in writable memory of the caller's."""

    def bundle_location(self, digest: str) -> str:
        """The name of a bundle's place, for people."""

    def check(self) -> StoreState:
        """Whether the place can be reached, and takes writes; cheap, and writes nothing."""

    def collect_garbage(self) -> Freed:
        """Go through the whole store: remove what no version refers to, and repair what a crash left."""
