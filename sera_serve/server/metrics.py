"""Prometheus metrics of one server. Each server has its own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sera_serve.engine import LOAD_BUCKETS, ResidencyStats, RunnerLoad, ServingEngine, Task, TokensUsed
from sera_serve.errors import SeraServeError
from sera_serve.jobs import JobStatus
from sera_serve.server.usage_metrics import INPUT_KINDS, InputKind, UsageMetrics
from sera_serve.threads import in_background

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# A locked database holds its reader for 10 seconds, and Prometheus waits no longer than that for all metrics.
_JOB_COUNTS_S = 1.0


class ServerMetrics:
    """Counts requests and tokens. Labels come from fixed sets; those of `usage` have a bound.

    Attributes:
        usage: What each tenant has used, and each adapter was used for.
    """

    def __init__(self, engine: ServingEngine, label_limit: int = 200) -> None:
        """Register the metrics.

        Args:
            engine: Read at each scrape.
            label_limit: The most tenants, and the most adapters, with a label of their own.
        """
        self.registry = CollectorRegistry()
        self.usage = UsageMetrics(label_limit)
        self.registry.register(self.usage)
        self._requests = Counter(
            "sera_http_requests",
            "HTTP requests that got a response.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "sera_http_request_seconds",
            "Seconds from the start of a request to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "sera_tokens", "Tokens of generations, finished or not.", ["kind"], registry=self.registry
        )
        self._inputs = {
            kind: Counter(f"sera_{kind}_inputs", f"{text}.", registry=self.registry)
            for kind, text in INPUT_KINDS.items()
        }
        self._refusals = Counter(
            "sera_refusals",
            "Requests refused or ended because of overload, a deadline or a stopped engine, streams included.",
            ["code"],
            registry=self.registry,
        )
        self._waits = Histogram(
            "sera_wait_seconds",
            "Seconds from a request's arrival until the request, or its first part, entered a batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "sera_first_token_seconds",
            "Seconds from a generation's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        for name, text, read in (
            ("sera_requests_in_flight", "Requests in flight, waiting or running.", engine.in_flight),
            ("sera_waiting", "Waiting sequences and waiting parts of classifications.", engine.waiting),
            ("sera_running", "Sequences and parts of classifications in a batch.", engine.running),
        ):
            self.gauge(name, text, read)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. `route` is the matched template, not the path."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_tokens(self, tokens: TokensUsed) -> None:
        """Count the tokens of one generation."""
        self._tokens.labels("prompt").inc(tokens.prompt)
        self._tokens.labels("cached_prompt").inc(tokens.cached_prompt)
        self._tokens.labels("completion").inc(tokens.completion)

    def count_rows(self, kind: InputKind, inputs: int, waited_s: float) -> None:
        """Count the inputs of one finished call of rows, and record its waiting time."""
        self._inputs[kind].inc(inputs)
        self._waits.observe(waited_s)

    def observe_waits(self, waited_s: float, first_token_s: float | None) -> None:
        """Record how long a generation waited for the batch, and for its first token if there was one."""
        self._waits.observe(waited_s)
        if first_token_s is not None:
            self._first_token.observe(first_token_s)

    def count_refusal(self, code: str) -> None:
        """Count a request that was not served. `code` is an error code of the server, so there are few."""
        self._refusals.labels(code).inc()

    def totals(self) -> dict[str, float]:
        """Return the counts of tokens, inputs and times so far, by sample: name and label value."""
        return {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for metric in (self._tokens, *self._inputs.values(), self._waits, self._first_token)
            for family in metric.collect()
            for sample in family.samples
            if not sample.name.endswith(("_bucket", "_created"))
        }

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format. Blocks: there may be thousands of lines."""
        return generate_latest(self.registry)


def _by_label(family: CounterMetricFamily | GaugeMetricFamily, values: Iterable[tuple[str, float]]) -> Metric:
    """Give a family its values by its one label."""
    for label, value in values:
        family.add_metric([label], value)
    return family


class LoopMetrics(Collector):
    """Metrics of the engine's loops, read at each scrape."""

    def __init__(self, read: Callable[[], Mapping[Task, RunnerLoad]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        loads = self._read().values()
        yield CounterMetricFamily(
            "sera_preemptions",
            "Generations that gave their cache pages up to another, and were computed again.",
            value=sum(load.preemptions for load in loads),
        )
        pages = GaugeMetricFamily("sera_cache_pages", "Pages of keys and values.", labels=["state"])
        for place, state in enumerate(("in_use", "total")):
            pages.add_metric([state], sum(load.cache_pages[place] for load in loads))
        yield pages


class JobMetrics(Collector):
    """Counts training jobs at each scrape.

    Where the database fails or is slow, a scrape has all other metrics without these: they are needed most then.
    """

    def __init__(self, read: Callable[[], Mapping[JobStatus, int]]) -> None:
        self._read = read
        self._reading: Future[Mapping[JobStatus, int]] | None = None

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        if self._reading is None or self._reading.done():
            self._reading = in_background(self._read, "job-counts")
        try:
            counts = self._reading.result(_JOB_COUNTS_S)
        except (SeraServeError, TimeoutError):
            return
        text = "Training jobs of all tenants by status; of finished ones those that are remembered."
        yield _by_label(GaugeMetricFamily("sera_training_jobs", text, labels=["status"]), counts.items())


class ResidencyMetrics(Collector):
    """A collector of the metrics of adapter memory: it reads `ResidencyStats` at each scrape and keeps nothing."""

    def __init__(self, read: Callable[[], ResidencyStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        stats = self._read()
        text = "Leases granted to requests, by the tier that the adapter was found in."
        yield _by_label(CounterMetricFamily("sera_adapter_hits", text, labels=["tier"]), stats.granted.items())
        loads = HistogramMetricFamily(
            "sera_adapter_load_seconds",
            "Seconds to read, pack and copy an adapter, without the wait for room, by the tier that it came from.",
            labels=["tier"],
        )
        bounds = [*map(str, LOAD_BUCKETS), "+Inf"]
        for tier, times in stats.loads.items():
            counts = accumulate(times.counts)
            loads.add_metric([tier], list(zip(bounds, counts, strict=True)), times.seconds)
        yield loads
        text = (
            "Loads of adapters that failed while a request waited: gone if the adapter was deleted meanwhile, "
            "cannot_combine if a request asked for a weighted sum that cannot be made, error for any other reason."
        )
        failures = CounterMetricFamily("sera_adapter_load_failures", text, labels=["reason"])
        yield _by_label(failures, stats.failed_loads.items())
        yield CounterMetricFamily(
            "sera_adapter_evictions",
            "Adapters that left the device to make room for others.",
            value=stats.evictions,
        )
        for name, text, value in (
            ("sera_adapters_resident", "Adapters on the device.", stats.resident),
            ("sera_adapters_pinned", "Adapters pinned to the device.", stats.pinned),
            (
                "sera_adapters_loading",
                "Adapters on their way to the device, including those that wait for room.",
                stats.loading,
            ),
            ("sera_adapter_device_bytes", "Bytes of device memory that adapters take.", stats.device_bytes),
            ("sera_adapter_device_limit_bytes", "Bytes of device memory for adapters.", stats.device_limit),
            ("sera_adapter_host_bytes", "Bytes of host memory that adapters take.", stats.host_bytes),
            ("sera_adapter_host_limit_bytes", "Bytes of host memory for adapters.", stats.host_limit),
        ):
            yield GaugeMetricFamily(name, text, value=value)
