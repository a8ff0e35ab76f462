"""The whole engine under random orders of events: who gets an answer gets the one that it gets alone.

Generations and calls of rows come, are cancelled, expire and are shed, while adapters load, fail to load, overflow and
are deleted, with few rows, pages and slots, on a device that is late or not. After each event the parts of the engine
agree on who holds what. At the end nothing is held.

`SERVING_EXAMPLES=5000` looks at so many others, in the test that is marked slow.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import random
import weakref
from collections import Counter, defaultdict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.errors import AdapterNotFound
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, GenerationStream, Principal, ServingEngine, TokenDelta
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.request import Request
from sera_serve.engine.results import LabelScores
from sera_serve.engine.tasks import TaskRunner
from sera_serve.errors import (
    AdapterOverflow,
    AdapterTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    Overloaded,
    TenantOverloaded,
)
from support.factories import random_adapter
from support.hand_driven import FickleStore, HandDriven
from support.random_calls import (
    DEADLINE,
    GENERATIONS,
    LABELS,
    OVERFLOWING,
    ROW_CALLS,
    SHAPES,
    WRITERS,
    ask_rows,
    names_of,
)

REQUEST_SECONDS = 60.0
# Of the sum in the device pool.
LARGEST_BYTES = 4 * 61_440
# What a call may end with whose adapters are deleted or cannot be read.
UNREADABLE = {AdapterNotFound, OSError}
# Rounds of the event loop.
ALL = 1000


@pytest.fixture(scope="module")
def fickle(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> FickleStore:
    store = FickleStore(tmp_path_factory.mktemp("random-serving") / "store")
    for seed, name in enumerate(WRITERS):
        store.publish(random_adapter(decoder, SHAPES[seed % 3], seed, strength=0.5), name)
    for seed, name in enumerate(LABELS):
        labels = [f"label {number}" for number in range(2 + 3 * seed)]
        store.publish(random_adapter(decoder, SHAPES[(seed + 1) % 3], 10 + seed, labels, strength=0.5), name)
    small = SeraConfig(8, 8, 8.0, "all-linear")
    store.publish(random_adapter(decoder, small, 20, strength=1e22), "c/writer")
    store.publish(random_adapter(decoder, small, 21, ["x", "y"], strength=1e22), "c/labels")
    return store


@pytest.fixture(scope="module")
def alone(decoder: FrozenBase, fickle: FickleStore) -> list[Any]:
    """What each call gives where it is the only one, or its error."""
    engine = ServingEngine(decoder, fickle, ServeSettings(pool_mib=8, kv_cache_tokens=8192))
    engine.start()

    async def find() -> list[Any]:
        found: list[Any] = []
        for params in GENERATIONS:
            streams = await engine.generate_choices(replace(params, timeout_s=None), Principal("x"))
            found.append(await asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True))
        for asked in ROW_CALLS:
            call = ask_rows(engine, replace(asked, timeout_s=None), Principal("x"))
            found += await asyncio.gather(call, return_exceptions=True)
        return found

    found = asyncio.run(find())
    engine.stop()
    return found


class Event(NamedTuple):
    """What happens, to which of those that it may happen to, and for how many rounds the event loop runs then.

    Attributes:
        meanwhile: What happens within it, as another thread would do it.
    """

    kind: str
    which: int
    rounds: int
    meanwhile: Event | None = None


class World(NamedTuple):
    """A small engine, and what happens to it."""

    pages: int
    slots: int
    rows: int
    batch_tokens: int
    room: float
    host_mib: int
    small_loads: bool
    late: bool
    queue: int
    interval: int
    events: list[Event]


WORK = ["generation", "generation", "generation", "generation", "load", "load", "rows", "rows", "ask", "ask rows"]
# In the middle of a step, a read or a copy, other threads do all but run the same loop.
BESIDE = ["generation", "rows", "load", "ask", "ask rows", "read"]
MISHAPS = ["cancel", "close", "delete", "restore", "break", "mend", "fail", "time", "pin", "unpin", "weights"]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Some kinds of mishaps, more or less often, and calls of a few kinds, or of all."""
    mishaps = draw(st.lists(st.sampled_from(MISHAPS), max_size=len(MISHAPS), unique=True))
    kinds = draw(st.integers(2, 6)) * WORK + ["read", *mishaps]
    beside = BESIDE + [kind for kind in mishaps if kind != "fail"]
    first, others = draw(st.sampled_from([(0, 200), (0, 200), (3, 9), (20, 12), (100, 5)]))
    which = st.integers(first, first + others)
    rounds = st.sampled_from([ALL, ALL, 0, 1, 2, 3])
    inner = st.builds(Event, st.sampled_from(beside), which, rounds)
    event = st.builds(Event, st.sampled_from(kinds), which, rounds, st.none() | inner)
    return World(
        pages=draw(st.sampled_from([4, 6, 9, 20])),
        slots=draw(st.integers(1, 4)),
        rows=draw(st.integers(1, 6)),
        batch_tokens=draw(st.sampled_from([16, 40, 200])),
        room=draw(st.sampled_from([1.05, 1.6, 4.0])),
        host_mib=draw(st.sampled_from([0, 1, 64])),
        small_loads=draw(st.booleans()),
        late=draw(st.booleans()),
        queue=draw(st.sampled_from([6, 10, 30, 60])),
        interval=draw(st.sampled_from([1, 3])),
        events=draw(st.lists(event, min_size=60, max_size=200)),
    )


@dataclass(eq=False)
class Call:
    """A call under way.

    Attributes:
        number: What it asks: a generation, or a call of rows, whose numbers come after those.
        digests: Of its adapters.
        deadline: When it is over.
        failures: Steps that had failed when it came.
        streams: Its generations, from the moment that they are submitted.
        deltas: What was read of each.
        closed: Which of them were closed by somebody else than their reader.
        charged: What it was told to have had computed.
        excuses: Errors with which it may end.
        may_read: Whether its streams are read.
    """

    number: int
    digests: set[str]
    deadline: float
    failures: int
    streams: Sequence[GenerationStream] = ()
    deltas: defaultdict[int, list[TokenDelta]] = field(default_factory=lambda: defaultdict(list))
    closed: set[int] = field(default_factory=set)
    charged: list[int] = field(default_factory=list)
    excuses: set[type[BaseException]] = field(default_factory=lambda: {Overloaded, TenantOverloaded})
    may_read: asyncio.Event = field(default_factory=asyncio.Event)


class Traffic:
    """What happens to one engine."""

    def __init__(self, by_hand: HandDriven, seen: Counter[str]) -> None:
        self.by_hand, self.engine, self.loop, self.store = by_hand, by_hand.engine, by_hand.loop, by_hand.store
        self.seen = seen
        self.calls: dict[Call, asyncio.Task[Any]] = {}
        self.pins: list[asyncio.Task[None]] = []
        self.requests: list[weakref.ref[Request]] = []
        self.digests = {name: self.store.resolve(name).digest for name in [*WRITERS, *LABELS, *OVERFLOWING]}
        self.names = list(self.digests)
        self.running: list[TaskRunner[Any]] = []

    def happens(self, event: Event) -> None:
        """Do what the event says, and look whether the parts of the engine agree then."""
        if event.meanwhile is not None:
            self.by_hand.meanwhile = partial(self._do, event.meanwhile)
        self._do(event)
        self.by_hand.meanwhile = None
        self.by_hand.check()

    def _do(self, event: Event) -> None:
        getattr(self, "_" + event.kind.replace(" ", "_"))(event.which)
        self.loop.turn(event.rounds)

    def live(self) -> list[Call]:
        return [call for call, task in self.calls.items() if not task.done()]

    def _pick(self, which: int) -> Call | None:
        live = self.live()
        return live[which % len(live)] if live else None

    def _generation(self, which: int) -> None:
        self._run(self.by_hand.generation)

    def _rows(self, which: int) -> None:
        self._run(self.by_hand.classification)

    def _run(self, runner: TaskRunner[Any]) -> bool:
        if runner in self.running:
            return False
        self.running.append(runner)
        ran = self.by_hand.step(runner)
        self.running.remove(runner)
        return ran

    def _load(self, which: int) -> None:
        if self.by_hand.loads.jobs:
            self.by_hand.load(which)

    def _ask(self, which: int) -> None:
        number = which % len(GENERATIONS)
        params = GENERATIONS[number]
        call = self._new(number, params.adapter, params.timeout_s)
        if which % 7:
            call.may_read.set()
        principal = Principal(names_of(params.adapter)[0].split("/")[0] if params.adapter else "base")
        self._start(call, self._generate(call, params, principal))

    async def _generate(self, call: Call, params: GenerateParams, principal: Principal) -> list[Any]:
        streams = await self.engine.generate_choices(params, principal, self.loop.time())
        call.streams = streams
        self.requests += [weakref.ref(stream.request) for stream in streams]
        try:
            reads = (self._read_stream(call, number, stream) for number, stream in enumerate(streams))
            return await asyncio.gather(*reads, return_exceptions=True)
        finally:
            for stream in streams:
                await stream.aclose()

    async def _read_stream(self, call: Call, number: int, stream: GenerationStream) -> GenerationResult | None:
        await call.may_read.wait()
        async for delta in stream:
            call.deltas[number].append(delta)
        return stream.result

    def _ask_rows(self, which: int) -> None:
        asked = ROW_CALLS[which % len(ROW_CALLS)]
        call = self._new(len(GENERATIONS) + which % len(ROW_CALLS), asked.adapter, asked.timeout_s)
        options = {"received_at": self.loop.time(), "charge": call.charged.append}
        self._start(call, ask_rows(self.engine, asked, Principal("abc"[which % 3]), **options))

    def _new(self, number: int, adapter: Any, timeout_s: float | None) -> Call:
        digests = {self.digests[name] for name in names_of(adapter)}
        deadline = math.inf if timeout_s is None else self.loop.time() + timeout_s
        call = Call(number, digests, deadline, self.by_hand.failures)
        if not OVERFLOWING.isdisjoint(names_of(adapter)):
            call.excuses.add(AdapterOverflow)
        if digests & (self.store.gone | self.store.failing):
            call.excuses |= UNREADABLE
        if self.pins:
            call.excuses.add(AdapterTooLarge)
        return call

    def _start(self, call: Call, work: Coroutine[Any, Any, Any]) -> None:
        task = self.calls[call] = self.loop.create_task(work)
        task.add_done_callback(_looked_at)
        self.seen["calls"] += 1

    def _cancel(self, which: int) -> None:
        if (call := self._pick(which)) is not None:
            call.excuses.add(asyncio.CancelledError)
            self.calls[call].cancel()

    def _close(self, which: int) -> None:
        call = self._pick(which)
        if call is not None and call.streams:
            number = which % len(call.streams)
            call.closed.add(number)
            self.loop.create_task(call.streams[number].aclose())

    def _read(self, which: int) -> None:
        if (call := self._pick(which)) is not None:
            call.may_read.set()

    def _delete(self, which: int) -> None:
        digest = self._excuse(which)
        self.store.gone.add(digest)
        self.engine.mark_deleted(digest)

    def _restore(self, which: int) -> None:
        if self.store.gone:
            self.store.gone.remove(sorted(self.store.gone)[which % len(self.store.gone)])

    def _break(self, which: int) -> None:
        self.store.failing.add(self._excuse(which))

    def _excuse(self, which: int) -> str:
        digest = self.digests[self.names[which % len(self.names)]]
        for call in self.live():
            if digest in call.digests:
                call.excuses |= UNREADABLE
        return digest

    def _mend(self, which: int) -> None:
        self.store.failing.clear()

    def _fail(self, which: int) -> None:
        self.by_hand.fails = True

    def _time(self, which: int) -> None:
        self.loop.now += [0.1, 1.0, 7.0, 7.0, DEADLINE + 1, REQUEST_SECONDS + 1][which % 6]

    def _pin(self, which: int) -> None:
        digest = self.digests[self.names[which % len(self.names)]]
        for call in self.live():
            call.excuses.add(AdapterTooLarge)
        self.pins.append(self.loop.create_task(self.engine.pin(digest)))
        self.pins[-1].add_done_callback(_looked_at)

    def _unpin(self, which: int) -> None:
        self.engine.unpin(self.digests[self.names[which % len(self.names)]])

    def _weights(self, which: int) -> None:
        self.engine.set_tenant_weights({"a": 1.0 + which % 3, "b": 1.0 + which % 2})

    def end(self, alone: Sequence[Any]) -> None:
        """Let all calls end, and look at what they gave, and whether anything is held."""
        self.by_hand.fails = False
        self._let_read()
        for _ in range(4000):
            self.loop.turn()
            if self.by_hand.loads.jobs:
                self.by_hand.load(0)
            ran = [self._run(runner) for runner in self.engine.runners.values()]
            self.by_hand.check()
            if not (any(ran) or self.by_hand.loads.jobs or self.loop.turn()):
                break
        assert not self.live(), "a call waits for ever"
        assert all(pin.done() for pin in self.pins), "a pin waits for ever"
        self._check_calls(alone)
        self._count()
        self.by_hand.check_nothing_held()
        # Errors have the frames that they came through, so no variable here may be a call or its task.
        self.calls.clear()
        self.pins.clear()
        gc.collect()
        assert not any(request() for request in self.requests), "a request is kept after its end"

    def _let_read(self) -> None:
        for call in self.calls:
            call.may_read.set()

    def _check_calls(self, alone: Sequence[Any]) -> None:
        for call, task in self.calls.items():
            self._check_call(call, task, alone[call.number])

    def _check_call(self, call: Call, task: asyncio.Task[Any], want: Any) -> None:
        if self.by_hand.failures > call.failures:
            call.excuses.add(EngineUnavailable)
        if self.loop.now >= call.deadline:
            call.excuses.add(DeadlineExceeded)
        if task.cancelled():
            outcomes: list[Any] = [asyncio.CancelledError()]
        elif (error := task.exception()) is not None:
            outcomes = [error]
        elif call.number >= len(GENERATIONS):
            check_rows(task.result(), want)
            groups = want if isinstance(want, list) else [want]
            assert call.charged == [sum(np.sum(group.prompt_tokens) for group in groups)]
            outcomes = []
            self.seen["calls of rows answered"] += 1
        else:
            outcomes = task.result()
        assert len(call.charged) <= 1, "charged twice"
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, tuple(call.excuses)), (call.number, repr(outcome))
                self.seen[type(outcome).__name__] += 1
            elif outcome is None:
                assert number in call.closed, "a stream ends without a result"
            else:
                check_generation(outcome, want[number])
                self.seen["generations answered"] += 1
                self.seen["prefix hits"] += outcome.cached_tokens > 0
        for number, deltas in call.deltas.items():
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert not tokens or tokens == want[number].token_ids[: len(tokens)]
            assert not tokens or want[number].text.startswith("".join(delta.text for delta in deltas))

    def _count(self) -> None:
        self.seen["evictions"] += self.engine.stats().evictions
        self.seen["preemptions"] += self.by_hand.generation.load().preemptions
        self.seen["failed steps"] += self.by_hand.failures
        if self.by_hand.late is not None:
            self.seen["ahead"] += self.by_hand.late.ahead
            self.seen["joined"] += self.by_hand.late.joined


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Have asyncio log no error of a task: the test looks at it at the end."""
    if not task.cancelled():
        task.exception()


def check_generation(got: Any, want: Any) -> None:
    assert not isinstance(want, BaseException), want
    assert got.token_ids == want.token_ids and got.text == want.text
    assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)
    assert (got.prompt_tokens, got.completion_tokens) == (want.prompt_tokens, want.completion_tokens)
    for mine, its in ((got.logprobs, want.logprobs), (got.prompt_logprobs, want.prompt_logprobs)):
        assert [one.token for one in mine] == [one.token for one in its]
        assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in its], abs=1e-3)


def check_rows(got: Any, want: Any) -> None:
    assert not isinstance(want, BaseException), want
    if isinstance(want, list):
        for one, its in zip(got, want, strict=True):
            check_rows(one, its)
        return
    assert got.adapter == want.adapter and np.array_equal(got.prompt_tokens, want.prompt_tokens)
    if hasattr(want, "vectors"):
        np.testing.assert_allclose(np.stack(got.vectors), np.stack(want.vectors), atol=1e-4)
        return
    for one, its in zip(got.results, want.results, strict=True):
        assert isinstance(one, LabelScores) and isinstance(its, LabelScores)
        assert one.probabilities == pytest.approx(its.probabilities, abs=1e-4)


def look_at(world: World, base: FrozenBase, store: FickleStore, alone: Sequence[Any], seen: Counter[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # pytest keeps what is logged, and with an error its frames.
        patch.setattr(logging.getLogger("sera_serve.engine"), "disabled", True)
        by_hand = HandDriven(
            base,
            store,
            patch,
            pool_bytes=int(world.room * LARGEST_BYTES),
            small_loads=world.small_loads,
            late=world.late,
            kv_cache_tokens=world.pages * PAGE_SIZE,
            max_resident=world.slots,
            max_sequences=world.rows,
            max_batch_tokens=world.batch_tokens,
            host_cache_mib=world.host_mib,
            max_queue=world.queue,
            max_queue_per_tenant=world.queue // 2,
            classify_max_batch=4,
            classify_max_wait_ms=0,
            cpu_threads=1,
            request_timeout_s=REQUEST_SECONDS,
            stream_interval=world.interval,
        )
        traffic = Traffic(by_hand, seen)
        try:
            for event in world.events:
                traffic.happens(event)
            traffic.end(alone)
        finally:
            by_hand.close()


def look_at_many(
    count: int, base: FrozenBase, store: FickleStore, alone: Sequence[Any], seen: Counter[str], number: int = 0
) -> None:
    """Look at so many random worlds, and count what happens in them; another number, other worlds."""

    @hypothesis.seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(worlds())
    def look(world: World) -> None:
        look_at(world, base, store, alone, seen)

    look()


def test_who_gets_an_answer_gets_the_one_that_it_gets_alone(
    decoder: FrozenBase, fickle: FickleStore, alone: Sequence[Any]
) -> None:
    look_at_many(8, decoder, fickle, alone, seen := Counter())
    assert seen["generations answered"] and seen["calls of rows answered"]


@pytest.mark.slow
def test_so_it_is_in_many_orders_of_events(decoder: FrozenBase, fickle: FickleStore, alone: Sequence[Any]) -> None:
    count = int(os.environ.get("SERVING_EXAMPLES", "60"))
    number = random.getrandbits(32) if "SERVING_EXAMPLES" in os.environ else 0
    often = ["generations answered", "calls of rows answered", "prefix hits", "evictions", "ahead"]
    errors = ["AdapterOverflow", "AdapterNotFound", "CancelledError", "EngineUnavailable", "OSError"]
    rarely = ["preemptions", "failed steps", "Overloaded", "TenantOverloaded", *errors]
    seen: Counter[str] = Counter()
    for first in range(0, 5 * count, count):
        look_at_many(count, decoder, fickle, alone, seen, number + first)
        if all(seen[what] > (first + count) / 4 for what in often) and all(seen[what] for what in rarely):
            return
    # The checks had nothing to find in what never happened.
    pytest.fail(f"in {5 * count} orders of events this has happened: {seen}")
