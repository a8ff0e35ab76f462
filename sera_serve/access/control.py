"""What a running server knows of keys and shares: in memory, so that no request waits for a disk."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sera_serve.access.database import AccessDatabase, AccessDatabaseError
from sera_serve.access.keys import Key, Keys, is_secret_of, key_id_of
from sera_serve.access.shares import EVERYONE, Shares

logger = logging.getLogger("sera_serve.access")

Auth = Literal["auto", "keys", "off"]
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class _View:
    """The database at one moment.

    Attributes:
        revision: The database's `revision`.
        keys: By id.
        shares: Tenants by adapter.
        shared_with: The adapters of others by tenant, sorted.
    """

    revision: tuple[int, int] | None = None
    keys: Mapping[str, Key] = field(default_factory=dict)
    shares: Mapping[str, frozenset[str]] = field(default_factory=dict)
    shared_with: Mapping[str, Sequence[str]] = field(default_factory=dict)


class AccessControl:
    """Keys and shares of one server. Reads come from memory; writes go to the database, and are seen at once.

    What another process writes is seen within a quarter of a second: a thread looks for it.

    Locking: `_lock` is held while a view is read from the database. Readers take the whole view, which never changes.
    """

    def __init__(self, database: AccessDatabase, auth: Auth = "auto", *, is_loopback: bool = True) -> None:
        """Read the database.

        Args:
            database: Of the store.
            auth: `keys`: every request needs a key. `off`: none does. `auto`: none does on a loopback address, as long
                as no key was ever made.
            is_loopback: Whether the server listens on a loopback address alone.

        Raises:
            AccessDatabaseError: The database cannot be read: nobody knows who may do what.
        """
        self.database = database
        self.keys = Keys(database)
        self.shares = Shares(database)
        self._auth = auth
        self._is_loopback = is_loopback
        self._lock = threading.Lock()
        self._view = _View()
        # The version and the revision of the database that every listener was told of.
        self._seen: tuple[int, int] | None = None
        self._told: tuple[int, int] | None = None
        self._listeners: list[Callable[[], None]] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False
        self.refresh()

    @property
    def needs_keys(self) -> bool:
        """Whether a request needs a key now. A key that was revoked or has expired still counts as made."""
        if self._auth == "auto":
            return not self._is_loopback or bool(self._view.keys)
        return self._auth == "keys"

    def active_keys(self) -> int:
        """The number of keys that are accepted now."""
        return sum(key.status == "active" for key in self._view.keys.values())

    def key(self, key_id: str) -> Key | None:
        """Return the key of an id as it is now, or None."""
        return self._view.keys.get(key_id)

    def key_of(self, secret: str) -> Key | None:
        """Return the key of a secret, which may be revoked or expired, or None."""
        key = self._view.keys.get(key_id_of(secret))
        return key if is_secret_of(secret, key) else None

    def may_use(self, tenant: str, adapter: str) -> bool:
        """Whether a tenant may use an adapter `tenant/name`: its own, or one that is shared with it."""
        if adapter.partition("/")[0] == tenant:
            return True
        shared = self._view.shares.get(adapter, frozenset())
        return tenant in shared or EVERYONE in shared

    def shared_with(self, tenant: str, after: str = "") -> list[str]:
        """The adapters of other tenants above `after` that a tenant may use, in order of their ids."""
        view = self._view
        found = {
            adapter
            for ids in (view.shared_with.get(tenant, ()), view.shared_with.get(EVERYONE, ()))
            for adapter in ids[bisect_right(ids, after) :]
            if adapter.partition("/")[0] != tenant
        }
        return sorted(found)

    def refresh(self) -> None:
        """Read what has changed. Blocks. Call it after a write.

        Raises:
            AccessDatabaseError: The database cannot be read. What was read before stays; the next call reads it again,
                and calls the listeners again.
        """
        with self._lock:
            # The version first: what is written meanwhile is read again.
            version = self.database.version()
            if version == self._seen:
                return
            revision = self.database.revision()
            if revision != self._view.revision:
                self._view = self._read(revision)
        if revision != self._told:
            for listener in self._listeners:
                listener()
        # Not before: a listener that failed is called again.
        self._seen, self._told = version, revision

    def _read(self, revision: tuple[int, int]) -> _View:
        shares = self.shares.all()
        by_tenant: dict[str, list[str]] = {}
        for adapter, tenants in sorted(shares.items()):
            for tenant in tenants:
                by_tenant.setdefault(tenant, []).append(adapter)
        keys = {key.id: key for key in self.keys.all()}
        return _View(revision, keys, shares, by_tenant)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call a function, on any thread, after each change of the database. It is not called for what is there now."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to look for changes by other processes."""
        self._thread = threading.Thread(target=self._watch, name="access", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close the database."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self.database.close()

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            try:
                self.refresh()
                if self._failed:
                    logger.info("the access database can be read again; keys and shares are what it has")
                self._failed = False
            except AccessDatabaseError as error:
                # Requests are served by what is known. Once is enough for the log.
                if not self._failed:
                    logger.error("%s; keys and shares stay as they were", error.message)
                self._failed = True
            except Exception:
                # The thread must not end: nothing would see a revoked key any more.
                if not self._failed:
                    logger.exception("the access database holds what cannot be read; keys and shares stay as they were")
                self._failed = True
