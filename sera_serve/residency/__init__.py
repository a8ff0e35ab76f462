"""Which adapters are where: the device pool, the host cache, leases and eviction."""

from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.manager import AdapterResidency, Lease
from sera_serve.residency.packing import PackedAdapter, PackedHead, PackedModule, pack
from sera_serve.residency.pool import DevicePool, Placement

__all__ = [
    "AdapterResidency",
    "DevicePool",
    "HostCache",
    "Lease",
    "PackedAdapter",
    "PackedHead",
    "PackedModule",
    "Placement",
    "pack",
]
