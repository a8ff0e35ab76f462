"""Usage by tenant and by adapter in the metrics and in the figures for charts, and the bound on labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import httpx
import pytest
from prometheus_client import CollectorRegistry

from adapters_store import AdapterStore
from sera_serve.access import Quota, Rates
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ClassifyResult, EmbedResult, GenerationStream, LabelScores, Principal, TokensUsed
from sera_serve.server import build_app
from sera_serve.server.accounting import Account, Meter, RequestRecord
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.usage_metrics import SECONDS, UsageMetrics
from support.live_server import live_server, wait_until
from support.stub_engine import FAILS_LATER, OVERLOADED, SLOW, StubEngine


def sample(metrics: UsageMetrics, name: str, **labels: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(metrics)
    return registry.get_sample_value(name, labels)


RAN = TokensUsed(prompt=5, cached_prompt=3, completion=2)


@dataclass(eq=False)
class Generation:
    """A generation, as far as an account looks at it."""

    adapter: str | None
    version: int | None
    waited_s: float = 0.1
    first_token_s: float = 0.2
    load_began: float | None = None
    load_s: float = 0.0
    tokens_used: TokensUsed = RAN


def tell(account: Account, generation: Generation) -> None:
    account.count_generation(cast(GenerationStream, generation))


def classified(adapter: str, inputs: int) -> ClassifyResult:
    return ClassifyResult(adapter, 1, [LabelScores("a", {"a": 1.0})] * inputs, waited_s=0.1)


def opened(metrics: ServerMetrics, tenant: str, record: RequestRecord | None = None) -> Account:
    """The account of a request, of a tenant without limits."""
    meter = Meter(Rates(), tenant, Quota())
    return Account(metrics, meter, Principal(tenant), "normal", record or RequestRecord(), {})


@pytest.fixture
def metrics(base: FrozenBase) -> ServerMetrics:
    return ServerMetrics(StubEngine(base), label_limit=3)


def test_each_request_is_counted_once_for_its_tenant_and_adapter(metrics: ServerMetrics) -> None:
    record = RequestRecord()
    account = opened(metrics, "acme", record)
    for waited_s in (0.1, 2.0):
        ran = Generation("acme/writer", 3, waited_s, waited_s + 1)
        tell(account, ran)
        tell(account, ran)
    usage = metrics.usage
    assert sample(usage, "sera_tenant_requests_total", tenant="acme") == 1
    assert sample(usage, "sera_adapter_requests_total", adapter="acme/writer") == 1
    for kind, count in (("prompt", 10), ("cached_prompt", 6), ("completion", 4)):
        assert sample(usage, "sera_tenant_tokens_total", tenant="acme", kind=kind) == count
        assert sample(usage, "sera_adapter_tokens_total", adapter="acme/writer", kind=kind) == count
    assert sample(usage, "sera_tenant_wait_seconds_count", tenant="acme") == 2
    assert sample(usage, "sera_tenant_wait_seconds_sum", tenant="acme") == pytest.approx(2.1)
    assert sample(usage, "sera_tenant_wait_seconds_bucket", tenant="acme", le=str(SECONDS[1])) == 1
    assert sample(usage, "sera_tenant_first_token_seconds_sum", tenant="acme") == pytest.approx(4.1)
    assert (record.tenant, record.adapter, record.version) == ("acme", "acme/writer", 3)
    assert (record.prompt_tokens, record.completion_tokens, record.generations) == (10, 4, 2)
    assert (record.waited_s, record.first_token_s) == (2.0, 3.0)


def test_rows_are_counted_by_each_of_their_adapters(metrics: ServerMetrics) -> None:
    account = opened(metrics, "acme")
    account.count_classified([classified("acme/a", 3), classified("acme/b", 3)])
    usage = metrics.usage
    assert sample(usage, "sera_tenant_requests_total", tenant="acme") == 1
    assert sample(usage, "sera_tenant_classified_inputs_total", tenant="acme") == 6
    for adapter in ("acme/a", "acme/b"):
        assert sample(usage, "sera_adapter_requests_total", adapter=adapter) == 1
        assert sample(usage, "sera_adapter_classified_inputs_total", adapter=adapter) == 3
    opened(metrics, "acme").count_embedded(EmbedResult(None, None, [], [4, 5], waited_s=0.1))
    assert sample(usage, "sera_adapter_tokens_total", adapter="base", kind="prompt") == 9
    assert sample(usage, "sera_tenant_tokens_total", tenant="acme", kind="prompt") == 9
    assert sample(usage, "sera_tenant_requests_total", tenant="acme") == 2


def test_labels_are_bounded_and_nothing_is_lost(metrics: ServerMetrics) -> None:
    for number in range(6):
        account = opened(metrics, f"tenant-{number}")
        tell(account, Generation(f"tenant-{number}/writer", 1))
        tell(account, Generation("0.5*a/b@v1 + 0.5*a/c@v1", None))
    usage = metrics.usage
    tenants = [sample(usage, "sera_tenant_requests_total", tenant=name) for name in ("tenant-0", "tenant-2", "other")]
    assert tenants == [1, 1, 3]
    assert sample(usage, "sera_tenant_requests_total", tenant="tenant-3") is None
    # The sums share a label, and it counts as one.
    adapters = [
        sample(usage, "sera_adapter_requests_total", adapter=name) for name in ("tenant-0/writer", "combined", "other")
    ]
    assert adapters == [1, 6, 4]
    assert set(usage.by_tenant()) == {"tenant-0", "tenant-1", "tenant-2", "other"}


def test_a_tenant_with_many_adapters_leaves_labels_to_the_adapters_of_others() -> None:
    usage = UsageMetrics(16)
    for number in range(100):
        usage.adapter(f"greedy/{number}", 1).requests += 1
    for number in range(100):
        usage.adapter(f"second/{number}", 1).requests += 1
    for name in ("late/one", "late/two", "greedy/0", "later/one"):
        usage.adapter(name, 1).requests += 1
    usage.adapter(None, None).requests += 1
    labels = usage.by_adapter()
    owners = Counter(label.partition("/")[0] for label in labels)
    assert owners == {"greedy": 8, "second": 4, "late": 2, "later": 1, "base": 1, "other": 1}
    assert labels["greedy/0"].requests == 2
    assert sum(counts.requests for counts in labels.values()) == 205


@pytest.fixture
def own(base: FrozenBase, store: AdapterStore) -> Iterator[httpx.Client]:
    """A server whose metrics no other test has changed."""
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root, metrics_label_limit=1))
    with live_server(app) as url, httpx.Client(base_url=url) as client:
        yield client


def test_the_server_counts_what_was_served_and_nothing_else(own: httpx.Client) -> None:
    own.post("/v1/generate", json={"prompt": OVERLOADED, "adapter": "nobody/there"})
    own.get("/v1/adapters/nobody/there")
    own.post("/v1/generate", json={"prompt": "hello", "adapter": "demo/writer", "n": 2})
    own.post("/v1/generate", json={"prompt": "hello", "adapter": "demo/writer", "stream": True})
    own.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["a", "b"]})
    own.post("/v1/generate", json={"prompt": "hello"})
    text = own.get("/metrics").text
    assert "nobody" not in text
    # No key is needed, so the tenant of the base model is its own.
    assert 'sera_tenant_requests_total{tenant="demo"} 3.0' in text
    assert 'sera_tenant_requests_total{tenant="other"} 1.0' in text
    assert 'sera_tenant_tokens_total{kind="completion",tenant="demo"} 9.0' in text
    assert 'sera_adapter_requests_total{adapter="demo/writer"} 2.0' in text
    stats = own.get("/v1/stats").json()
    assert stats["by_tenant"] == {"demo": {"requests": 3, "tokens": 26}, "other": {"requests": 1, "tokens": 8}}
    assert stats["tokens"] == {"prompt": 20, "completion": 12}
    assert stats["classified_inputs"] == 2
    assert stats["first_token"] == {"count": 4, "sum": 2.0}
    assert stats["waits"] == {"count": 5, "sum": 1.0}
    assert (stats["requests_in_flight"], stats["waiting"], stats["running"]) == (0, 3, 2)
    assert stats["cache_pages"] == {"in_use": 5, "total": 8}
    assert stats["adapters"]["hits"] == {"device": 7, "host": 2, "store": 1}
    assert (stats["adapters"]["resident"], stats["adapters"]["evictions"]) == (3, 4)


def test_generations_that_do_not_come_to_their_ends_are_counted_too(own: httpx.Client) -> None:
    with own.stream("POST", "/v1/generate", json={"prompt": SLOW, "adapter": "demo/writer", "stream": True}) as got:
        next(got.iter_lines())
    wait_until(lambda: own.get("/v1/stats").json()["tokens"]["prompt"] == 5)
    failed = own.post("/v1/generate", json={"prompt": FAILS_LATER, "adapter": "demo/writer", "n": 2})
    assert failed.status_code == 503
    stats = own.get("/v1/stats").json()
    assert stats["by_adapter"]["demo/writer"]["requests"] == 2
    assert stats["tokens"]["prompt"] == 15
    # At least one of the stream, and one of the generation that failed.
    assert stats["tokens"]["completion"] >= 2
    assert stats["by_tenant"]["demo"]["tokens"] == 15 + stats["tokens"]["completion"]


def test_the_figures_of_a_new_server_are_zero(own: httpx.Client) -> None:
    stats = own.get("/v1/stats").json()
    assert stats["tokens"] == {"prompt": 0, "completion": 0}
    assert stats["by_tenant"] == stats["by_adapter"] == {}
    assert stats["first_token"] == {"count": 0, "sum": 0.0}
