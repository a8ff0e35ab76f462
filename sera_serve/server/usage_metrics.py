"""Metrics by tenant and by adapter, with a bound on how many of each have their own label."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

OTHER = "other"
"""The label of all tenants, or adapters, beyond the limit."""
BASE = "base"
"""The adapter label of requests to the base model. The names of adapters have a slash."""
COMBINED = "combined"
"""The adapter label of weighted sums: clients choose how many there are."""

TokenKind = Literal["prompt", "cached_prompt", "completion"]
_KINDS: tuple[TokenKind, ...] = ("prompt", "cached_prompt", "completion")
InputKind = Literal["classified", "embedded"]
INPUT_KINDS: dict[InputKind, str] = {"classified": "Inputs classified", "embedded": "Inputs made into vectors"}
"""What becomes of the inputs of calls of rows, with the help text of their metrics."""
# Few: each is a line for each tenant.
SECONDS = (0.05, 0.25, 1.0, 5.0, 30.0)
_BOUNDS = [*map(str, SECONDS), "+Inf"]


class SecondsCounts:
    """A histogram of seconds with the bounds `SECONDS`."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


class UsageCounts:
    """What one tenant has used, or what one adapter was used for.

    Attributes:
        requests: Requests that entered a batch.
        tokens: By kind. `cached_prompt` is a part of `prompt`.
        inputs: Of calls of rows, by kind.
        waits: Seconds until a request entered a batch.
        first_tokens: Seconds until a generation had its first token.
    """

    __slots__ = ("first_tokens", "inputs", "requests", "tokens", "waits")

    def __init__(self) -> None:
        self.requests = 0
        self.tokens: dict[TokenKind, int] = dict.fromkeys(_KINDS, 0)
        self.inputs: dict[InputKind, int] = dict.fromkeys(INPUT_KINDS, 0)
        self.waits = SecondsCounts()
        self.first_tokens = SecondsCounts()

    def add_tokens(self, prompt: int, cached_prompt: int, completion: int) -> None:
        """Count tokens."""
        tokens = self.tokens
        tokens["prompt"] += prompt
        tokens["cached_prompt"] += cached_prompt
        tokens["completion"] += completion

    def add_rows(self, kind: InputKind, inputs: int, tokens: int) -> None:
        """Count the inputs of a call of rows, and their tokens."""
        self.inputs[kind] += inputs
        self.add_tokens(tokens, 0, 0)


class UsageMetrics(Collector):
    """Usage by tenant and by adapter. Changed on the event loop alone; a scrape may read on another thread.

    The first `limit` tenants, and the first `limit` adapters, have a label of their own until the server ends. The
    others share the label `other`: a label that passed to another tenant would show wrong rates. Only requests that
    were served are counted, so names that do not exist take no label. Nor can one tenant take all labels for its
    adapters: one more adapter of a tenant gets a label only while the free labels are more than those of the tenant's
    adapters. So the first tenant takes half of the labels at most, the second half of the rest, and some stay free.
    """

    def __init__(self, limit: int) -> None:
        """Begin with nothing. `limit` is the most labels of each kind, `other` aside."""
        self._limit = limit
        self._tenants: dict[str, UsageCounts] = {}
        self._adapters: dict[str, UsageCounts] = {}
        # Labels that the adapters of each tenant have.
        self._shares: Counter[str] = Counter()

    def tenant(self, name: str) -> UsageCounts:
        """The usage of a tenant, or of all others."""
        return self._of(self._tenants, name, 0)[0]

    def adapter(self, name: str | None, version: int | None) -> UsageCounts:
        """The usage of an adapter, or of all others; None is the base model, and a sum of adapters has no version."""
        if name is None or version is None:
            return self._of(self._adapters, BASE if name is None else COMBINED, 0)[0]
        owner = name.partition("/")[0]
        usage, is_new = self._of(self._adapters, name, self._shares[owner])
        if is_new:
            self._shares[owner] += 1
        return usage

    def by_tenant(self) -> dict[str, UsageCounts]:
        """The usage of tenants by label, in a copy: the event loop may add labels meanwhile."""
        return dict(self._tenants)

    def by_adapter(self) -> dict[str, UsageCounts]:
        """The usage of adapters by label, in a copy."""
        return dict(self._adapters)

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        for label, known in (("tenant", self.by_tenant()), ("adapter", self.by_adapter())):
            requests = CounterMetricFamily(
                f"sera_{label}_requests", f"Requests that entered a batch, by {label}.", labels=[label]
            )
            tokens = CounterMetricFamily(
                f"sera_{label}_tokens",
                f"Tokens of generations, finished or not, and of rows, by {label}; cached ones are prompt tokens too.",
                labels=[label, "kind"],
            )
            inputs = {
                kind: CounterMetricFamily(f"sera_{label}_{kind}_inputs", f"{text}, by {label}.", labels=[label])
                for kind, text in INPUT_KINDS.items()
            }
            for name, usage in known.items():
                requests.add_metric([name], usage.requests)
                for kind in _KINDS:
                    tokens.add_metric([name, kind], usage.tokens[kind])
                for input_kind, family in inputs.items():
                    family.add_metric([name], usage.inputs[input_kind])
            yield from (requests, tokens, *inputs.values())
        waits = HistogramMetricFamily(
            "sera_tenant_wait_seconds",
            "Seconds from a request's arrival until it entered a batch, by tenant.",
            labels=["tenant"],
        )
        first_tokens = HistogramMetricFamily(
            "sera_tenant_first_token_seconds",
            "Seconds from a generation's arrival to its first token, by tenant.",
            labels=["tenant"],
        )
        for name, usage in self.by_tenant().items():
            for times, seconds in ((waits, usage.waits), (first_tokens, usage.first_tokens)):
                times.add_metric([name], list(zip(_BOUNDS, accumulate(seconds.counts), strict=True)), seconds.total)
        yield from (waits, first_tokens)

    def _of(self, known: dict[str, UsageCounts], name: str, share: int) -> tuple[UsageCounts, bool]:
        """The usage of a label, or of all others, and whether the label is new; `share` labels have the same owner."""
        usage = known.get(name)
        if usage is not None:
            return usage, False
        free = self._limit - len(known) + (OTHER in known)
        if share < free:
            usage = known[name] = UsageCounts()
            return usage, True
        return known.setdefault(OTHER, UsageCounts()), False
