"""Calls of many rows, queued or given up at once: one in a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import Principal, ServingEngine, row_calls
from sera_serve.engine.request import FinishReason
from sera_serve.errors import TenantOverloaded
from sera_serve.loop_turns import LoopTurns
from support.engine import settled, until
from support.factories import random_adapter
from support.fake_residency import Bench
from support.standstill import standstill

Start = Callable[..., ServingEngine]
CALLS = 4


@pytest.fixture
def engine(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> ServingEngine:
    shape = SeraConfig(8, 4, 8.0, ("q_proj", "v_proj"))
    store.publish(random_adapter(decoder, shape, 1, ["a", "b"], 0.5), "acme/guard")
    return start_engine(decoder, store)


def logged(log: list[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        log.append(name)
        return call(*arguments)

    return wrapped


async def ticks(log: list[str]) -> None:
    while True:
        log.append("others")
        await asyncio.sleep(0)


def most_in_a_row(log: list[str], name: str) -> int:
    return max(stretch.count(name) for stretch in " ".join(log).split("others"))


@pytest.mark.parametrize(("rows", "in_a_row"), [(40, 1), (4, CALLS)])
def test_many_rows_are_queued_by_one_call_in_a_turn(
    engine: ServingEngine, rows: int, in_a_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    scheduler = engine.runners["classify"].scheduler
    monkeypatch.setattr(scheduler, "submit", logged(log, "submit", scheduler.submit))
    made = engine._resolved_and_tokenized

    async def main() -> None:
        ready, count = asyncio.Event(), 0

        async def together(*arguments: Any) -> Any:
            nonlocal count
            groups = await made(*arguments)
            count += 1
            await ready.wait()
            return groups

        monkeypatch.setattr(engine, "_resolved_and_tokenized", together)
        calls = [
            asyncio.create_task(engine.classify("acme/guard", ["x"] * rows, Principal("acme"))) for _ in range(CALLS)
        ]
        await until(lambda: count == CALLS)
        beside = asyncio.create_task(ticks(log))
        ready.set()
        results = await asyncio.gather(*calls)
        beside.cancel()
        assert [len(result.results) for result in results] == [rows] * CALLS
        await settled(engine)

    asyncio.run(main())
    assert log.count("submit") == CALLS and most_in_a_row(log, "submit") == in_a_row


def test_many_parts_are_given_up_by_one_call_in_a_turn(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    runner = engine.runners["classify"]
    monkeypatch.setattr(runner, "cancel_all", logged(log, "cancel", runner.cancel_all))
    # A part has one row.
    object.__setattr__(engine.settings, "classify_max_batch", 1)

    async def main() -> None:
        with standstill():
            calls = [
                asyncio.create_task(engine.classify("acme/guard", ["x"] * 40, Principal("acme"))) for _ in range(CALLS)
            ]
            await until(lambda: engine.waiting() + engine.running() == 40 * CALLS)
            beside = asyncio.create_task(ticks(log))
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.sleep(0)
            # A second time, as when the server stops: what is given up is given up.
            for call in calls:
                call.cancel()
            assert all(
                isinstance(error, asyncio.CancelledError)
                for error in await asyncio.gather(*calls, return_exceptions=True)
            )
            await until(lambda: log.count("cancel") == CALLS)
            beside.cancel()
        await settled(engine)

    asyncio.run(main())
    assert most_in_a_row(log, "cancel") == 1


def test_several_requests_are_cancelled_under_one_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(rows=1)
    running, first, *others = (bench.submit("a", adapter) for adapter in (None, None, "x", None))
    taken = 0
    lock = bench.scheduler._lock

    class Counting:
        def __enter__(self) -> None:
            nonlocal taken
            taken += 1
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    wake = bench.scheduler.wake
    # It looks at the queue at once.
    monkeypatch.setattr(bench.scheduler, "wake", lambda: None)
    monkeypatch.setattr(bench.scheduler, "_lock", Counting())
    requests = [running, first, *others]
    assert bench.scheduler.cancel_waiting(requests, FinishReason.CANCELLED) == [running]
    assert taken == 1
    monkeypatch.setattr(bench.scheduler, "wake", wake)
    assert all(request.finish_reason is FinishReason.CANCELLED for request in (first, *others))
    assert bench.scheduler.cancel_waiting(requests, FinishReason.CANCELLED) == [running]
    bench.finish(running)
    assert bench.holds_nothing()


MOST = 100


@pytest.mark.parametrize("field", ["adapters", "inputs", "input"])
def test_a_tenant_has_so_many_waiting_parts(engine: ServingEngine, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_calls, "_MAX_PARTS", MOST)
    object.__setattr__(engine.settings, "classify_max_batch", 1)
    texts = ["x"] * 20

    def call(tenant: str, count: int = 2) -> Awaitable[Any]:
        principal = Principal(tenant)
        if field == "adapters":
            return engine.classify_each(["acme/guard"] * count, texts, principal)
        if field == "inputs":
            return engine.classify("acme/guard", texts * count, principal)
        return engine.embed("acme/guard", texts * count, principal)

    def parts() -> int:
        return engine.waiting() + engine.running()

    async def main() -> None:
        with standstill() as stands:
            # A call alone may have more.
            calls = [asyncio.ensure_future(call("large", 8))]
            # The pass that stands still has parts of this call alone.
            await until(lambda: parts() == 160 and stands.is_set())
            calls += [asyncio.ensure_future(call("acme")) for _ in range(3)]
            await until(lambda: parts() == 280)
            with pytest.raises(TenantOverloaded, match=f"^1[0-9][0-9] parts .* send fewer {field};") as error:
                await call("acme")
            assert error.value.param == field and error.value.retry_after >= 1
            assert parts() == 280 and engine.in_flight("acme") == 3
            calls.append(asyncio.ensure_future(call("other")))
            await until(lambda: parts() == 320)
        await asyncio.gather(*calls)
        await call("acme")
        await settled(engine)

    asyncio.run(main())


def test_an_event_loop_has_one_object_for_turns(engine: ServingEngine) -> None:
    async def main() -> LoopTurns:
        assert engine.loop_turns() is engine.loop_turns()
        async with engine.loop_turns().turn("other"):
            call = asyncio.ensure_future(engine.classify("acme/guard", ["x"] * 40, Principal("acme")))
            await asyncio.sleep(0.1)
            assert not call.done() and engine.waiting() + engine.running() == 0
        await call
        return engine.loop_turns()

    assert asyncio.run(main()) is not asyncio.run(main())
