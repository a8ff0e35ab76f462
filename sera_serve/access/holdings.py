"""What tenants hold in the store, against their quotas of adapters and bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from adapters_store import RETIRED_BYTES, AdapterStore, Held, StoreError, parse_adapter
from sera_serve.access.quotas import Quota, QuotaExceeded, Quotas
from sera_serve.errors import counted

logger = logging.getLogger("sera_serve.access")

# A publication that finds an older count starts the next one on another thread.
_STALE_S = 5.0
# A refusal needs a count that is younger.
_REFUSAL_S = 1.0
_MAX_TENANTS = 10_000


@dataclass
class _Count:
    """The last count of a tenant, with what this server has published since.

    Attributes:
        held: The sums.
        at: When the count began.
        is_exact: Whether nothing was published or deleted while it was made, or deleted since.
        is_counting: Whether another count is under way.
        deletions: Deletions by this server that were noted since.
    """

    held: Held
    at: float
    is_exact: bool
    is_counting: bool = False
    deletions: int = 0


class Holdings:
    """Refuses publications that exceed a quota, by counts of the store itself: they survive a restart.

    The publishing thread reads a sum in memory. Only the first publication of a tenant, and a refusal whose count is
    older than a second, wait for a count. Other counts run on a thread of their own, at most one for a tenant every
    five seconds. So a publication may exceed a quota by what other processes published since the count before it;
    a refusal is never due to what was deleted over a second before.

    Locking: `_lock` guards the counts, and is not held while the store is read.
    """

    def __init__(self, store: AdapterStore, quotas: Quotas, clock: Callable[[], float] = time.monotonic) -> None:
        """Count nothing yet."""
        self._store = store
        self._quotas = quotas
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, _Count] = {}

    def check_publish(self, name: str, digest: str, nbytes: int) -> Held:
        """Refuse a publication that exceeds a quota of its tenant. Blocks.

        Args:
            name: `tenant/name`.
            digest: Of the bundle.
            nbytes: Bytes of its file in the store.

        Returns:
            What the publication adds, for `note_published`. Content that the adapter already has adds nothing.

        Raises:
            QuotaExceeded: The tenant would have too many adapters, or bytes.
            StoreError: The store cannot be read.
        """
        tenant, _ = parse_adapter(name)
        quota = self._quotas.of(tenant)
        if quota.adapters is None and quota.bytes is None:
            self._forget(tenant)
            return Held()
        known = self._store.has_content(name, digest)
        if known:
            return Held()
        added = Held(int(known is None), nbytes)
        if _excess(tenant, quota, self._recent(tenant), added) is not None:
            excess = _excess(tenant, quota, self._exact(tenant), added)
            if excess is not None:
                raise excess
        return added

    def note_published(self, name: str, added: Held) -> None:
        """Count a publication of this server."""
        tenant = name.partition("/")[0]
        with self._lock:
            if (count := self._counts.get(tenant)) is not None:
                count.held = Held(count.held.adapters + added.adapters, count.held.nbytes + added.nbytes)

    def note_deleted(self, name: str) -> None:
        """A version or an adapter was deleted: the next refusal counts first."""
        with self._lock:
            if (count := self._counts.get(name.partition("/")[0])) is not None:
                count.is_exact = False
                count.deletions += 1

    def _recent(self, tenant: str) -> Held:
        """The last count. Where it is old, another one begins beside the caller."""
        with self._lock:
            count = self._counts.get(tenant)
            if count is not None:
                if self._clock() - count.at > _STALE_S and not count.is_counting:
                    count.is_counting = True
                    threading.Thread(target=self._count_beside, args=(tenant,), name="holdings", daemon=True).start()
                return count.held
        return self._count(tenant)

    def _exact(self, tenant: str) -> Held:
        """A count that may refuse."""
        with self._lock:
            count = self._counts.get(tenant)
            if count is not None and count.is_exact and self._clock() - count.at <= _REFUSAL_S:
                return count.held
        return self._count(tenant)

    def _count_beside(self, tenant: str) -> None:
        try:
            self._count(tenant)
        except (StoreError, OSError) as error:
            logger.error("what tenant %s holds cannot be counted: %s", tenant, error)
            self._forget(tenant)

    def _count(self, tenant: str) -> Held:
        began = self._clock()
        with self._lock:
            before = self._counts.get(tenant)
            then, deletions = (Held(), 0) if before is None else (before.held, before.deletions)
        held = self._store.held(tenant)
        with self._lock:
            now = self._counts.get(tenant)
            is_exact = now is before and (now is None or (now.held, now.deletions) == (then, deletions))
            if now is not None and now is before:
                # What was published meanwhile may be missing.
                held = Held(
                    held.adapters + now.held.adapters - then.adapters, held.nbytes + now.held.nbytes - then.nbytes
                )
            if tenant not in self._counts and len(self._counts) >= _MAX_TENANTS:
                del self._counts[next(iter(self._counts))]
            self._counts[tenant] = _Count(held, began, is_exact)
        return held

    def _forget(self, tenant: str) -> None:
        with self._lock:
            self._counts.pop(tenant, None)


def _excess(tenant: str, quota: Quota, held: Held, added: Held) -> QuotaExceeded | None:
    if quota.adapters is not None and added.adapters and held.adapters + added.adapters > quota.adapters:
        return QuotaExceeded(
            f"tenant {tenant!r} has {counted(held.adapters, 'adapter')}, and may have {quota.adapters}; delete one "
            "first, or ask the operator for more",
            param="name",
        )
    if quota.bytes is not None and held.nbytes + added.nbytes > quota.bytes:
        return QuotaExceeded(
            f"tenant {tenant!r} has {held.nbytes} bytes of adapters, this one has {added.nbytes}, and all may have "
            f"{quota.bytes}; delete versions first, or ask the operator for more; the name of each deleted adapter "
            f"counts {RETIRED_BYTES}",
            param="bundle",
        )
    return None
