"""Adapter residency: device pool, host cache, leases, pins, prefetch, loading and eviction."""

from sera_serve.residency.bundle_check import check_servable
from sera_serve.residency.entry import TRANSITIONS, AdapterEntry, AdapterState, Claim, Lease, PrefetchHint
from sera_serve.residency.host_cache import HostCache
from sera_serve.residency.loader import LoaderThreads, LoadSize
from sera_serve.residency.manager import AdapterResidency
from sera_serve.residency.packing import (
    AdapterLayout,
    PackedAdapter,
    head_logits,
    pack,
)
from sera_serve.residency.pool import DevicePool, Placement
from sera_serve.residency.stats import LOAD_BUCKETS, LoadTimes, Presence, ResidencyStats, Tier

__all__ = [
    "LOAD_BUCKETS",
    "TRANSITIONS",
    "AdapterEntry",
    "AdapterLayout",
    "AdapterResidency",
    "AdapterState",
    "Claim",
    "DevicePool",
    "HostCache",
    "Lease",
    "LoadSize",
    "LoadTimes",
    "LoaderThreads",
    "PackedAdapter",
    "Placement",
    "PrefetchHint",
    "Presence",
    "ResidencyStats",
    "Tier",
    "check_servable",
    "head_logits",
    "pack",
]
