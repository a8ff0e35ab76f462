"""Where a load finds its adapter: in the host cache, or else in the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from adapters_store import AdapterBundle
from sera_serve.errors import AdapterTooLarge
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.packing import PackedAdapter, pack
from sera_serve.residency.pool import DevicePool
from sera_serve.residency.stats import Tier


class AdapterReader:
    """Reads adapters as the pool holds them. The lock is taken here, and not held while the store is read."""

    def __init__(
        self,
        load: Callable[[str], AdapterBundle],
        module_index: Mapping[str, int],
        pool: DevicePool,
        host_cache: HostCache,
        lock: threading.Lock,
    ) -> None:
        """Prepare.

        Args:
            load: Reads a bundle by digest and raises a typed error where it cannot be had or does not fit the base.
            module_index: Row of each adaptable module in the pool's tables.
            pool: Whose dtype, device and size the adapters are for.
            host_cache: Where one that was read before may be.
            lock: Guards `host_cache`.
        """
        self._load = load
        self._module_index = dict(module_index)
        self._pool = pool
        self._host_cache = host_cache
        self._lock = lock

    def read(self, digest: str) -> tuple[PackedAdapter, Tier]:
        """The adapter, and where it was.

        Raises:
            AdapterTooLarge: It is larger than the whole pool.
            Exception: Whatever `load` raised.
        """
        with self._lock:
            kept = self._host_cache.get(digest)
        if kept is not None:
            return kept, "host"
        data = self._pool.data
        packed = pack(self._load(digest), self._module_index, data.dtype, data.is_cuda)
        if packed.layout.elements > self._pool.capacity:
            itemsize = data.element_size()
            raise AdapterTooLarge(
                f"the adapter takes {packed.layout.elements * itemsize} bytes, the device pool has "
                f"{self._pool.capacity * itemsize}; raise pool_mib",
                param="adapter",
            )
        return packed, "store"
