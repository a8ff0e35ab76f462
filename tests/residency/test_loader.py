"""The order of loads, and what a slow one holds up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager

import pytest
from slow_store import Build, Store, granted, until, wait_for_loads

from adapters_store import AdapterBundle
from sera_serve.errors import EngineUnavailable
from sera_serve.residency import Claim, LoaderThreads, LoadSize


class Slow:
    """A job that runs until it is let go."""

    def __init__(self, gate: threading.Event) -> None:
        self.began = threading.Event()
        self._gate = gate

    def __call__(self) -> None:
        self.began.set()
        assert self._gate.wait(30)


def no_thread(thread: threading.Thread) -> None:
    """What `Thread.start` does where the system has no thread left."""
    raise RuntimeError("can't start new thread")


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


def test_owners_take_turns_within_a_priority(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=1, stall_s=1000)
    slow = Slow(gate)
    threads.submit(0, slow, "a")
    assert slow.began.wait(10)
    ran: list[str] = []
    last = threading.Event()
    for priority, owner, name in [(1, "a", "a1"), (1, "a", "a2"), (1, "a", "a3"), (1, "b", "b1"), (0, "a", "a0")]:
        threads.submit(priority, lambda name=name: ran.append(name), owner)  # type: ignore[misc]
    threads.submit(2, last.set)
    gate.set()
    assert last.wait(10)
    assert ran == ["a0", "a1", "b1", "a2", "a3"]
    threads.close(10)


def test_large_jobs_run_side_by_side_only_as_memory_allows() -> None:
    threads = LoaderThreads(at_once=5, most=10, stall_s=0.0, max_bytes=100)
    gates = [threading.Event() for _ in range(4)]
    whole, half, huge, other = jobs = [Slow(gate) for gate in gates]
    threads.submit(0, whole, "a", 60)
    assert whole.began.wait(10)
    # The second does not fit, and the last would: it must not keep the ones before it from running for ever.
    for owner, job, nbytes in (("a", half, 50), ("b", huge, 150), ("c", other, 40)):
        threads.submit(0, job, owner, nbytes)
    small = threading.Event()
    threads.submit(0, small.set, "a", threads.small_bytes)
    assert small.wait(10), "large jobs that wait for memory hold up a small one"
    for place, gate in enumerate(gates):
        assert [job.began.is_set() for job in jobs] == [True] * (place + 1) + [False] * (3 - place)
        gate.set()
        if place < 3:
            assert jobs[place + 1].began.wait(10)
    threads.close(10)


def test_a_withdrawn_large_job_holds_up_no_others(gate: threading.Event) -> None:
    threads = LoaderThreads(at_once=3, most=10, stall_s=1000, max_bytes=100)
    whole, never, other = Slow(gate), Slow(gate), threading.Event()
    running = threads.submit(0, whole, "a", 60)
    assert whole.began.wait(10)
    waiting = threads.submit(0, never, "b", 90)
    threads.submit(0, other.set, "c", 40)
    threads.withdraw(running)
    assert not other.wait(0.05)
    threads.withdraw(waiting)
    threads.withdraw(waiting)
    assert other.wait(10)
    gate.set()
    threads.close(10)
    assert not never.began.is_set()


def test_jobs_run_once_a_thread_can_be_started_again(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = LoaderThreads(at_once=2, stall_s=1000)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        first = threading.Event()
        threads.submit(0, first.set)
    slow = Slow(gate)
    threads.submit(0, slow)
    assert first.wait(10) and slow.began.wait(10)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        # The thread that begins with the second one is to start a thread for the third one.
        second, third = Slow(gate), Slow(gate)
        threads.submit(0, second)
        threads.submit(0, third)
        assert second.began.wait(10)
    gate.set()
    assert third.began.wait(10)
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


def tenant(name: str) -> Claim:
    return Claim(name, lambda tenant: 0.0)


def test_loads_take_turns_by_tenant(build: Build, large: list[str], small: list[str], store: Store) -> None:
    residency = build(room=8, threads=LoaderThreads(at_once=1, stall_s=1000))
    store.hold(large[0])
    futures = [residency.acquire(digest, tenant("a")) for digest in large]
    assert store.reading[large[0]].wait(10)
    hints = [residency.prefetch(digest, tenant("c")) for digest in small[1:]]
    futures.append(residency.acquire(small[0], tenant("b")))
    store.let_go()
    for future in futures:
        granted(future).release()
    wait_for_loads(residency)
    assert store.asked == [large[0], large[1], small[0], *large[2:], *small[1:]]
    for hint in hints:
        hint.release()


def test_an_adapter_of_two_tenants_is_read_in_the_first_turn_of_both(
    build: Build, large: list[str], store: Store
) -> None:
    residency = build(room=8, threads=LoaderThreads(at_once=1, stall_s=1000))
    store.hold(large[0])
    futures = [residency.acquire(digest, tenant("a")) for digest in large]
    assert store.reading[large[0]].wait(10)
    futures += [residency.acquire(large[3], tenant("b")) for _ in range(3)]
    store.let_go()
    for future in futures:
        granted(future).release()
    wait_for_loads(residency)
    assert store.asked == [large[0], large[1], large[3], large[2]]


def test_large_loads_are_read_one_at_a_time_however_long_one_takes(
    build: Build, large: list[str], small: list[str], store: Store
) -> None:
    threads = LoaderThreads(at_once=4, stall_s=0.0, max_bytes=1000)
    residency = build(room=8, threads=threads, size_of=lambda digest: LoadSize.of_file(600 if digest in large else 0))
    for digest in large:
        store.hold(digest)
    slow = {digest: residency.acquire(digest) for digest in large}
    for digest in small:
        granted(residency.acquire(digest)).release()
    for ended in range(4):
        until(lambda ended=ended: len(set(store.asked) & set(large)) > ended)  # type: ignore[misc]
        digest = next(digest for digest in reversed(store.asked) if digest in large)
        assert [other for other in store.asked if other in slow] == [digest]
        store.gates[digest].set()
        granted(slow.pop(digest)).release()
    assert len(store.asked) == 8


@pytest.mark.parametrize("first", ["the request of another tenant", "its hint"])
def test_a_large_load_that_is_asked_for_twice_takes_its_memory(
    build: Build, large: list[str], store: Store, gate: threading.Event, first: str
) -> None:
    looked_up = threading.Event()

    def size_of(digest: str) -> LoadSize:
        looked_up.set()
        assert gate.wait(30)
        return LoadSize.of_file(600)

    threads = LoaderThreads(at_once=1, stall_s=1000, max_bytes=1000)
    residency = build(room=8, threads=threads, size_of=size_of)
    futures, hints = [], []
    # All are submitted before the size of any is known.
    for digest in large:
        if first == "its hint":
            hints.append(residency.prefetch(digest, tenant("b")))
        else:
            futures.append(residency.acquire(digest, tenant("b")))
        assert looked_up.wait(10)
        futures.append(residency.acquire(digest, tenant("a")))
    taken = []
    loading = store.loading

    def counted(digest: str) -> AbstractContextManager[AdapterBundle]:
        taken.append((digest in large, threads._large_bytes))
        return loading(digest)

    residency._loader._loading = counted
    gate.set()
    for future in futures:
        granted(future).release()
    assert taken == [(True, 1800)] * 4
    for hint in hints:
        hint.release()


def test_the_other_jobs_for_an_adapter_end_when_one_begins_to_read(
    build: Build, large: list[str], small: list[str], store: Store
) -> None:
    threads = LoaderThreads(at_once=4, stall_s=1000, max_bytes=1100)
    # With the packed adapter they take three times as much. 960 and 120 bytes fit side by side.
    residency = build(room=8, threads=threads, size_of=lambda digest: LoadSize.of_file(320 if digest in large else 40))
    store.hold(large[0])
    store.hold(large[1])
    futures = [residency.acquire(large[0], tenant("a"))]
    assert store.reading[large[0]].wait(10)
    futures += [residency.acquire(large[1], tenant(name)) for name in "ab"]
    until(lambda: sum(map(len, threads._jobs.values())) == 2)
    store.gates[large[0]].set()
    assert store.reading[large[1]].wait(10)
    # The job of the second tenant would still wait for 960 bytes, and this one behind it.
    other = residency.acquire(small[0], tenant("c"))
    granted(other).release()
    assert sum(map(len, threads._jobs.values())) == 0
    store.let_go()
    for future in futures:
        granted(future).release()


@pytest.mark.parametrize("wanted_by", ["a request", "a hint", "a request and a hint"])
def test_a_large_load_that_nobody_wants_any_more_holds_up_no_other(
    build: Build, large: list[str], store: Store, wanted_by: str
) -> None:
    threads = LoaderThreads(at_once=4, stall_s=1000, max_bytes=1000)
    # With the packed adapter they take three times as much. The second does not fit beside the first, the third does.
    sizes = dict(zip(large, (200, 300, 100, 0), strict=True))
    residency = build(room=8, threads=threads, size_of=lambda digest: LoadSize.of_file(sizes[digest]))
    store.hold(large[0])
    first = residency.acquire(large[0])
    assert store.reading[large[0]].wait(10)
    request = residency.acquire(large[1]) if "request" in wanted_by else None
    hint = residency.prefetch(large[1]) if "hint" in wanted_by else None
    until(lambda: [job.nbytes for jobs in threads._jobs.values() for job in jobs] == [900])
    third = residency.acquire(large[2]) if request is not None else residency.prefetch(large[2])
    until(lambda: sum(map(len, threads._jobs.values())) == 2)
    assert large[2] not in store.asked
    if request is not None:
        request.cancel()
    if hint is not None:
        residency.check_invariants()
        hint.release()
    until(lambda: large[2] in store.asked)
    residency.check_invariants()
    assert (sum(map(len, threads._jobs.values())), large[1] in residency.digests()) == (0, False)
    store.let_go()
    for wanted in (first, third):
        granted(wanted).release() if isinstance(wanted, Future) else wanted.release()
    # It is loaded for who asks again.
    granted(residency.acquire(large[1])).release()


def test_a_load_whose_size_cannot_be_told_fails_as_one_that_cannot_be_read(build: Build, large: list[str]) -> None:
    def size_of(digest: str) -> LoadSize:
        raise OSError("disk on fire")

    residency = build(room=8, size_of=size_of)
    with pytest.raises(OSError, match="disk on fire"):
        granted(residency.acquire(large[0]))


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
    late = residency.prefetch(large[2])
    assert residency.stats().loading == 0, "no thread would ever read it"
    late.release()
    assert residency.resident_digests() == [large[0]]
    assert residency.leases() == 0
