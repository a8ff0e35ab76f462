"""Metrics of the adapters' memory, read from the engine when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sera_serve.engine import LOAD_BUCKETS, ResidencyStats


class ResidencyMetrics(Collector):
    """A collector over `ResidencyStats`: nothing is counted twice, and nothing is kept in step."""

    def __init__(self, read: Callable[[], ResidencyStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        stats = self._read()
        hits = CounterMetricFamily(
            "sera_adapter_hits", "Adapters granted to requests, by the tier that they were found in.", labels=["tier"]
        )
        for tier, count in stats.granted.items():
            hits.add_metric([tier], count)
        yield hits
        loads = HistogramMetricFamily(
            "sera_adapter_load_seconds",
            "Seconds to read, pack and copy an adapter, without waiting for room, by the tier that it came from.",
            labels=["tier"],
        )
        bounds = [*map(str, LOAD_BUCKETS), "+Inf"]
        for tier, times in stats.loads.items():
            counts = accumulate(times.counts)
            loads.add_metric([tier], list(zip(bounds, counts, strict=True)), times.seconds)
        yield loads
        for name, text, value in (
            ("sera_adapter_load_failures", "Loads of adapters that failed.", stats.failed_loads),
            ("sera_adapter_evictions", "Adapters that left the device for others' sake.", stats.evictions),
        ):
            yield CounterMetricFamily(name, text, value=value)
        for name, text, value in (
            ("sera_adapters_resident", "Adapters on the device.", stats.resident),
            ("sera_adapters_pinned", "Adapters pinned to the device.", stats.pinned),
            ("sera_adapters_loading", "Adapters being brought in.", stats.loading),
            ("sera_adapter_device_bytes", "Bytes of device memory that adapters take.", stats.device_bytes),
            ("sera_adapter_device_limit_bytes", "Bytes of device memory for adapters.", stats.device_limit),
            ("sera_adapter_host_bytes", "Bytes of host memory that adapters take.", stats.host_bytes),
            ("sera_adapter_host_limit_bytes", "The most bytes of host memory for adapters.", stats.host_limit),
        ):
            yield GaugeMetricFamily(name, text, value=value)
