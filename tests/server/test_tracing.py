"""Traces: the spans of a request, the trace that a client goes on with, and nothing at all when they are off."""

from __future__ import annotations

import ast
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings, load_settings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.server.tracing import Tracing, telemetry_config, traces_url, tracing_of
from support.live_server import live_server, wait_until
from support.stub_engine import LATE_LATER, SLOW, StubEngine

REPOSITORY = Path(__file__).resolve().parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Spans:
    """What a server has exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    def named(self, *names: str) -> dict[str, ReadableSpan]:
        """Wait for spans with these names, and return all by name."""
        wait_until(lambda: set(names) <= {span.name for span in self.exporter.get_finished_spans()})
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def serve(store: AdapterStore, spans: Spans) -> Iterator[Callable[[Any], httpx.Client]]:
    with ExitStack() as stack:

        def begin(engine: Any) -> httpx.Client:
            app = build_app(engine, store, ServeSettings(store=store.root), spans.tracing)
            return stack.enter_context(httpx.Client(base_url=stack.enter_context(live_server(app)), timeout=20))

        yield begin


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_has_its_spans_in_the_trace_of_its_client(
    base: FrozenBase, store: AdapterStore, serve: Callable[[Any], httpx.Client], spans: Spans
) -> None:
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048))
    client = serve(engine)
    body = {"adapter": "demo/writer", "prompt": "Once upon a time", "max_new_tokens": 4}
    answer = client.post("/v1/generate", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status_code == 200
    found = spans.named("POST /v1/generate", "wait", "load adapter", "first token", "generation")
    request = found["POST /v1/generate"]
    assert request.parent is not None and f"{request.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    for name in ("wait", "first token", "generation"):
        assert found[name].parent.span_id == request.context.span_id
    assert found["load adapter"].parent.span_id == found["wait"].context.span_id
    attributes = request.attributes
    assert attributes["sera.request_id"] == answer.headers["x-request-id"]
    assert (attributes["sera.tenant"], attributes["sera.adapter"]) == ("demo", "demo/writer")
    assert attributes["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert attributes["http.response.status_code"] == 200
    assert "Once upon" not in str([span.to_json() for span in found.values()])
    # One after the other, and all of them now.
    times = [found[name].start_time for name in ("wait", "first token", "generation")]
    assert times == sorted(times)
    assert abs(time.time() - found["generation"].end_time / 1e9) < 20
    assert found["wait"].start_time <= found["load adapter"].start_time
    assert 0 < seconds(found["load adapter"]) <= seconds(found["wait"]) + 0.05
    # The adapter is there now.
    spans.exporter.clear()
    client.post("/v1/generate", json=body)
    assert "load adapter" not in spans.named("POST /v1/generate", "generation")


def test_a_classification_has_a_pass(
    base: FrozenBase, store: AdapterStore, serve: Callable[[Any], httpx.Client], spans: Spans
) -> None:
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048))
    client = serve(engine)
    assert client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["a", "b"]}).status_code == 200
    found = spans.named("POST /v1/classify", "wait", "load adapter", "pass")
    assert found["POST /v1/classify"].attributes["sera.inputs"] == 2


def test_streams_and_refusals_and_lost_clients_have_their_span(
    stub: StubEngine, serve: Callable[[Any], httpx.Client], spans: Spans
) -> None:
    client = serve(stub)
    client.post("/v1/generate", json={"prompt": "x", "stream": True, "adapter": "demo/writer"})
    stream = spans.named("POST /v1/generate", "wait", "first token", "generation")["POST /v1/generate"]
    assert (stream.attributes["sera.adapter"], stream.attributes["gen_ai.usage.output_tokens"]) == ("demo/writer", 3)
    assert seconds(spans.named("wait")["wait"]) == pytest.approx(0.25)
    assert seconds(spans.named("first token")["first token"]) == pytest.approx(0.25)
    spans.exporter.clear()
    assert client.post("/v1/generate", json={"nothing": 1}).status_code == 422
    assert spans.named("POST /v1/generate")["POST /v1/generate"].attributes["http.response.status_code"] == 422
    assert len(spans.exporter.get_finished_spans()) == 1
    spans.exporter.clear()
    with client.stream("POST", "/v1/generate", json={"prompt": SLOW, "stream": True}) as response:
        next(response.iter_bytes())
    assert "generation" in spans.named("POST /v1/generate", "generation")


def test_a_query_is_not_exported(stub: StubEngine, serve: Callable[[Any], httpx.Client], spans: Spans) -> None:
    client = serve(stub)
    client.get("/v1/adapters?api_key=sk-sera-secret&limit=1")
    client.get("/v1/adapters/demo/absent")
    found = spans.named("GET /v1/adapters", "GET /v1/adapters/{tenant}/{name}")
    assert "secret" not in str([span.to_json() for span in found.values()])
    assert found["GET /v1/adapters"].attributes["url.query"] == "REDACTED"
    missing = found["GET /v1/adapters/{tenant}/{name}"].attributes
    assert not missing.get("url.query") and missing["sera.error_code"] == "adapter_not_found"


def test_a_stream_that_fails_says_why(stub: StubEngine, serve: Callable[[Any], httpx.Client], spans: Spans) -> None:
    client = serve(stub)
    client.post("/v1/generate", json={"prompt": LATE_LATER, "stream": True})
    found = spans.named("POST /v1/generate", "generation")
    assert found["POST /v1/generate"].attributes["sera.error_code"] == "deadline_exceeded"


def test_probes_and_scrapes_have_no_span(stub: StubEngine, serve: Callable[[Any], httpx.Client], spans: Spans) -> None:
    client = serve(stub)
    for path in ("/healthz", "/readyz", "/metrics", "/v1/adapters"):
        client.get(path)
    assert set(spans.named("GET /v1/adapters")) == {"GET /v1/adapters"}


@pytest.mark.parametrize(
    ("environment", "endpoint", "is_on"),
    [
        ({}, None, False),
        ({}, "http://localhost:1", True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1"}, None, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:1/v1/traces"}, None, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"}, None, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_TRACES_EXPORTER": "none"}, None, False),
    ],
)
def test_traces_are_on_where_something_names_an_endpoint(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], endpoint: str | None, is_on: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracing = tracing_of(ServeSettings(otel_endpoint=endpoint))
    assert (tracing is not None) == is_on
    assert telemetry_config(tracing)["tracing"] == is_on
    if tracing is not None:
        tracing.close()


def test_an_endpoint_that_does_not_answer_does_not_keep_the_server(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, otel_endpoint="http://127.0.0.1:9")
    began = time.monotonic()
    with live_server(build_app(StubEngine(base), store, settings)) as url:
        assert httpx.get(f"{url}/v1/adapters").status_code == 200
    assert time.monotonic() - began < 6


def test_the_endpoint_is_checked() -> None:
    with pytest.raises(InvalidConfiguration, match="otel_endpoint"):
        load_settings(None, {"otel_endpoint": "localhost:4318"})
    assert traces_url("http://a:4318/") == "http://a:4318/v1/traces"
    assert traces_url("http://a:4318/v1/traces") == "http://a:4318/v1/traces"


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidConfiguration, match=r"sera-serve\[otel\]"):
        tracing_of(ServeSettings(otel_endpoint="http://localhost:1"))


def test_while_traces_are_off_the_sdk_is_not_needed(
    base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An import of such a module fails.
    for name in [*sys.modules, "opentelemetry.sdk", "opentelemetry.exporter"]:
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            monkeypatch.setitem(sys.modules, name, None)
    with live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root))) as url:
        assert httpx.post(f"{url}/v1/generate", json={"prompt": "x"}).status_code == 200
    for path in (REPOSITORY / "sera_serve").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                assert not node.module.startswith(("opentelemetry.sdk", "opentelemetry.exporter")), path
