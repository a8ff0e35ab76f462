"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """Counts requests and tokens; labels come from fixed sets, never from a client's text."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        """Register the metrics.

        Args:
            in_flight: Requests inside the engine; read at each scrape.
        """
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "sera_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "sera_http_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter("sera_tokens", "Tokens of finished generations.", ["kind"], registry=self.registry)
        self._inputs = Counter("sera_classified_inputs", "Inputs classified.", registry=self.registry)
        Gauge(
            "sera_requests_in_flight", "Requests admitted by the engine and unfinished.", registry=self.registry
        ).set_function(in_flight)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; `route` is the template that matched, not the path."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_generation(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of one finished generation."""
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("completion").inc(completion_tokens)

    def count_classified(self, inputs: int) -> None:
        """Count the inputs of one finished classification."""
        self._inputs.inc(inputs)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
