"""What the HTTP layer needs of an engine; `ServingEngine` has it, and so has the stub of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from adapters_store import AdapterStore, BaseInfo
from sera_serve.config import ServeSettings
from sera_serve.engine import (
    ClassifyResult,
    GenerateParams,
    GenerationResult,
    Priority,
    ResidencyStats,
    TokenDelta,
)
from sera_serve.server.metrics import ServerMetrics


class ServedBase(Protocol):
    """The base model, as far as an upload must fit it."""

    @property
    def info(self) -> BaseInfo:
        """Its fingerprint."""

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every linear layer an adapter may sit on."""


class TokenStream(Protocol):
    """The deltas of one generation; `result` is there once they are exhausted.

    Attributes:
        waited_s: Seconds from the request's arrival until it entered the batch.
        first_token_s: Seconds from its arrival to its first token, or None before that.
    """

    id: str
    adapter: str | None
    version: int | None
    result: GenerationResult | None
    waited_s: float
    first_token_s: float | None

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """The stream itself."""

    async def __anext__(self) -> TokenDelta:
        """The next delta; raises SeraServeError if the engine fails the request."""

    async def aclose(self) -> None:
        """Cancel what is left and give back the request's place; a no-op on a finished stream."""


class Engine(Protocol):
    """Answers requests; all refusals are SeraServeError or StoreError."""

    @property
    def base(self) -> ServedBase:
        """The base model it serves."""

    def start(self) -> None:
        """Begin to take requests."""

    def stop(self) -> None:
        """Stop; blocks until its threads have ended."""

    def mark_deleted(self, digest: str) -> None:
        """Give back the memory of a bundle that was deleted, once no request uses it."""

    def health(self) -> None:
        """Return when it can serve, raise EngineUnavailable with the reason when it cannot."""

    def ready(self) -> None:
        """`health`, with whatever it checks of itself when it has nothing to do."""

    def in_flight(self) -> int:
        """Requests under way, waiting or running."""

    def waiting(self) -> int:
        """Sequences, and parts of classifications, that wait for their turn."""

    def running(self) -> int:
        """Sequences, and parts of classifications, in a batch."""

    async def pin(self, digest: str) -> None:
        """Bring an adapter to the device and keep it there."""

    def unpin(self, digest: str) -> None:
        """Let an adapter leave the device again. Idempotent."""

    def stats(self) -> ResidencyStats:
        """Figures of the adapters' memory."""

    async def generate(self, params: GenerateParams) -> TokenStream:
        """Admit a request; raises every refusal before the first delta."""

    async def classify(
        self, adapter: str, inputs: list[str], priority: Priority = "normal", timeout_s: float | None = None
    ) -> ClassifyResult:
        """Classify each input with the adapter's head."""


# Coroutines, because FastAPI calls anything else in a thread: several hand-overs of the interpreter's lock a request.
async def _engine(request: Request) -> Engine:
    return cast(Engine, request.app.state.engine)


async def _store(request: Request) -> AdapterStore:
    return cast(AdapterStore, request.app.state.store)


async def _settings(request: Request) -> ServeSettings:
    return cast(ServeSettings, request.app.state.settings)


async def _metrics(request: Request) -> ServerMetrics:
    return cast(ServerMetrics, request.app.state.metrics)


EngineOf = Annotated[Engine, Depends(_engine)]
StoreOf = Annotated[AdapterStore, Depends(_store)]
SettingsOf = Annotated[ServeSettings, Depends(_settings)]
MetricsOf = Annotated[ServerMetrics, Depends(_metrics)]
