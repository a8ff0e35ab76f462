"""An engine without a model: it gives scripted results, and records its calls and what was released."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack

import numpy as np

from adapters_store import AdapterBundle, AdapterConfig, PeftFiles, check_base
from adapters_store.errors import AdapterNotFound
from sera_serve.base import FrozenBase, Pooling, Span, import_base
from sera_serve.engine import (
    AdapterActivity,
    AdapterChoice,
    ClassifyResult,
    EmbedResult,
    GenerateParams,
    GenerationResult,
    HeadResult,
    ImportedAdapter,
    LabelScores,
    LabelSet,
    LoadTimes,
    Presence,
    Principal,
    Priority,
    ResidencyStats,
    RunnerLoad,
    Score,
    Spans,
    Task,
    TokenDelta,
    TokenLogprobs,
    TokensUsed,
)
from sera_serve.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    Overloaded,
    PromptTooLong,
    TenantOverloaded,
    UnsupportedTask,
)
from sera_serve.loop_turns import LoopTurns
from sera_serve.residency.import_probe import import_checkpoint

# Prompts that select a behaviour.
(
    SLOW,
    LONG,
    FAILS_LATER,
    CRASHES_LATER,
    GONE_LATER,
    TOO_LONG,
    OVERLOADED,
    CRASHES,
    HANGS,
    FLOODING,
    LATE,
    LATE_LATER,
    OTHERS_SHED,
    ENDS_BEGUN,
) = (
    "slow",
    "long",
    "fails later",
    "crashes later",
    "gone later",
    "too long",
    "overloaded",
    "crashes",
    "hangs",
    "flooding",
    "late",
    "late later",
    "others shed",
    "ends begun",
)
SECRET = "the password is swordfish"
TEXTS = ["Ahoy", ", \u2028mate\n\n", "ys ☠"]
# What the prompt LONG adds before TEXTS: tokens as fast as they can be sent.
LONG_TEXTS = [f"word {number}{chr(10) if number % 40 == 0 else ' '}" for number in range(12_000)]


class StubStream:
    """Emits TEXTS, one token each. `index` is its place among the answers to its prompt."""

    def __init__(self, engine: StubEngine, params: GenerateParams, index: int) -> None:
        self.id = "gen-1"
        self.adapter = params.adapter
        self.version = 3 if params.adapter else None
        self.result: GenerationResult | None = None
        self.waited_s = 0.25
        self.first_token_s: float | None = 0.5
        self.has_started = params.prompt != OTHERS_SHED or index == 0
        self.load_began: float | None = None
        self.load_s = 0.0
        self.computed_tokens = 5 if self.has_started else 0
        self.tokens_used = TokensUsed(5, 2, 0)
        self._engine = engine
        self._prompt = params.prompt
        self._params = params
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
        if not self.has_started:
            raise TenantOverloaded("more than its share; send it again later", param="adapter", retry_after=9)
        while self._prompt == SLOW:
            await asyncio.sleep(0.01)
            self._count_token()
            yield TokenDelta("x", [1])
        for text in LONG_TEXTS if self._prompt == LONG else ():
            await asyncio.sleep(0)
            self._count_token()
            yield TokenDelta(text, [1])
        for index, text in enumerate(TEXTS):
            tokens.append(index)
            self.computed_tokens += 1
            self._count_token()
            yield TokenDelta(text, [index], self._logprobs(index))
            if self._prompt == FAILS_LATER:
                raise EngineUnavailable("generation failed; the request may be sent again")
            if self._prompt == LATE_LATER:
                raise DeadlineExceeded("timeout_s ran out", param="timeout_s")
            if self._prompt == GONE_LATER:
                raise AdapterNotFound("adapter 'demo/writer' was deleted", param="adapter")
            if self._prompt == CRASHES_LATER:
                raise RuntimeError(SECRET)
        self.result = GenerationResult(
            self.id,
            self.adapter,
            self.version,
            "".join(TEXTS),
            tokens,
            "stop",
            5,
            len(tokens),
            2,
            tuple(one for token in tokens for one in self._logprobs(token)),
            () if self._params.prompt_logprobs is None else (TokenLogprobs(9, None), TokenLogprobs(8, -1.5)),
            self._params.stop_token_ids[0] if self._params.stop_token_ids else None,
        )

    def _count_token(self) -> None:
        self.tokens_used = self.tokens_used._replace(completion=self.tokens_used.completion + 1)

    def _logprobs(self, token: int) -> tuple[TokenLogprobs, ...]:
        top = self._params.logprobs
        return () if top is None else (TokenLogprobs(token, -0.5, ((7, -0.25), (token, -0.5))[:top]),)


def stub_result(adapter: AdapterChoice, text: str) -> HeadResult:
    """What an adapter of the stub says of a text, by its name."""
    if adapter == "demo/number":
        return Score(len(text) / 2)
    if adapter == "demo/labels":
        return LabelSet([text], {text: 0.75, "other": 0.625 - 0.5})
    if adapter == "demo/spans":
        return Spans([Span(0, 1, "first", 0.5, text[:1])] if text.isalpha() else [], len(text) > 10)
    return LabelScores(text, {text: 0.75, "other": 0.25})


class StubEngine:
    """Has the serving engine's interface, and no model."""

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        self.started = False
        self.context_tokens = 256
        self._turns: tuple[asyncio.AbstractEventLoop, LoopTurns] | None = None
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

    def check_config(self, config: AdapterConfig) -> None:
        check_base(config, self.base.info, self.base.module_shapes())

    def check_bundle(self, bundle: AdapterBundle) -> None:
        self.check_config(bundle.config)
        self.checked.append(bundle.digest)

    def import_checkpoint(self, files: PeftFiles) -> ImportedAdapter:
        imported = import_checkpoint(files, import_base(self.base), self.base.dtype)
        self.check_bundle(imported.bundle)
        return imported

    def drop_deleted_pins(self) -> None:
        self.dropped += 1

    def mark_deleted(self, digest: str) -> None:
        self.deleted.append(digest)

    def check_base_serves(self, task: Task) -> None:
        pass

    def health(self) -> None:
        if not self.started:
            raise EngineUnavailable("the stub is not running")

    def ready(self) -> None:
        self.health()

    def loop_turns(self) -> LoopTurns:
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, LoopTurns()
        return self._turns[1]

    def in_flight(self, tenant: str | None = None) -> int:
        return self.open_streams

    def loads(self) -> dict[Task, RunnerLoad]:
        return {"classify": RunnerLoad(1, 0), "generate": RunnerLoad(2, 2, preemptions=3, cache_pages=(5, 8))}

    def presence(self, adapters: Sequence[tuple[str, str]]) -> list[Presence]:
        return [
            Presence("device" if digest in self.pinned else "store", digest in self.pinned) for _, digest in adapters
        ]

    def stats(self) -> ResidencyStats:
        return ResidencyStats(
            resident=3,
            pinned=1,
            leases=2,
            loading=1,
            waiting=0,
            device_bytes=4096,
            device_limit=8192,
            host_bytes=512,
            host_limit=1024,
            granted={"device": 7, "host": 2, "store": 1},
            loads={"host": LoadTimes().with_load(0.002), "store": LoadTimes().with_load(0.02).with_load(99.0)},
            failed_loads={"gone": 2, "cannot_combine": 3, "error": 1},
            evictions=4,
            copies=3,
        )

    def waiting(self) -> int:
        return 3

    def running(self) -> int:
        return 2

    def adapter_activity(self) -> AdapterActivity:
        return AdapterActivity(("demo/writer", "demo/sorter"), ("demo/late@v2",), 8)

    async def pin(self, digest: str, reference: str | None = None) -> None:
        self.pinned.append(digest)

    def unpin(self, digest: str, reference: str | None = None) -> None:
        self.pinned.remove(digest)

    async def generate(
        self, params: GenerateParams, principal: Principal, received_at: float | None = None
    ) -> StubStream:
        (stream,) = await self.generate_prompts([params], principal, received_at)
        return stream

    async def generate_choices(
        self,
        params: GenerateParams,
        principal: Principal,
        received_at: float | None = None,
        submitted: Callable[[Sequence[StubStream]], None] | None = None,
    ) -> list[StubStream]:
        return await self.generate_prompts([params], principal, received_at, submitted)

    async def generate_prompts(
        self,
        prompts: Sequence[GenerateParams],
        principal: Principal,
        received_at: float | None = None,
        submitted: Callable[[Sequence[StubStream]], None] | None = None,
    ) -> list[StubStream]:
        asked = [(params, index) for params in prompts for index in range(params.n)]
        for params, _ in asked:
            self.received.append(received_at)
            self.asked.append(params)
            self.principals.append(principal)
            await self._misbehave(params.prompt)
        streams = [StubStream(self, *each) for each in asked]
        if submitted is not None:
            submitted(streams)
        if prompts[0].prompt == ENDS_BEGUN:
            for stream in streams:
                await stream.aclose()
            raise DeadlineExceeded("timeout_s ran out", param="timeout_s")
        return streams

    async def classify(
        self,
        adapter: AdapterChoice,
        inputs: Sequence[str | tuple[str, str]],
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Callable[[int], None] | None = None,
        counted: ExitStack | None = None,
    ) -> ClassifyResult:
        self.received.append(received_at)
        self.classified.append((priority, timeout_s))
        self.principals.append(principal)
        texts = [value if isinstance(value, str) else " | ".join(value) for value in inputs]
        await self._misbehave(texts[0])
        if adapter == "demo/writer":
            raise UnsupportedTask("adapter 'demo/writer' is for generate", param="adapter")
        scores = [stub_result(adapter, text) for text in texts]
        tokens = sum(map(len, texts))
        if charge is not None:
            charge(tokens)
        if not isinstance(adapter, str):
            named = " + ".join(f"{part.weight:g}*{part.adapter}" for part in adapter)
            return ClassifyResult(named, None, scores, prompt_tokens=tokens)
        return ClassifyResult(adapter, 2, scores, prompt_tokens=tokens)

    async def classify_each(
        self,
        adapters: Sequence[str],
        inputs: Sequence[str | tuple[str, str]],
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Callable[[int], None] | None = None,
        counted: ExitStack | None = None,
    ) -> list[ClassifyResult]:
        return [
            await self.classify(adapter, inputs, principal, priority, timeout_s, received_at, charge, counted)
            for adapter in adapters
        ]

    async def embed(
        self,
        adapter: AdapterChoice | None,
        inputs: Sequence[str | list[int]],
        principal: Principal,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Callable[[int], None] | None = None,
        counted: ExitStack | None = None,
    ) -> EmbedResult:
        self.received.append(received_at)
        self.principals.append(principal)
        await self._misbehave(inputs[0] if isinstance(inputs[0], str) else None)
        if charge is not None:
            charge(sum(map(len, inputs)))
        vectors = [np.array([len(value), 0.5], np.float32) for value in inputs]
        name = adapter if isinstance(adapter, str) else None
        return EmbedResult(name, 2, vectors, [len(value) for value in inputs])

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
