"""Notices when the event loop stands still. Until it goes on, no request is read and no response is sent."""

# asyncio's own debug mode measures callbacks too, but it slows every one of them down, and uvloop names no request.

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import Scope

T = TypeVar("T")
logger = logging.getLogger("sera_serve.server")

PAUSE_S = 0.1
_BEAT_S = 0.05
_LOG_EVERY_S = 1.0
_BUCKETS = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class LoopWatch:
    """Counts and logs each callback of the event loop that took longer than `PAUSE_S`, with its route.

    A request's task is measured step by step, from one `await` that gives control back to the next. A pause that no
    measured step explains has the route "other": another callback, or a thread that held the interpreter's lock.
    All methods are for the thread of the event loop.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.perf_counter) -> None:
        """Register the metric. `clock` returns seconds."""
        self._clock = clock
        self._pauses = Histogram(
            "sera_loop_pause_seconds",
            f"Seconds that the event loop stood still, pauses over {PAUSE_S:g} s, by the route that caused them.",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._explained_s = 0.0
        self._logged_at = -_LOG_EVERY_S
        self._unlogged = 0

    def step(self, route: str) -> Step:
        """Return a context manager that measures its body, which must not await."""
        return Step(self, lambda: route)

    async def request(self, scope: Scope, work: Coroutine[Any, Any, T]) -> T:
        """Await the work of a request, and measure each of its steps under the route that the request matched."""
        steps = Step(self, lambda: route_of(scope))
        token = _request_steps.set(steps)
        try:
            return await _Measured(work, steps)
        finally:
            _request_steps.reset(token)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Notice pauses that no measured step explains, until the context ends."""
        beat = asyncio.ensure_future(self._beat())
        try:
            yield
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            explained, asleep_at = self._explained_s, self._clock()
            await asyncio.sleep(_BEAT_S)
            late = self._clock() - asleep_at - _BEAT_S - (self._explained_s - explained)
            if late > PAUSE_S:
                self._record(late, "other")

    def _record(self, seconds: float, route: str) -> None:
        self._pauses.labels(route).observe(seconds)
        self._explained_s += seconds
        now = self._clock()
        if now - self._logged_at < _LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more pauses since the last such line)" if self._unlogged else ""
        logger.warning("the event loop stood still for %.2f s; route %s%s", seconds, route, more)
        self._logged_at, self._unlogged = now, 0


class Step:
    """Measures one callback at a time, as a context manager that may be entered again."""

    __slots__ = ("_began", "_route", "_watch")

    def __init__(self, watch: LoopWatch, route: Callable[[], str]) -> None:
        """Measure for `watch`. `route` is called after a pause."""
        self._watch = watch
        self._route = route
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = self._watch._clock()

    def __exit__(self, *_: object) -> None:
        seconds = self._watch._clock() - self._began
        if seconds > PAUSE_S:
            self._watch._record(seconds, self._route())


# A request's child tasks inherit it, so that functions between the two need not hand it on.
_request_steps: ContextVar[Step | None] = ContextVar("request_steps", default=None)


def measured_with_request(work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return `work` for a child task of a request, such that its steps are measured under the request's route."""
    parent = _request_steps.get()
    # Parent and child take turns, but each measures its own steps.
    return work if parent is None else _Measured(work, Step(parent._watch, parent._route))


def route_of(scope: Scope) -> str:
    """Return the template of the route that a request matched, such as "/v1/adapters/{tenant}/{name}"."""
    path: str = getattr(scope.get("route"), "path", "unmatched")
    return path


class _Measured(Generator[Any, Any, T], Coroutine[Any, Any, T]):
    """A coroutine that measures each step of `work`."""

    __slots__ = ("_step", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], step: Step) -> None:
        self._work = work
        self._step = step

    def send(self, value: Any) -> Any:
        with self._step:
            return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        try:
            with self._step:
                return self._work.throw(*error)
        finally:
            # The error refers to this frame. As a cycle, it would keep what the work used until the next collection.
            del error

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self
