"""Packed adapters kept in host memory, so that a reload to the device need not read the store."""

from __future__ import annotations

from collections import OrderedDict

from sera_serve.residency.packing import PackedAdapter


class HostCache:
    """Least-recently-used packed adapters, counted in bytes. Not thread-safe: the caller holds a lock."""

    def __init__(self, nbytes: int) -> None:
        """Make an empty cache of at most `nbytes`."""
        self.limit = nbytes
        self.used = 0
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter, now the most recently used, or None."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: PackedAdapter) -> None:
        """Keep an adapter, dropping the least recently used ones; one larger than the cache is not kept."""
        if adapter.nbytes > self.limit or adapter.digest in self._adapters:
            return
        self._adapters[adapter.digest] = adapter
        self.used += adapter.nbytes
        while self.used > self.limit:
            _, dropped = self._adapters.popitem(last=False)
            self.used -= dropped.nbytes

    def drop(self, digest: str) -> None:
        """Forget an adapter, if it is here."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used -= adapter.nbytes

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the bytes counted are the bytes held, within the limit."""
        held = sum(adapter.nbytes for adapter in self._adapters.values())
        if held != self.used or held > self.limit:
            raise RuntimeError(f"host cache counts {self.used} bytes, holds {held}, may hold {self.limit}")
