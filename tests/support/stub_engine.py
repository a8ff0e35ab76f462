"""An engine without a model: it gives scripted results, and records its calls and what was released."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from adapters_store import AdapterBundle, check_base
from sera_serve.base import FrozenBase
from sera_serve.engine import (
    ClassifyResult,
    GenerateParams,
    GenerationResult,
    LabelScores,
    LoadTimes,
    Principal,
    Priority,
    ResidencyStats,
    RunnerLoad,
    Task,
    TokenDelta,
)
from sera_serve.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    Overloaded,
    PromptTooLong,
    TenantOverloaded,
    UnsupportedTask,
)

# Prompts that select a behaviour.
SLOW, FAILS_LATER, CRASHES_LATER, TOO_LONG, OVERLOADED, CRASHES, HANGS, FLOODING, LATE, LATE_LATER = (
    "slow",
    "fails later",
    "crashes later",
    "too long",
    "overloaded",
    "crashes",
    "hangs",
    "flooding",
    "late",
    "late later",
)
SECRET = "the password is swordfish"
TEXTS = ["Ahoy", ", \u2028mate\n\n", "ys ☠"]


class StubStream:
    """Emits TEXTS, one token each."""

    def __init__(self, engine: StubEngine, params: GenerateParams) -> None:
        self.id = "gen-1"
        self.adapter = params.adapter
        self.version = 3 if params.adapter else None
        self.result: GenerationResult | None = None
        self.waited_s = 0.25
        self.first_token_s: float | None = 0.5
        self._engine = engine
        self._prompt = params.prompt
        self._deltas = self._run()
        engine.open_streams += 1

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        await self._deltas.aclose()
        self._engine.open_streams -= 1
        self._engine.cancelled += self.result is None

    async def _run(self) -> AsyncIterator[TokenDelta]:
        tokens: list[int] = []
        while self._prompt == SLOW:
            await asyncio.sleep(0.01)
            yield TokenDelta("x", [1])
        for index, text in enumerate(TEXTS):
            tokens.append(index)
            yield TokenDelta(text, [index])
            if self._prompt == FAILS_LATER:
                raise EngineUnavailable("generation failed; the request may be sent again")
            if self._prompt == LATE_LATER:
                raise DeadlineExceeded("timeout_s ran out", param="timeout_s")
            if self._prompt == CRASHES_LATER:
                raise RuntimeError(SECRET)
        self.result = GenerationResult(
            self.id, self.adapter, self.version, "".join(TEXTS), tokens, "stop", 5, len(tokens), 2
        )


class StubEngine:
    """Has the serving engine's interface, and no model."""

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        self.started = False
        self.begin_record()

    def begin_record(self) -> None:
        """Clear the record."""
        self.deleted: list[str] = []
        self.checked: list[str] = []
        self.dropped = 0
        self.received: list[float | None] = []
        self.pinned: list[str] = []
        self.classified: list[tuple[Priority, float | None]] = []
        self.asked: list[GenerateParams] = []
        self.principals: list[Principal] = []
        self.open_streams = 0
        self.cancelled = 0

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.started = False

    def check_bundle(self, bundle: AdapterBundle) -> None:
        check_base(bundle.config, self.base.info, self.base.module_shapes())
        self.checked.append(bundle.digest)

    def drop_deleted_pins(self) -> None:
        self.dropped += 1

    def mark_deleted(self, digest: str) -> None:
        self.deleted.append(digest)

    def health(self) -> None:
        if not self.started:
            raise EngineUnavailable("the stub is not running")

    def ready(self) -> None:
        self.health()

    def in_flight(self) -> int:
        return self.open_streams

    def loads(self) -> dict[Task, RunnerLoad]:
        return {"classify": RunnerLoad(1, 0), "generate": RunnerLoad(2, 2, preemptions=3, cache_pages=(5, 8))}

    def stats(self) -> ResidencyStats:
        return ResidencyStats(
            resident=3,
            pinned=1,
            leases=2,
            loading=1,
            waiting=0,
            device_bytes=4096,
            device_limit=8192,
            host_adapters=5,
            host_bytes=512,
            host_limit=1024,
            granted={"device": 7, "host": 2, "store": 1},
            loads={"host": LoadTimes().with_load(0.002), "store": LoadTimes().with_load(0.02).with_load(99.0)},
            failed_loads=1,
            evictions=4,
            copies=3,
        )

    def waiting(self) -> int:
        return 3

    def running(self) -> int:
        return 2

    async def pin(self, digest: str) -> None:
        self.pinned.append(digest)

    def unpin(self, digest: str) -> None:
        self.pinned.remove(digest)

    async def generate(
        self, params: GenerateParams, principal: Principal, received_at: float | None = None
    ) -> StubStream:
        self.received.append(received_at)
        self.asked.append(params)
        self.principals.append(principal)
        await self._misbehave(params.prompt)
        return StubStream(self, params)

    async def classify(
        self,
        adapter: str,
        inputs: Sequence[str | tuple[str, str]],
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
    ) -> ClassifyResult:
        self.received.append(received_at)
        self.classified.append((priority, timeout_s))
        self.principals.append(principal)
        texts = [text for text in inputs if isinstance(text, str)]
        assert len(texts) == len(inputs), "HTTP sends no pairs"
        await self._misbehave(texts[0])
        if adapter == "demo/writer":
            raise UnsupportedTask("adapter 'demo/writer' is for generate", param="adapter")
        scores = [LabelScores(text, {text: 0.75, "other": 0.25}) for text in texts]
        return ClassifyResult(adapter, 2, scores)

    async def _misbehave(self, text: str | None) -> None:
        if text == TOO_LONG:
            raise PromptTooLong("9 prompt tokens exceed the context; shorten the prompt", param="prompt")
        if text == OVERLOADED:
            raise Overloaded("too many requests; send it again later", retry_after=7)
        if text == FLOODING:
            raise TenantOverloaded("tenant 'demo' has too many requests; send it again later", retry_after=9)
        if text == LATE:
            raise DeadlineExceeded("timeout_s ran out", param="timeout_s")
        if text == CRASHES:
            raise RuntimeError(SECRET)
        if text == HANGS:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
