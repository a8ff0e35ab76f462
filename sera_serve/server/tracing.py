"""OpenTelemetry traces of requests. FastAPI makes the span of each request; here are the spans within it.

Nothing of the SDK is imported, and no span is made, unless the settings or OpenTelemetry's own variables name an
endpoint. FastAPI takes the trace over that a client's `traceparent` header names (W3C Trace Context).
"""

from __future__ import annotations

import os
import threading
import time

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.context import Context
from starlette.types import Scope

from sera_serve.config import ServeSettings
from sera_serve.errors import InvalidConfiguration
from sera_serve.server.accounting import RequestRecord

# Probes and scrapes come every few seconds, and would hide the requests of clients.
_UNTRACED_PATHS = ("/healthz", "/readyz", "/metrics", "/v1/stats")
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACES_PATH = "/v1/traces"
_HIDDEN = "REDACTED"
# The last spans are sent at the end of the server, unless the endpoint does not answer.
_FLUSH_S = 3.0


class Tracing:
    """Makes the spans of requests.

    A request has, within FastAPI's span: `wait`, until it entered a batch; `load adapter`, within `wait`, if its
    adapter was not on the device; `first token`, from there to its first token; `generation`, from there to the end. A
    request for rows has `pass` in the place of the last two. Of several generations, the spans are the slowest one's.
    """

    def __init__(self, provider: trace.TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("sera_serve")

    def begin(self, scope: Scope, request_id: str) -> RequestSpans:
        """Begin with the current span, which is that of the request."""
        span = trace.get_current_span()
        if scope["query_string"]:
            # FastAPI has written it there. Clients put metadata into it, and keys, if by mistake.
            span.set_attribute("url.query", _HIDDEN)
        return RequestSpans(self._tracer, span, request_id)

    def close(self) -> None:
        """Send the spans that are left. Blocks for three seconds at most."""
        shutdown = getattr(self.provider, "shutdown", None)
        if shutdown is not None:
            # An endpoint that does not answer would be asked again for half a minute.
            thread = threading.Thread(target=shutdown, name="last-spans", daemon=True)
            thread.start()
            thread.join(_FLUSH_S)


class RequestSpans:
    """The spans of one request. Their times are those of `time.monotonic`, moved to the wall clock by one offset."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, request_id: str) -> None:
        self._tracer = tracer
        self._span = span
        self._offset = time.time() - time.monotonic()
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else None
        span.set_attribute("sera.request_id", request_id)

    def describe(self, record: RequestRecord) -> None:
        """Say on the request's span what the request did. Before the span ends, which is with the response."""
        if not self._span.is_recording():
            return
        for name, value in (
            ("sera.tenant", record.tenant),
            ("sera.adapter", record.adapter),
            ("sera.adapter_version", record.version),
            ("sera.inputs", record.inputs or None),
            ("gen_ai.usage.input_tokens", record.prompt_tokens or None),
            ("gen_ai.usage.output_tokens", record.completion_tokens or None),
            ("sera.error_code", record.code),
        ):
            if value is not None:
                self._span.set_attribute(name, value)

    def end(self, record: RequestRecord) -> None:
        """Make the spans within the request's, whose times are known by now."""
        self.describe(record)
        opened, waited_s = record.opened_at, record.waited_s
        if opened is None or waited_s is None:
            return
        parent = trace.set_span_in_context(self._span)
        entered, now = opened + waited_s, time.monotonic()
        wait = self._child("wait", parent, opened, entered)
        if record.load_began is not None:
            # A part of a call may load while another one runs.
            begin = max(opened, record.load_began)
            load_end = max(begin, record.load_began + record.load_s)
            self._child("load adapter", trace.set_span_in_context(wait), begin, load_end)
        if record.first_token_s is None:
            self._child("generation" if record.generations else "pass", parent, entered, now)
        else:
            first = max(entered, opened + record.first_token_s)
            self._child("first token", parent, entered, first)
            self._child("generation", parent, first, now)

    def _child(self, name: str, parent: Context, begin: float, end: float) -> trace.Span:
        span = self._tracer.start_span(name, parent, start_time=self._nanoseconds(begin))
        span.end(self._nanoseconds(end))
        return span

    def _nanoseconds(self, at: float) -> int:
        return int((at + self._offset) * 1e9)


def telemetry_config(tracing: Tracing | None) -> TelemetryConfig:
    """What FastAPI is told: spans of requests alone, or nothing at all."""
    config: TelemetryConfig = {
        "tracing": tracing is not None,
        "metrics": False,
        # It would export the messages of errors.
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in _UNTRACED_PATHS,
    }
    if tracing is not None:
        config["tracer_provider"] = tracing.provider
    return config


def tracing_of(settings: ServeSettings) -> Tracing | None:
    """Make the traces that the settings, or OpenTelemetry's variables, ask for; None if they ask for none.

    Raises:
        InvalidConfiguration: The extra `otel` is not installed.
    """
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off |= os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    endpoint = settings.otel_endpoint
    if endpoint is None and (is_off or not any(os.environ.get(name) for name in _VARIABLES)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidConfiguration(
            "traces are asked for, and OpenTelemetry's SDK is not installed; run `pip install 'sera-serve[otel]'`, or "
            "leave otel_endpoint out",
            param="otel_endpoint",
        ) from error
    # The variables OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come first.
    names = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "sera-serve"}
    provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
    exporter = OTLPSpanExporter() if endpoint is None else OTLPSpanExporter(traces_url(endpoint))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def traces_url(endpoint: str) -> str:
    """The URL that spans are sent to: the endpoint's own, or OTLP's path below it."""
    base = endpoint.rstrip("/")
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
