"""Counts what each tenant holds in a store, reading again only what has changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from adapters_store.backends.interface import Backend

# Adapters whose bytes are remembered, of all tenants together; some 200 bytes each.
_MAX_REMEMBERED = 200_000


@dataclass(frozen=True)
class Held:
    """What a tenant holds.

    Attributes:
        adapters: Adapters that have a version.
        nbytes: Bytes of the files of all their versions: tensors, configurations and names. Two versions with the same
            content count twice, unless they are of one adapter, which has each content once.
    """

    adapters: int = 0
    nbytes: int = 0


class HeldCounter:
    """Counts by tenant. A count reads one stamp an adapter, and the records of the adapters whose stamp has changed.

    Locking: `_lock` guards what is remembered, and is not held while the store is read.
    """

    def __init__(self, backend: Backend) -> None:
        """Remember nothing yet."""
        self._backend = backend
        self._lock = threading.Lock()
        # Least recently counted first: for each adapter its stamp, and its bytes.
        self._known: OrderedDict[str, Mapping[str, tuple[str, int]]] = OrderedDict()

    def count(self, tenant: str) -> Held:
        """Count now. Blocks; every commit that was acknowledged before is counted.

        Raises:
            StoreCorrupted: A record is damaged.
            StoreUnavailable: The store is gone.
        """
        with self._lock:
            known = self._known.get(tenant, {})
        found: dict[str, tuple[str, int]] = {}
        adapters = nbytes = 0
        for adapter, stamp in self._backend.stamps(tenant).items():
            entry = known.get(adapter)
            if entry is None or not stamp or entry[0] != stamp:
                entry = stamp, self._bytes(adapter)
            # Without a version, or deleted meanwhile.
            if entry[1]:
                found[adapter] = entry
                adapters += 1
                nbytes += entry[1]
        with self._lock:
            self._known[tenant] = found
            self._known.move_to_end(tenant)
            while len(self._known) > 1 and sum(map(len, self._known.values())) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return Held(adapters, nbytes)

    def _bytes(self, adapter: str) -> int:
        records = (self._backend.version(adapter, version) for version in self._backend.manifest(adapter).versions)
        # A bundle that is missing counts by its tensors, which the record has.
        return sum(self._backend.bundle_bytes(held.digest) or held.nbytes for held in records if held is not None)
