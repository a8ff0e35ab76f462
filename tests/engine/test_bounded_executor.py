"""Executors with few threads and a bound: who runs, who waits, who is refused, and what a caller that leaves frees."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest

from sera_serve import threads
from sera_serve.errors import EngineUnavailable, Overloaded, TenantOverloaded
from sera_serve.threads import BoundedExecutor, SharedCall, _Pace, pause
from support.engine import until
from support.no_collection import no_collection

MAX_WAITING = 3


@pytest.fixture
def executor() -> Iterator[BoundedExecutor]:
    executor = BoundedExecutor("listing", threads=2, max_waiting=MAX_WAITING)
    yield executor
    executor.close()


class Gate:
    """Work that waits for the test, and notes what was begun, in the order in which its threads got to say so."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun: list[int] = []

    def pass_through(self, number: int) -> int:
        self.begun.append(number)
        assert self.opened.wait(20)
        return number


async def _tasks(executor: BoundedExecutor, gate: Gate, count: int) -> list[asyncio.Task[int]]:
    """Begin `count` calls, one after another."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.ensure_future(executor.run(gate.pass_through, number)))
        await until(lambda: executor.calls() == len(tasks))
    return tasks


def test_so_many_run_so_many_wait_and_the_next_is_refused(executor: BoundedExecutor) -> None:
    async def main() -> None:
        gate = Gate()
        tasks = await _tasks(executor, gate, 5)
        await until(lambda: len(gate.begun) == 2)
        with pytest.raises(Overloaded, match="listing") as refusal:
            await executor.run(gate.pass_through, 9)
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1)
        gate.opened.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
        assert sorted(gate.begun) == [0, 1, 2, 3, 4]
        await until(lambda: executor.calls() == 0)
        assert await executor.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await executor.run(divmod, 7, 0)

    asyncio.run(main())


def test_a_cancelled_call_is_not_begun_and_keeps_nothing(executor: BoundedExecutor) -> None:
    async def main() -> None:
        gate = Gate()
        tasks = await _tasks(executor, gate, 5)
        payload = Gate()
        held = weakref.ref(payload)
        for task in tasks[2:]:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await _ends(tasks[2:]))
        assert executor.calls() == 2
        # The threads are still busy, and others may wait in its place.
        for _ in range(20):
            task = asyncio.ensure_future(executor.run(payload.pass_through, 7))
            await until(lambda: executor.calls() == 3)
            task.cancel()
            await _ends([task])
        del task, payload
        await asyncio.sleep(0)
        gc.collect()
        assert held() is None
        gate.opened.set()
        await asyncio.gather(*tasks[:2])
        assert sorted(gate.begun) == [0, 1]

    asyncio.run(main())


def test_only_work_that_has_begun_keeps_a_cancelled_caller(executor: BoundedExecutor) -> None:
    async def main() -> None:
        gate = Gate()
        begun = [asyncio.ensure_future(executor.run_to_end(None, gate.pass_through, number)) for number in range(2)]
        await until(lambda: len(gate.begun) == 2)
        waiting = asyncio.ensure_future(executor.run_to_end(None, gate.pass_through, 2))
        await until(lambda: executor.calls() == 3)
        for task in (*begun, waiting):
            task.cancel()
        assert isinstance((await _ends([waiting]))[0], asyncio.CancelledError)
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in begun)
        # An event loop that ends cancels again.
        begun[0].cancel()
        await _ends(begun[:1])
        assert not begun[1].done()
        gate.opened.set()
        assert isinstance((await _ends(begun[1:]))[0], asyncio.CancelledError)
        assert sorted(gate.begun) == [0, 1]

    asyncio.run(main())


def test_closing_tells_those_who_wait_and_those_whose_work_runs(executor: BoundedExecutor) -> None:
    async def main() -> None:
        gate = Gate()
        tasks = await _tasks(executor, gate, 4)
        await until(lambda: len(gate.begun) == 2)
        executor.close()
        executor.close()
        assert [type(end) for end in await _ends(tasks)] == [EngineUnavailable] * 4
        with pytest.raises(EngineUnavailable):
            await executor.run(gate.pass_through, 9)
        gate.opened.set()
        await until(lambda: executor.calls() == 0)
        assert sorted(gate.begun) == [0, 1]

    asyncio.run(main())


def test_a_closed_executor_ends_its_threads() -> None:
    executor = BoundedExecutor("ending", threads=2, max_waiting=0)

    async def main() -> None:
        gate = Gate()
        tasks = await _tasks(executor, gate, 2)
        gate.opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    threads = [thread for thread in threading.enumerate() if thread.name == "ending"]
    assert len(threads) == 2 and all(thread.daemon for thread in threads)
    executor.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_thread_that_cannot_be_started_costs_neither_a_thread_nor_a_turn(
    executor: BoundedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            for _ in range(3):
                with pytest.raises(Overloaded, match="no thread can be started for listing"):
                    await asyncio.wait_for(executor.run_in_turn("a", divmod, 7, 2), 5)
        assert executor.calls() == 0
        gate = Gate()
        calls = [asyncio.ensure_future(executor.run_in_turn(owner, gate.pass_through, 1)) for owner in "ab"]
        await until(lambda: gate.begun == [1, 1])
        gate.opened.set()
        assert await asyncio.gather(*calls) == [1, 1]

    asyncio.run(main())


@pytest.mark.parametrize("to_end", [False, True])
def test_owners_take_turns_and_each_runs_one_call_at_a_time(executor: BoundedExecutor, to_end: bool) -> None:
    async def main() -> None:
        opened, order = threading.Event(), list[str]()

        def work(owner: str) -> None:
            order.append(owner)
            assert opened.wait(20)

        tasks = []
        for owner in ("a", "a", "a", "b", "c"):
            run = executor.run_to_end if to_end else executor.run_in_turn
            tasks.append(asyncio.ensure_future(run(owner, work, owner)))
            await until(lambda: executor.calls() == len(tasks))
        # A second thread is free until "b" comes.
        await until(lambda: order == ["a", "b"])
        with pytest.raises(Overloaded):
            await executor.run_in_turn("d", work, "d")
        opened.set()
        await asyncio.gather(*tasks)
        # The third of "a" comes after all others that wait.
        assert sorted(order[2:4]) == ["a", "c"] and order[4] == "a"
        await until(lambda: executor.calls() == 0)
        assert not executor._turns and not executor._waiting and not executor._num_waiting
        cancelled = [asyncio.ensure_future(executor.run_in_turn("a", time.sleep, 0.05)) for _ in range(3)]
        await until(lambda: executor.calls() == 3)
        cancelled[1].cancel()
        assert [type(end) for end in await _ends(cancelled)] == [type(None), asyncio.CancelledError, type(None)]
        assert not executor._waiting and not executor._num_waiting

    asyncio.run(main())


def test_an_owner_waits_in_its_share_of_the_places_alone() -> None:
    executor = BoundedExecutor("listing", threads=1, max_waiting=4, max_waiting_of_owner=2)

    async def main() -> None:
        gate, tasks = Gate(), []
        for number in range(3):
            tasks.append(asyncio.ensure_future(executor.run_in_turn("a", gate.pass_through, number)))
            await until(lambda: executor.calls() == len(tasks))
        with pytest.raises(TenantOverloaded, match="listing") as refusal:
            await executor.run_in_turn("a", gate.pass_through, 9)
        assert refusal.value.status == 429
        tasks.append(asyncio.ensure_future(executor.run_in_turn("b", gate.pass_through, 3)))
        await until(lambda: executor.calls() == 4)
        gate.opened.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
        assert gate.begun == [0, 3, 1, 2]

    asyncio.run(main())
    executor.close()


async def _ends(tasks: list[asyncio.Task[int]]) -> list[int | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_thread_rests_after_a_call_in_proportion_to_its_work() -> None:
    executor = BoundedExecutor("listing", threads=1, max_waiting=2, rest=3)

    async def main() -> None:
        begun: list[float] = []

        def work() -> None:
            begun.append(time.monotonic())
            time.sleep(0.1)

        await asyncio.gather(executor.run(work), executor.run(work), executor.run(work))
        # 0.1 s of work are free; then 0.1 s more, and three times that of rest.
        assert begun[2] - begun[0] >= 0.5
        started = time.monotonic()
        executor.close()
        await until(lambda: executor.calls() == 0)
        assert time.monotonic() - started < 0.3

    asyncio.run(main())


class Clock:
    """Time that passes only where the test says so, in place of an event's wait too."""

    def __init__(self) -> None:
        self.now, self.rests = 1000.0, [0.0]

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.rests.append(seconds)
        return False


def test_long_work_on_a_thread_that_rests_is_done_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others find the interpreter's lock free for three quarters of the time, and never taken for long."""
    clock = Clock()
    monkeypatch.setattr(threads, "time", clock)
    pace = _Pace(3, clock)  # type: ignore[arg-type]

    def work(seconds: float) -> list[float]:
        """Items of half a millisecond, with a pause before each; returns the rests."""
        clock.rests.clear()
        pace.begin()
        for _ in range(round(seconds / 0.0005)):
            pace.pause(0.002)
            clock.now += 0.0005
        pace.pause()
        return clock.rests

    assert work(0.09) == []
    assert sum(work(0.5)) == pytest.approx(3 * 0.49)
    assert max(clock.rests) < 3 * 0.003 and len(clock.rests) > 100
    # All work has its rest from now on; and a long rest allows a burst again.
    assert sum(work(0.05)) == pytest.approx(3 * 0.05)
    clock.now += 0.3
    assert work(0.09) == []
    assert sum(work(0.05)) == pytest.approx(3 * 0.04)


def test_work_pauses_on_threads_that_rest_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[str] = []
    monkeypatch.setattr(_Pace, "pause", lambda self, slice_s=0.0: paused.append(threading.current_thread().name))

    async def main() -> None:
        for name, rest in (("listing", 3), ("changing", 0)):
            executor = BoundedExecutor(name, threads=1, max_waiting=1, rest=rest)
            await executor.run(pause)
            executor.close()

    asyncio.run(main())
    pause()
    # In the work, and after it.
    assert set(paused) == {"listing"} and len(paused) in (1, 2)


class Used:
    """What a call uses."""


def test_what_a_failed_call_used_is_gone_with_its_error(executor: BoundedExecutor) -> None:
    def fail(used: Used) -> None:
        raise ValueError("as it should")

    async def main() -> None:
        references = []
        for _ in range(3):
            used = Used()
            references.append(weakref.ref(used))
            # pytest.raises would keep the error.
            with suppress(ValueError):
                await executor.run(fail, used)
            del used
        # The last thread may be about to let go of it.
        await until(lambda: not any(reference() for reference in references))

    with no_collection():
        asyncio.run(main())


def test_all_who_ask_meanwhile_share_a_call() -> None:
    async def main() -> None:
        gate, calls = Gate(), itertools.count()
        shared = SharedCall("metrics", lambda: gate.pass_through(next(calls)))
        asked = [asyncio.ensure_future(shared.result()) for _ in range(4)]
        await until(lambda: gate.begun == [0])
        asked[0].cancel()
        asked.append(asyncio.ensure_future(shared.result()))
        await asyncio.sleep(0.01)
        assert gate.begun == [0] and asked[0].cancelled()
        gate.opened.set()
        assert await asyncio.gather(*asked[1:]) == [0] * 4
        # A call may begin before the thread has come back from the last one.
        assert [await shared.result() for _ in range(200)] == list(range(1, 201))

    asyncio.run(main())


def test_a_shared_call_that_fails_is_told_to_all_and_made_anew() -> None:
    async def main() -> None:
        calls = itertools.count()
        shared = SharedCall("metrics", lambda: 1 // next(calls))
        asked = await asyncio.gather(shared.result(), shared.result(), return_exceptions=True)
        assert [type(answer) for answer in asked] == [ZeroDivisionError] * 2
        assert await shared.result() == 1

    asyncio.run(main())
