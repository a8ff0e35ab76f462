"""The loop watch names the route of each long callback, and sees pauses that no request explains."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry
from uvloop import new_event_loop

from sera_serve.config import ServeSettings
from sera_serve.loop_turns import LoopTurns
from sera_serve.server.disconnect import cancel_on_disconnect
from sera_serve.server.loop_watch import LoopWatch, measured_with_request
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.middleware import RequestLifecycle
from sera_serve.server.request_log import RequestLog
from support.stub_engine import StubEngine


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def watch(registry: CollectorRegistry, clock: Clock) -> LoopWatch:
    return LoopWatch(registry, clock)


@pytest.fixture(params=[asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(work)

    return run


def pauses(registry: CollectorRegistry, route: str) -> tuple[float, float]:
    """Number of pauses of a route, and their seconds."""
    count, total = (
        registry.get_sample_value(f"sera_loop_pause_seconds_{kind}", {"route": route}) for kind in ("count", "sum")
    )
    return count or 0, total or 0


def test_a_request_is_measured_step_by_step(
    run: Callable[..., Any], registry: CollectorRegistry, clock: Clock, watch: LoopWatch
) -> None:
    async def child() -> int:
        clock.now += 0.7
        await asyncio.sleep(0)
        return 5

    async def work() -> int:
        # Many short steps, with a long time in all, are no pause.
        for _ in range(100):
            clock.now += 0.09
            await asyncio.sleep(0)
            clock.now += 0.009
        clock.now += 2
        return await asyncio.ensure_future(measured_with_request(child()))

    assert run(watch.request({}, work())) == 5
    assert pauses(registry, "unmatched") == (2, pytest.approx(2.709))


def test_exceptions_and_cancellation_pass_through(
    run: Callable[..., Any], registry: CollectorRegistry, clock: Clock, watch: LoopWatch
) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        clock.now += 1
        raise KeyError("as it is")

    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            clock.now += 1
            raise

    async def cancels_its_child() -> None:
        # A child that is cancelled before its first step is closed, so Python does not warn of it.
        task = asyncio.ensure_future(measured_with_request(hangs()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def main() -> None:
        with pytest.raises(KeyError, match="as it is"):
            await watch.request({}, fails())
        task = asyncio.ensure_future(watch.request({}, hangs()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await watch.request({}, cancels_its_child())

    run(main())
    assert pauses(registry, "unmatched") == (2, pytest.approx(2))


def test_a_callback_is_measured_under_its_own_name(registry: CollectorRegistry, clock: Clock, watch: LoopWatch) -> None:
    for seconds in (0.1, 0.2):
        with watch.step("parsing"):
            clock.now += seconds
    assert pauses(registry, "parsing") == (1, pytest.approx(0.2))


def test_a_pause_that_nothing_explains_is_of_another_cause(
    run: Callable[..., Any], registry: CollectorRegistry, clock: Clock, watch: LoopWatch
) -> None:
    async def main() -> None:
        async with watch.running():
            await asyncio.sleep(0)
            with watch.step("parsing"):
                clock.now += 3
            await asyncio.sleep(0.1)
            assert pauses(registry, "other") == (0, 0)
            # The heart beats in real time, and finds a clock that went on.
            clock.now += 2
            await asyncio.sleep(0.1)
            assert pauses(registry, "other") == (1, pytest.approx(1.95))
        clock.now += 9
        await asyncio.sleep(0.1)

    run(main())
    assert pauses(registry, "other")[0] == 1
    assert pauses(registry, "parsing")[0] == 1


def test_one_line_a_second_is_logged(clock: Clock, watch: LoopWatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sera_serve.server"):
        for _ in range(4):
            with watch.step("/v1/generate"):
                clock.now += 0.3
        with watch.step("/v1/generate"):
            clock.now += 0.9
    assert [record.getMessage() for record in caplog.records] == [
        "the event loop stood still for 0.30 s; route /v1/generate",
        "the event loop stood still for 0.90 s; route /v1/generate (3 more pauses since the last such line)",
    ]


def test_a_route_and_its_child_tasks_are_named(clock: Clock) -> None:
    metrics = ServerMetrics(StubEngine(None))  # type: ignore[arg-type]
    app = FastAPI()
    watch, log, turns = LoopWatch(metrics.registry, clock), RequestLog(ServeSettings()), LoopTurns()
    app.add_middleware(RequestLifecycle, metrics=metrics, watch=watch, log=log, turns=lambda: turns)

    @app.get("/slow/{name}")
    async def slow(name: str, request: Request) -> float:
        clock.now += 0.5

        async def work() -> float:
            clock.now += 0.6
            await asyncio.sleep(0)
            return request.state.received_at

        return await cancel_on_disconnect(request.receive, work())

    async def main() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:
            assert (await client.get("/slow/one")).json() > 0
            assert (await client.get("/nothing")).status_code == 404

    asyncio.run(main())
    assert pauses(metrics.registry, "/slow/{name}") == (2, pytest.approx(1.1))
    assert pauses(metrics.registry, "unmatched") == (0, 0)


class Used:
    """What a request uses."""


def test_what_cancelled_work_used_is_gone_with_it(run: Callable[..., Any], watch: LoopWatch) -> None:
    async def work(used: Used) -> None:
        await asyncio.sleep(60)

    async def main() -> weakref.ref[Used]:
        used = Used()
        task = asyncio.ensure_future(watch.request({}, work(used)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return weakref.ref(used)

    gc.disable()
    try:
        assert run(main())() is None
    finally:
        gc.enable()
