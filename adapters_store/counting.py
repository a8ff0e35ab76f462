"""Counts what each tenant holds in a store, reading again only what has changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from adapters_store.backends.interface import Backend
from adapters_store.errors import StoreCorrupted
from adapters_store.integrity import DamageLog

# Adapters whose bytes are remembered, of all tenants together; some 200 bytes each.
_MAX_REMEMBERED = 200_000
RETIRED_BYTES = 4096
"""What the record of a deleted adapter counts: it takes a file for as long as the store, and few bytes of it."""


@dataclass(frozen=True)
class Held:
    """What a tenant holds.

    Attributes:
        adapters: Adapters that have a version.
        nbytes: Bytes of the files of all their versions: tensors, configurations and names. Two versions with the same
            content count twice, unless they are of one adapter, which has each content once. Each adapter that was
            deleted adds `RETIRED_BYTES`, until its name has a version again.
    """

    adapters: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class _Sizes:
    """The versions of one adapter: how many, how many of them have a damaged record, and the bytes of the others."""

    versions: int
    damaged: int
    nbytes: int
    largest: int


class HeldCounter:
    """Counts by tenant. A count reads one stamp an adapter, and the records of the adapters whose stamp has changed.

    Nobody knows the bytes of a version whose record is damaged: it counts as the tenant's largest other version.

    Locking: `_lock` guards what is remembered, and is not held while the store is read.
    """

    def __init__(self, backend: Backend, damage: DamageLog) -> None:
        """Remember nothing yet."""
        self._backend = backend
        self._damage = damage
        self._lock = threading.Lock()
        # Least recently counted first: for each adapter its stamp, and its sizes.
        self._known: OrderedDict[str, Mapping[str, tuple[str, _Sizes]]] = OrderedDict()

    def count(self, tenant: str) -> Held:
        """Count now. Blocks; every commit that was acknowledged before is counted.

        Raises:
            StoreUnavailable: The store is gone.
        """
        with self._lock:
            known = self._known.get(tenant, {})
        found: dict[str, tuple[str, _Sizes]] = {}
        for adapter, stamp in self._backend.stamps(tenant).items():
            entry = known.get(adapter)
            # A record that is restored in place changes no stamp.
            if entry is None or not stamp or entry[0] != stamp or entry[1].damaged:
                entry = stamp, self._sizes(adapter)
            # Without a version, or deleted meanwhile.
            if entry[1].versions:
                found[adapter] = entry
        sizes = [entry[1] for entry in found.values()]
        largest = max((size.largest for size in sizes), default=0)
        nbytes = sum(size.nbytes + size.damaged * largest for size in sizes)
        nbytes += RETIRED_BYTES * len(self._backend.retired(tenant) - found.keys())
        with self._lock:
            self._known[tenant] = found
            self._known.move_to_end(tenant)
            while len(self._known) > 1 and sum(map(len, self._known.values())) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return Held(len(found), nbytes)

    def _sizes(self, adapter: str) -> _Sizes:
        sizes: list[int] = []
        damaged = 0
        for version in self._backend.manifest(adapter).versions:
            try:
                record = self._backend.version(adapter, version)
            except StoreCorrupted as error:
                self._damage.report(adapter, "counted with an unknown size", error)
                damaged += 1
                continue
            if record is not None:
                # A bundle that is missing counts by its tensors, which the record has.
                sizes.append(self._backend.bundle_bytes(record.digest) or record.nbytes)
        return _Sizes(len(sizes) + damaged, damaged, sum(sizes), max(sizes, default=0))
