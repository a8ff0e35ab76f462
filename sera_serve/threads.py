"""Threads for work beside the engine's own: each kind of work has few threads, and a bound on what waits for them.

Only the engine's threads compute on all cores. Every thread that computes in parallel has its own OpenMP pool. GNU
OpenMP's threads spin between two parallel regions, unless the threads of all pools outnumber the cores; then they
sleep. A forward pass has dozens of regions a layer. With threads that wake from sleep for each region, a forward pass
took twice as long (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from sera_serve.errors import EngineUnavailable, Overloaded, TenantOverloaded

# Of a thread that rests: what it may work at a stretch, and before it rests at all.
_SLICE_S = 0.002
_BURST_S = 0.1
P = ParamSpec("P")
T = TypeVar("T")


def run_and_forget_pool(work: Callable[[], T]) -> T:
    """Run work that computes before the engine starts, in a thread of its own.

    The thread ends with the work, and so does the thread's OpenMP pool.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Run work on a thread of its own, called `name`, and return the future of its result.

    The thread is a daemon, so that a disk that never answers does not keep the process from ending.
    """
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, work), name=name, daemon=True).start()
    return future


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is told to whoever asks for the result
        future.set_exception(error)
    finally:
        # An error refers to this frame. As a cycle, it would keep what its work used until the next collection.
        del future


class _Pace:
    """How long one thread works and rests: `rest` times as long as it works, by the clock.

    The first `_BURST_S` of work after a long rest are free, so that a page that is asked for alone comes at once. Work
    beyond is done in slices: a thread that worked for a second and then rested for three would hold up every request
    of that second.
    """

    def __init__(self, rest: float, closing: threading.Event) -> None:
        self._rest = rest
        self._closing = closing
        # Seconds of work that no rest has paid for yet, and until when that is counted.
        self._owed = 0.0
        self._at = time.monotonic()

    def begin(self) -> None:
        """Count the time since the last call of this thread as rest."""
        now = time.monotonic()
        self._owed = max(0.0, self._owed - (now - self._at) / self._rest)
        self._at = now

    def pause(self, slice_s: float = 0.0) -> None:
        """Rest for what is owed, if it is more than a burst, and the last rest ended at least `slice_s` ago."""
        now = time.monotonic()
        if now - self._at < slice_s:
            return
        self._owed += now - self._at
        self._at = now
        if self._owed > _BURST_S:
            self._closing.wait((self._owed - _BURST_S) * self._rest)
            self.begin()


class _Own(threading.local):
    """What a thread of an executor has of its own."""

    pace: _Pace | None = None


_own = _Own()


def pause() -> None:
    """Rest for a while where the work under way has lasted for long on a thread that must rest; else do nothing.

    Work that is Python code for many milliseconds calls this between its items.
    """
    if _own.pace is not None:
        _own.pace.pause(_SLICE_S)


class _Call(NamedTuple):
    """Work, the future of its result, and whose turn it is: calls of one turn run one at a time."""

    future: Future[Any]
    work: Callable[[], Any]
    turn: Hashable


class BoundedExecutor:
    """Threads for one kind of blocking work, with a bound on the calls that wait for a thread.

    Each kind of work has an executor of its own, so that no kind can take the threads that another one needs.
    A call whose caller is cancelled while it waits is not begun, and takes no memory.

    concurrent.futures.ThreadPoolExecutor has no bound, keeps cancelled calls until a thread comes to them, and lets
    work that never ends keep the process from ending.

    Locking: `_lock` guards all fields. No future is settled under it.
    """

    def __init__(
        self, name: str, threads: int, max_waiting: int, rest: float = 0, max_waiting_of_owner: int | None = None
    ) -> None:
        """Start no thread yet.

        Args:
            name: What the work is, for messages and thread names, such as "listing".
            threads: Calls that run at once.
            max_waiting: Calls that may wait for a thread; further calls are refused.
            rest: Of its time, a thread works at most 1 / (1 + rest), beyond a first burst. It rests between two calls,
                and in a call that calls `pause`. A thread that runs Python code takes the interpreter's lock from the
                engine's threads.
            max_waiting_of_owner: Calls of one owner that may wait for a thread; by default `max_waiting`.
        """
        self.name = name
        self._rest = rest
        self._closing = threading.Event()
        self._max_threads = threads
        self._max_waiting = max_waiting
        self._max_waiting_of_owner = max_waiting if max_waiting_of_owner is None else max_waiting_of_owner
        self._lock = threading.Lock()
        self._threads = self._busy = 0
        # Calls for idle threads; None ends a thread. At most one entry for each thread.
        self._handed: SimpleQueue[_Call | None] = SimpleQueue()
        # By turn, the one that has waited longest first, and in each in the order of arrival. Dictionaries, because a
        # cancelled call leaves from the middle.
        self._waiting: dict[Hashable, dict[Future[Any], _Call]] = {}
        self._num_waiting = 0
        # Turns of calls that have a thread.
        self._turns: set[Hashable] = set()
        # Calls that have a thread.
        self._running: set[Future[Any]] = set()
        self._closed = False

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on a thread, and return its result.

        A caller that is cancelled leaves at once. Work that has begun goes on alone.

        Raises:
            Overloaded: Too many calls wait already, or no thread can be started.
            EngineUnavailable: The executor is closed.
            Exception: Whatever `work` raised.
        """
        return await asyncio.wrap_future(self.submit(partial(work, *args, **kwargs)))

    async def run_in_turn(self, owner: Hashable, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`run`, but one call of an owner at a time, and the owners take turns: none waits for all calls of another.

        Raises:
            TenantOverloaded: As many calls of the owner wait as may.
            Overloaded, EngineUnavailable, Exception: As `run`.
        """
        return await asyncio.wrap_future(self.submit(partial(work, *args, **kwargs), owner))

    async def run_to_end(self, owner: Hashable, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`run_in_turn`, for work that uses what the caller releases when it leaves, such as a temporary file.

        Work of the owner None waits for no other, as of `run`.

        A caller that is cancelled leaves when the work that has begun is done; work that has not begun never begins.
        Only a second cancellation, with which an event loop ends, or `close` lets the caller leave earlier.
        """
        future = self.submit(partial(work, *args, **kwargs), owner)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                with suppress(Exception):
                    await asyncio.wrap_future(future)
            raise

    def calls(self) -> int:
        """Number of calls that run or wait for a thread."""
        with self._lock:
            return self._num_waiting + self._busy

    def close(self) -> None:
        """Begin no more work, and tell every caller so. Work that runs goes on, and nobody waits for it. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._closing.set()
                for _ in range(self._threads - self._busy):
                    self._handed.put(None)
            callers = [*self._running, *(future for calls in self._waiting.values() for future in calls)]
            self._waiting.clear()
            self._num_waiting = 0
        for future in callers:
            # It may be settled, or its caller gone, since.
            with suppress(InvalidStateError):
                future.set_exception(_closed())

    def submit(self, work: Callable[[], T], owner: Hashable = None) -> Future[T]:
        """Run `work` on a thread, for callers without an event loop; return the future of its result.

        With an owner as `run_in_turn`.

        Raises:
            TenantOverloaded, Overloaded, EngineUnavailable: As `run_in_turn`.
        """
        future: Future[T] = Future()
        # A call without an owner waits for no other.
        call = _Call(future, work, object() if owner is None else owner)
        with self._lock:
            if self._closed:
                raise _closed()
            if self._busy == self._max_threads or call.turn in self._turns:
                if self._num_waiting >= self._max_waiting:
                    raise Overloaded(f"too many requests wait for {self.name}; send the request again later")
                calls = self._waiting.get(call.turn, {})
                if len(calls) >= self._max_waiting_of_owner:
                    raise TenantOverloaded(
                        f"too many requests of this tenant wait for {self.name}; send the request again later"
                    )
                self._waiting.setdefault(call.turn, calls)[future] = call
                self._num_waiting += 1
            else:
                if self._busy == self._threads:
                    self._start_thread_locked()
                self._running.add(future)
                self._turns.add(call.turn)
                self._busy += 1
                self._handed.put(call)
        future.add_done_callback(partial(self._forget, call.turn))
        return future

    def _start_thread_locked(self) -> None:
        """Start a thread before anything of its call is counted: where none can be started, nobody waits for it."""
        try:
            # A daemon: a disk that never answers must not keep the process from ending.
            threading.Thread(target=self._serve, name=self.name, daemon=True).start()
        except RuntimeError as error:
            raise Overloaded(f"no thread can be started for {self.name}; send the request again later") from error
        self._threads += 1

    def _forget(self, turn: Hashable, future: Future[Any]) -> None:
        with self._lock:
            calls = self._waiting.get(turn, {})
            if calls.pop(future, None) is not None:
                self._num_waiting -= 1
                if not calls:
                    del self._waiting[turn]

    def _serve(self) -> None:
        # Not an argument: the thread would keep it to its end.
        call = self._handed.get()
        torch.set_num_threads(1)
        pace = _own.pace = _Pace(self._rest, self._closing) if self._rest else None
        while call is not None:
            turn = call.turn
            if pace is not None:
                pace.begin()
            self._run(call)
            # What the call holds must not outlive the call while this thread is idle.
            del call
            if pace is not None:
                pace.pause()
            call = self._next(turn) or self._handed.get()

    def _run(self, call: _Call) -> None:
        future, work, _ = call
        with self._lock:
            # A cancelled caller is gone, and `close` has told its own.
            begins = not self._closed and future.set_running_or_notify_cancel()
        if begins:
            settle: Callable[[], None]
            try:
                settle = partial(future.set_result, work())
            except BaseException as error:  # noqa: BLE001 - it is told to the caller
                settle = partial(future.set_exception, error)
            with suppress(InvalidStateError):
                settle()
            # An error refers to this frame. As a cycle, it would keep what its call used until the next collection.
            del settle
        with self._lock:
            self._running.discard(future)
        del call, future, work

    def _next(self, done: Hashable) -> _Call | None:
        """The call to run after one of the turn `done`. Without one, this thread is idle from now on, or ends."""
        with self._lock:
            self._turns.discard(done)
            if done in self._waiting:
                # It has had its turn: the others go before it.
                self._waiting[done] = self._waiting.pop(done)
            # At most as many turns are passed over as there are threads.
            turn = next((turn for turn in self._waiting if turn not in self._turns), None)
            if turn is not None:
                calls = self._waiting[turn]
                future = next(iter(calls))
                call = calls.pop(future)
                self._num_waiting -= 1
                if not calls:
                    del self._waiting[turn]
                self._running.add(future)
                self._turns.add(turn)
                return call
            self._busy -= 1
            if self._closed:
                self._handed.put(None)
            return None


class SharedCall(Generic[T]):
    """Blocking work, on a thread of its own, whose result everyone shares who asks while it runs.

    64 scrapes of 400 KB at once, each rendered on a thread, kept the event loop for 2 seconds: the threads passed the
    interpreter's lock around among themselves.
    """

    def __init__(self, name: str, work: Callable[[], T], rest: float = 0) -> None:
        """Start no thread yet. The arguments are those of `BoundedExecutor`."""
        self._work = work
        # The thread may not have come back from the last call when the next one begins.
        self._thread = BoundedExecutor(name, 1, 1, rest)
        self._call: asyncio.Task[T] | None = None

    async def result(self) -> T:
        """The result of the call under way, or of a new one; raises what the work raises."""
        if self._call is None or self._call.done():
            self._call = asyncio.create_task(self._thread.run(self._work))
            # A call that fails after all have given up is nobody's error.
            self._call.add_done_callback(lambda call: call.cancelled() or call.exception())
        # Who gives up leaves the call to the others.
        return await asyncio.shield(self._call)

    def close(self) -> None:
        """Begin no more calls, and end the thread; see `BoundedExecutor.close`."""
        self._thread.close()


def _closed() -> EngineUnavailable:
    return EngineUnavailable("the server is stopping; send the request again when it is back")
