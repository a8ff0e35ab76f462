"""Packed adapters kept in host memory, so that a reload to the device need not read the store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set

from sera_serve.residency.packing import PackedAdapter


class HostCache:
    """A least-recently-used cache of packed adapters, counted in bytes. Not thread-safe: the caller holds a lock."""

    def __init__(self, nbytes: int) -> None:
        """Make an empty cache of at most `nbytes`."""
        self.limit = nbytes
        self.used = 0
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def digests(self) -> Set[str]:
        """Digests of the adapters kept."""
        return self._adapters.keys()

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter, now the most recently used, or None."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: PackedAdapter, is_wanted: Callable[[str], bool]) -> list[str]:
        """Keep an adapter, and return the digests of those dropped for it.

        The least recently used are dropped first, and wanted ones never. Where that does not give enough room, the
        adapter is not kept and none is dropped.
        """
        if adapter.digest in self._adapters:
            return []
        missing = self.used + adapter.nbytes - self.limit
        dropped = []
        for digest, kept in self._adapters.items():
            if missing <= 0:
                break
            if not is_wanted(digest):
                dropped.append(digest)
                missing -= kept.nbytes
        if missing > 0:
            return []
        for digest in dropped:
            self.drop(digest)
        self._adapters[adapter.digest] = adapter
        self.used += adapter.nbytes
        return dropped

    def has_room(self, is_wanted: Callable[[str], bool]) -> bool:
        """Whether one more adapter of the average size could be kept beside the wanted ones."""
        if not self._adapters:
            return self.limit > 0
        average = self.used / len(self._adapters)
        room = self.limit - self.used
        for digest, adapter in self._adapters.items():
            # Mostly the first one decides: every prefetch asks, and the cache may hold thousands.
            if room >= average:
                break
            if not is_wanted(digest):
                room += adapter.nbytes
        return room >= average

    def drop(self, digest: str) -> None:
        """Drop an adapter, if it is here."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used -= adapter.nbytes

    def check_invariants(self) -> None:
        """Raise RuntimeError unless the bytes counted are the bytes held, within the limit."""
        held = sum(adapter.nbytes for adapter in self._adapters.values())
        if held != self.used or held > self.limit:
            raise RuntimeError(f"host cache counts {self.used} bytes, holds {held}, may hold {self.limit}")
