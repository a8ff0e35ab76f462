"""Figures of residency, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapters_store import AdapterNotFound
from adapters_store.errors import CannotCombine

Tier = Literal["device", "host", "store"]
LoadFailure = Literal["gone", "cannot_combine", "error"]
"""Why a load failed: the store does not have the adapter any more, or a request asks for a sum that cannot be made,
which clients may have caused; or anything else."""

LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histogram of load times, seconds; one more bucket has no bound."""


@dataclass(frozen=True)
class LoadTimes:
    """A histogram of the times that loads took: reading, packing and copying, without waiting for room.

    Attributes:
        counts: Loads of each bucket of `LOAD_BUCKETS`, not cumulative, then those above the last bound.
        seconds: Sum of the times.
    """

    counts: tuple[int, ...] = (0,) * (len(LOAD_BUCKETS) + 1)
    seconds: float = 0.0

    def with_load(self, seconds: float) -> LoadTimes:
        """A histogram of these loads and one more."""
        counts = list(self.counts)
        counts[bisect_left(LOAD_BUCKETS, seconds)] += 1
        return LoadTimes(tuple(counts), self.seconds + seconds)


@dataclass
class LoadCounts:
    """What was loaded and granted since the start.

    Attributes:
        granted: Leases granted, by the tier that the adapter was found in.
        times: Times of the loads that reached the device.
        failed: Loads that failed, by their reason.
    """

    granted: Counter[Tier] = field(default_factory=Counter)
    times: dict[Tier, LoadTimes] = field(default_factory=lambda: {"host": LoadTimes(), "store": LoadTimes()})
    failed: dict[LoadFailure, int] = field(default_factory=lambda: {"gone": 0, "cannot_combine": 0, "error": 0})

    def add_load(self, tier: Tier, seconds: float) -> None:
        """Count a load that reached the device, and its time."""
        self.times[tier] = self.times[tier].with_load(seconds)

    def add_failure(self, error: Exception) -> None:
        """Count a load that failed."""
        is_gone, is_sum = isinstance(error, AdapterNotFound), isinstance(error, CannotCombine)
        self.failed["gone" if is_gone else "cannot_combine" if is_sum else "error"] += 1


class Presence(NamedTuple):
    """Where an adapter is: the nearest tier that has it, and whether it is pinned there."""

    tier: Tier
    is_pinned: bool


@dataclass(frozen=True)
class ResidencyStats:
    """Figures of residency at one moment, and counts since the start.

    Attributes:
        resident: Adapters on the device.
        pinned: Pinned adapters; all of them are resident.
        leases: Leases held.
        loading: Adapters on their way to the device, including those that wait for room.
        waiting: Adapters that wait for room on the device.
        device_bytes: Bytes of the pool that adapters take.
        device_limit: Bytes of the pool.
        host_bytes: Bytes that adapters in the host cache take.
        host_limit: Bytes of the host cache.
        granted: Leases granted so far, by the tier that the adapter was found in.
        loads: Times of the loads from the host cache and from the store.
        failed_loads: Loads that failed, by their reason; every request that waited for the load got the error.
        evictions: Adapters that left the device to make room for others.
        copies: Copies of factors to the device: one for each extent of each load.
    """

    resident: int
    pinned: int
    leases: int
    loading: int
    waiting: int
    device_bytes: int
    device_limit: int
    host_bytes: int
    host_limit: int
    granted: dict[Tier, int]
    loads: dict[Tier, LoadTimes]
    failed_loads: dict[LoadFailure, int]
    evictions: int
    copies: int
