"""What routes depend on: the engine's protocol, the threads of the routes' work, and FastAPI dependencies.

`sera_serve.engine.ServingEngine` implements the protocol. So does the stub engine of the tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, PeftFiles
from sera_serve.access import AuditLog, Holdings, Quotas
from sera_serve.base import FrozenBase, ImageInput, Pooling
from sera_serve.config import ServeSettings
from sera_serve.engine import (
    AdapterActivity,
    AdapterChoice,
    ClassifyResult,
    EmbedResult,
    GenerateParams,
    GenerationResult,
    ImportedAdapter,
    Presence,
    Principal,
    Priority,
    ResidencyStats,
    RunnerLoad,
    Task,
    TokenDelta,
)
from sera_serve.server.metrics import ServerMetrics
from sera_serve.threads import BoundedExecutor

_CHANGING_THREADS = 4
# Of one core, pages of a long list take an eighth at most, beyond a first burst: clients that asked for page after page
# made generations take four times as long.
_LISTING_REST = 7
_MAX_WAITING = 64


class TokenStream(Protocol):
    """The deltas of one generation. `result` is set when the deltas are exhausted."""

    @property
    def id(self) -> str:
        """Name of the request."""

    @property
    def adapter(self) -> str | None:
        """Name of the adapter; None is the base model."""

    @property
    def version(self) -> int | None:
        """Version of the adapter; None is the base model."""

    @property
    def result(self) -> GenerationResult | None:
        """The outcome, once there is one."""

    @property
    def waited_s(self) -> float:
        """Seconds from the request's arrival until the request entered the batch."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request's arrival to its first token, or None before the first token."""

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far, without those that the prefix cache had."""

    @property
    def load_began(self) -> float | None:
        """When the adapter began to load for the request (`time.monotonic`), or None if it was on the device."""

    @property
    def load_s(self) -> float:
        """Seconds that the load took."""

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """Return the stream itself."""

    async def __anext__(self) -> TokenDelta:
        """Return the next delta. Raises SeraServeError if the engine ends the request with an error."""

    async def aclose(self) -> None:
        """Cancel the rest of the generation and release what the request holds. A no-op on a finished stream."""


class Engine(Protocol):
    """Serves requests. Every refusal is a SeraServeError or a StoreError."""

    @property
    def base(self) -> FrozenBase:
        """The base model, of which routes use the name, the tokenizer and the kind."""

    @property
    def context_tokens(self) -> int:
        """The most tokens of one request, prompt and answer together."""

    def start(self) -> None:
        """Start to accept requests."""

    def stop(self) -> None:
        """Stop. Blocks until the engine's threads have ended."""

    def check_bundle(self, bundle: AdapterBundle) -> None:
        """Check that a bundle can be served: made for this base, not larger than the pool, no overflow. Blocks.

        Raises:
            InvalidBundle, AdapterTooLarge, AdapterOverflow: The bundle is refused.
        """

    def check_config(self, config: AdapterConfig) -> None:
        """`check_bundle` for an adapter that has no weights yet.

        Raises:
            InvalidBundle, AdapterTooLarge: Adapters of this configuration are refused.
        """

    def import_checkpoint(self, files: PeftFiles) -> ImportedAdapter:
        """Make a bundle of a PEFT checkpoint, and check it as `check_bundle` does. Blocks.

        Raises:
            InvalidBundle, AdapterTooLarge, AdapterOverflow, ImportMismatch: The checkpoint is refused.
        """

    def mark_deleted(self, digest: str) -> None:
        """Free the memory of a deleted bundle when no request uses the bundle."""

    def health(self) -> None:
        """Return if the engine can serve. Raises EngineUnavailable with the reason if it cannot."""

    def ready(self) -> None:
        """Run `health`. On an idle engine, also check the engine's invariants."""

    def in_flight(self, tenant: str | None = None) -> int:
        """Number of requests in flight, waiting or running; those of one tenant if given."""

    def waiting(self) -> int:
        """Number of waiting sequences and waiting parts of classifications."""

    def running(self) -> int:
        """Number of sequences and parts of classifications in a batch."""

    def loads(self) -> Mapping[Task, RunnerLoad]:
        """What the runner of each task has to do."""

    async def pin(self, digest: str, reference: str | None = None) -> None:
        """Load an adapter onto the device and keep it there. `reference` is what requests will name it by."""

    def unpin(self, digest: str, reference: str | None = None) -> None:
        """End the pin of an adapter. Its content may leave the device if no other adapter pins it. Idempotent."""

    def drop_deleted_pins(self) -> None:
        """End the pins of adapters and bundles that were deleted, maybe by another server. Blocks."""

    def presence(self, adapters: Sequence[tuple[str, str]]) -> Sequence[Presence]:
        """Where each of these adapters, named by `tenant/name` and digest, is now."""

    def stats(self) -> ResidencyStats:
        """Figures of the adapters' memory."""

    def adapter_activity(self) -> AdapterActivity:
        """Which adapters serve and which are waited for, by the references that requests name them by."""

    async def generate(
        self, params: GenerateParams, principal: Principal, received_at: float | None = None
    ) -> TokenStream:
        """Admit a generation for `principal`. Every refusal is raised before the first delta.

        `received_at` is the time (`time.monotonic`) of the request's first byte; time limits count from it.
        """

    async def generate_choices(
        self, params: GenerateParams, principal: Principal, received_at: float | None = None
    ) -> Sequence[TokenStream]:
        """Admit `params.n` answers to one prompt, all or none. Each is read and closed on its own."""

    async def classify(
        self,
        adapter: AdapterChoice,
        inputs: Sequence[str | tuple[str, str] | ImageInput],
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
    ) -> ClassifyResult:
        """Classify each input with the adapter's head, for `principal`. A pair is two sentences of one input."""

    async def classify_each(
        self,
        adapters: Sequence[str],
        inputs: Sequence[str | tuple[str, str] | ImageInput],
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
    ) -> list[ClassifyResult]:
        """Classify each input with each of several adapters: one result an adapter, in their order."""

    async def embed(
        self,
        adapter: AdapterChoice | None,
        inputs: Sequence[str | list[int] | ImageInput],
        principal: Principal,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
    ) -> EmbedResult:
        """Make one vector of each input, texts and images or all lists of tokens, for `principal`. No input is cut.

        `pooling` None is that of a classifier's adapter, and else the base's own.
        """


@dataclass(frozen=True)
class Executors:
    """The threads of the routes' own work, by kind: no kind can take the threads of another one, or the engine's.

    Attributes:
        listing: Pages of adapters. A page of a large store is read for a second. The thread then rests.
        publishing: Reads, checks and publishes uploads. It has one thread, so one bundle at a time is in memory. malloc
            keeps a heap for each thread: with several threads, each heap would grow to the size of the largest bundles.
        changing: Single adapters: inspecting, deleting, pinning.
        forms: Forms of images, which are in memory whole.
    """

    listing: BoundedExecutor
    publishing: BoundedExecutor
    changing: BoundedExecutor
    forms: BoundedExecutor

    @classmethod
    def of(cls, settings: ServeSettings) -> Executors:
        """Make the executors of one app. No thread is started yet."""
        return cls(
            listing=BoundedExecutor("listing", 1, _MAX_WAITING, _LISTING_REST),
            publishing=BoundedExecutor("publishing", 1, settings.max_uploads),
            changing=BoundedExecutor("changing", _CHANGING_THREADS, _MAX_WAITING),
            forms=BoundedExecutor("reading forms", 1, _MAX_WAITING),
        )

    def close(self) -> None:
        """Begin no more work, and tell every caller so."""
        for executor in (self.listing, self.publishing, self.changing, self.forms):
            executor.close()


# The dependencies are coroutines. FastAPI would call plain functions in a thread, and each such call costs several
# hand-overs of the interpreter's lock.
async def _engine(request: Request) -> Engine:
    return cast(Engine, request.app.state.engine)


async def _store(request: Request) -> AdapterStore:
    return cast(AdapterStore, request.app.state.store)


async def _settings(request: Request) -> ServeSettings:
    return cast(ServeSettings, request.app.state.settings)


async def _executors(request: Request) -> Executors:
    return cast(Executors, request.app.state.executors)


async def _received_at(request: Request) -> float | None:
    return cast(float | None, getattr(request.state, "received_at", None))


async def _holdings(request: Request) -> Holdings:
    return cast(Holdings, request.app.state.holdings)


async def _quotas(request: Request) -> Quotas:
    return cast(Quotas, request.app.state.quotas)


async def _audit(request: Request) -> AuditLog:
    return cast(AuditLog, request.app.state.audit)


async def _metrics(request: Request) -> ServerMetrics:
    return cast(ServerMetrics, request.app.state.metrics)


EngineOf = Annotated[Engine, Depends(_engine)]
StoreOf = Annotated[AdapterStore, Depends(_store)]
SettingsOf = Annotated[ServeSettings, Depends(_settings)]
MetricsOf = Annotated[ServerMetrics, Depends(_metrics)]
HoldingsOf = Annotated[Holdings, Depends(_holdings)]
QuotasOf = Annotated[Quotas, Depends(_quotas)]
AuditOf = Annotated[AuditLog, Depends(_audit)]
ExecutorsOf = Annotated[Executors, Depends(_executors)]
# When the request's first byte came (`time.monotonic`). Time limits count from it.
ReceivedAt = Annotated[float | None, Depends(_received_at)]
