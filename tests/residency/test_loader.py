"""The order of loads, and what a slow one holds up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from slow_store import Build, Store, granted

from sera_serve.errors import EngineUnavailable
from sera_serve.residency import LoaderThreads


class Slow:
    """A job that runs until it is let go."""

    def __init__(self, gate: threading.Event) -> None:
        self.began = threading.Event()
        self._gate = gate

    def __call__(self) -> None:
        self.began.set()
        assert self._gate.wait(30)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def test_jobs_run_by_priority_then_in_order(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=1, stall_s=1000)
    slow = Slow(gate)
    threads.submit(2, slow)
    assert slow.began.wait(10)
    ran: list[int] = []
    last = threading.Event()
    for priority, number in [(2, 3), (1, 1), (0, 0), (1, 2)]:
        threads.submit(priority, lambda number=number: ran.append(number))  # type: ignore[misc]
    threads.submit(3, last.set)
    assert not last.is_set() and ran == []
    gate.set()
    assert last.wait(10)
    assert ran == [0, 1, 2, 3]
    threads.close(10)


def test_no_more_than_a_few_jobs_at_once(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=2, stall_s=1000)
    jobs = [Slow(gate) for _ in range(4)]
    for job in jobs:
        threads.submit(0, job)
    assert jobs[0].began.wait(10) and jobs[1].began.wait(10)
    # A third would begin in no time; that it does not cannot be awaited, only looked at.
    assert not jobs[2].began.wait(0.1)
    gate.set()
    assert jobs[3].began.wait(10)
    threads.close(10)


def test_stalled_jobs_do_not_hold_up_others(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=2, most=8, stall_s=0.01)
    jobs = [Slow(gate) for _ in range(7)]
    for job in jobs:
        threads.submit(0, job)
    for job in jobs:
        assert job.began.wait(10)
    quick = threading.Event()
    threads.submit(0, quick.set)
    assert quick.wait(10)
    gate.set()
    threads.close(10)


def test_job_that_never_ends_does_not_keep_close(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=1)
    slow, never = Slow(gate), threading.Event()
    threads.submit(0, slow)
    threads.submit(0, never.set)
    assert slow.began.wait(10)
    threads.close(0.01)
    threads.submit(0, never.set)
    gate.set()
    threads.close(10)
    assert not never.is_set()


def test_slow_loads_delay_no_others(build: Build, large: list[str], small: list[str], store: Store) -> None:
    residency = build(room=8, threads=LoaderThreads(at_once=2, stall_s=0.01))
    for digest in large:
        store.hold(digest)
    slow = [residency.acquire(digest) for digest in large]
    for digest in small:
        granted(residency.acquire(digest)).release()
    assert not any(future.done() for future in slow)
    store.let_go()
    for future in slow:
        granted(future).release()


def test_closed_residency_refuses_waiting_and_coming_requests(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=1.1)
    held = granted(residency.acquire(large[0]))
    store.hold(large[1])
    waiting = [residency.acquire(large[1]), residency.acquire(large[2])]
    hint = residency.prefetch(large[3])
    assert store.reading[large[1]].wait(10)
    residency.close(timeout_s=0.01)
    for future in (*waiting, residency.acquire(large[0])):
        with pytest.raises(EngineUnavailable, match="shutting down"):
            granted(future)
    with pytest.raises(EngineUnavailable):
        residency.pin(large[0]).result(10)
    held.release()
    hint.release()
    store.let_go()
    residency.close()
    assert residency.resident_digests() == [large[0]]
    assert residency.leases() == 0
