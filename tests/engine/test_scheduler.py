"""From the queue into the batch, one event at a time, with adapters that arrive when the test says so."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sera_serve.engine.request import FinishReason, Request, RequestState
from sera_serve.errors import EngineUnavailable
from support.fake_residency import Bench


def test_requests_enter_as_rows_come_free() -> None:
    bench = Bench(rows=2)
    a, b, c = (bench.submit("a") for _ in range(3))
    assert bench.started == [a, b]
    assert (bench.scheduler.waiting(), bench.scheduler.running()) == (1, 2)
    bench.finish(a)
    assert bench.started == [a, b, c]
    for request in (b, c):
        bench.finish(request)
    assert [r.finish_reason for r in (a, b, c)] == [FinishReason.LENGTH] * 3
    assert bench.holds_nothing()


def test_a_loading_adapter_holds_nobody_up_and_its_request_keeps_its_turn() -> None:
    bench = Bench(rows=1)
    slow = bench.submit("a", "slow")
    assert bench.started == [] and len(bench.residency.waiting) == 1 and slow.state is RequestState.LOADING
    first, second = bench.submit("b"), bench.submit("b")
    assert bench.started == [first]
    bench.residency.arrive("slow")
    assert bench.started == [first] and slow.state is RequestState.WAITING and slow.lease is not None
    bench.finish(first)
    assert bench.started == [first, slow], "its tenant was served less"
    assert bench.residency.hints == 0, "the lease takes the hint's place"
    bench.finish(slow)
    bench.finish(second)
    assert bench.holds_nothing()


def test_the_adapters_of_requests_that_wait_are_brought_near() -> None:
    bench = Bench(rows=1)
    running = bench.submit("a")
    waiting = bench.submit("a", "x")
    assert bench.residency.hints == 1 and not bench.residency.waiting
    bench.finish(running)
    bench.residency.arrive("x")
    assert bench.started == [running, waiting] and bench.residency.hints == 0
    bench.finish(waiting)
    assert bench.holds_nothing()


def test_an_adapter_is_asked_for_in_the_name_of_the_tenant_and_with_what_it_was_served() -> None:
    bench = Bench(rows=1)
    bench.residency.arrive("x")
    running, waiting = bench.submit("a", "x"), bench.submit("b", "y")
    bench.scheduler.charge([running])
    (x, lease), (y, hint) = bench.residency.claims
    assert (x, y) == ("x", "y") and bench.residency.hints == 1
    assert lease is not None and hint is not None
    assert (lease.tenant, hint.tenant) == ("a", "b") and lease.served == hint.served
    assert hint.served("a") - hint.served("b") == 2, "a token"
    bench.residency.arrive("y")
    for request in (running, waiting):
        bench.finish(request)
    assert bench.holds_nothing()


def test_a_request_that_comes_in_mid_step_has_its_adapter_brought_near_at_once() -> None:
    bench = Bench(rows=1)
    bench.scheduler.wake = lambda: None
    bench.scheduler.in_step = True
    waiting = bench.submit("a", "x")
    assert bench.residency.hints == 1 and waiting.state is RequestState.WAITING
    bench.scheduler.in_step = False
    bench.residency.arrive("x")
    bench.step()
    assert bench.started == [waiting]
    bench.scheduler.wake = bench.step
    bench.finish(waiting)
    assert bench.holds_nothing()


def test_an_adapter_that_is_there_is_leased_only_for_requests_that_run() -> None:
    bench = Bench(rows=1)
    bench.residency.arrive("x")
    requests = [bench.submit("a", "x") for _ in range(5)]
    assert bench.residency.leases == 1
    for request in requests:
        bench.finish(request)
    assert bench.started == requests and bench.holds_nothing()


def test_waiting_requests_hold_few_leases_and_the_first_in_order_keep_theirs() -> None:
    bench = Bench(rows=1, max_waiting_leases=2)
    late = [bench.submit("flood", f"f{i}") for i in range(6)]
    running = bench.submit("b")
    for i in reversed(range(6)):
        bench.residency.arrive(f"f{i}")
        assert bench.residency.leases <= 2
        bench.scheduler.check_invariants()
    assert bench.residency.hints == 4, "a request whose lease was taken back still needs its adapter"
    assert {request for request in late if request.lease} == set(late[:2])
    bench.finish(running)
    for request in late:
        bench.finish(request)
    assert bench.started == [running, *late] and bench.holds_nothing()


class Gate:
    """A lock that lets something happen just before it is taken for the first time."""

    def __init__(self, lock: Any, work: Callable[[], None]) -> None:
        self._lock = lock
        self._work: list[Callable[[], None]] = [work]

    def __enter__(self) -> Any:
        while self._work:
            self._work.pop()()
        return self._lock.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._lock.__exit__(*error)


def test_a_request_whose_lease_is_taken_while_it_enters_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(rows=1, max_waiting_leases=1)
    before, entering = bench.submit("a", "before"), bench.submit("a", "entering")
    assert before.state is entering.state is RequestState.LOADING
    running = bench.submit("b")
    bench.residency.arrive("entering")
    assert entering.lease is not None and bench.started == [running]
    scheduler = bench.scheduler
    own = scheduler.start
    gates: list[Request] = []

    def start(request: Request) -> bool:
        if not gates:
            gates.append(request)
            monkeypatch.setattr(scheduler, "_lock", Gate(scheduler._lock, lambda: bench.residency.arrive("before")))
        return own(request)

    monkeypatch.setattr(scheduler, "start", start)
    bench.finish(running)
    assert gates == [entering] and bench.started == [running, entering]
    assert entering.lease is not None
    scheduler.check_invariants()
    bench.finish(entering)
    bench.finish(before)
    assert bench.started == [running, entering, before] and bench.holds_nothing()


def test_a_load_that_fails_is_told_to_its_requests_alone() -> None:
    bench = Bench(rows=4)
    lost = [bench.submit("a", "broken") for _ in range(3)]
    fine = bench.submit("a", "fine")
    bench.residency.arrive("broken", OSError("no disk"))
    bench.residency.arrive("fine")
    for request in lost:
        assert request.finish_reason is FinishReason.FAILED and str(request.error) == "no disk"
    assert bench.started == [fine]
    bench.finish(fine)
    assert bench.holds_nothing()


def test_a_preempted_request_goes_on_at_its_place_and_is_charged_once() -> None:
    bench = Bench(rows=1)
    bench.residency.arrive("x")
    first, second = bench.submit("a", "x"), bench.submit("a")
    charged = bench.scheduler.counter("a")
    bench.scheduler.preempt(first)
    bench.free += 1
    assert first.state is RequestState.PREEMPTED and first.lease is not None and bench.scheduler.waiting() == 2
    bench.step()
    assert bench.started == [first, first], "it came before the second"
    assert bench.scheduler.counter("a") == charged
    bench.finish(first)
    bench.finish(second)
    assert bench.scheduler.preemptions == 1 and bench.holds_nothing()


def test_a_preempted_request_may_lose_its_lease_and_loads_again() -> None:
    bench = Bench(rows=4, max_waiting_leases=1)
    for digest in "xy":
        bench.residency.arrive(digest)
    x, y = bench.submit("a", "x"), bench.submit("a", "y")
    bench.free -= 4
    bench.scheduler.preempt(y)
    bench.scheduler.preempt(x)
    bench.scheduler.check_invariants()
    assert x.lease is not None and y.lease is None and y.hint is not None
    bench.residency.here.clear()
    bench.free += 6
    bench.step()
    assert (x.state, y.state) == (RequestState.RUNNING, RequestState.LOADING)
    bench.residency.arrive("y")
    assert bench.started == [x, y, x, y]
    for request in (x, y):
        bench.finish(request)
    assert bench.holds_nothing()


@pytest.mark.parametrize("stage", ["waiting", "loading", "loaded", "running", "preempted"])
def test_cancelling_at_each_stage(stage: str) -> None:
    bench = Bench(rows=1)
    other: Request | None = None if stage in ("running", "preempted") else bench.submit("b")
    if stage == "loading" and other is not None:
        # Its adapter is asked for when its turn comes.
        bench.finish(other)
        other = None
    if stage in ("waiting", "running", "preempted"):
        bench.residency.arrive("x")
    if stage == "loaded" and other is not None:
        bench.finish(other)
        request = bench.submit("a", "x")
        other = bench.submit("b")
        bench.residency.arrive("x")
        assert request.lease is not None
    else:
        request = bench.submit("a", "x")
    if stage == "preempted":
        bench.scheduler.preempt(request)
    assert bench.scheduler.cancel(request, FinishReason.CANCELLED) == (stage != "running")
    assert all(load.cancelled() for _, load in bench.residency.waiting), "others may need its place in that queue"
    if stage == "running":
        bench.finish(request, FinishReason.CANCELLED)
    if stage == "preempted":
        bench.free += 1
    assert bench.scheduler.cancel(request, FinishReason.EXPIRED), "it is finished already"
    bench.residency.arrive("x")
    assert request.finish_reason is FinishReason.CANCELLED
    assert (request in bench.started) == (stage in ("running", "preempted"))
    if other is not None:
        bench.finish(other)
    assert request.state is RequestState.FINISHED and bench.holds_nothing()


def test_a_cancelled_request_lets_the_next_in() -> None:
    bench = Bench(rows=2)
    running = bench.submit("a")
    wide = bench.submit("b", num_rows=2)
    narrow = bench.submit("c")
    assert bench.started == [running], "the first in the order waits for its rows, or it would starve"
    bench.scheduler.cancel(wide, FinishReason.CANCELLED)
    assert bench.started == [running, narrow]


def test_shedding_takes_the_last_that_waits_never_one_that_runs() -> None:
    bench = Bench(rows=1)
    running = bench.submit("a")
    first, urgent, last = bench.submit("a"), bench.submit("a", priority=1), bench.submit("a")
    error = EngineUnavailable("full")
    assert [bench.scheduler.shed("a", error) for _ in range(4)] == [True, True, True, False]
    assert running.state is RequestState.RUNNING
    for request in (first, urgent, last):
        assert request.finish_reason is FinishReason.SHED and request.error is error
    bench.finish(running)
    assert bench.holds_nothing()


def test_shedding_goes_from_the_last_to_the_first() -> None:
    bench = Bench(rows=1)
    bench.submit("a")
    first, urgent, last = bench.submit("a"), bench.submit("a", priority=1), bench.submit("a")
    for expected in (last, first, urgent):
        assert bench.scheduler.shed("a", EngineUnavailable("full"))
        assert expected.is_finished and sum(r.is_finished for r in (first, urgent, last)) == (
            [last, first, urgent].index(expected) + 1
        )


def test_closing_refuses_all_that_wait_and_all_that_come() -> None:
    bench = Bench(rows=1)
    running, waits = bench.submit("a"), bench.submit("a", "x")
    bench.scheduler.close()
    assert isinstance(waits.error, EngineUnavailable)
    with pytest.raises(EngineUnavailable):
        bench.submit("a", "x")
    bench.finish(running)
    assert bench.holds_nothing()


def test_generated_tokens_are_charged() -> None:
    bench = Bench(rows=8)
    first = bench.submit("a")
    bench.scheduler.charge([first, first])
    assert bench.scheduler.counter("a") == 10 + 2 * 2
    bench.finish(first)


def test_threads_that_submit_cancel_finish_and_load_at_once_lose_nothing() -> None:
    bench = Bench(rows=5, max_waiting_leases=3)
    lock = threading.Lock()
    digests = [f"d{i}" for i in range(6)]
    all_requests: list[Request] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine = []
        for _ in range(400):
            mine.append(bench.submit(f"t{chance.randrange(5)}", chance.choice([None, *digests])))
            with lock:
                all_requests.append(mine[-1])
            if chance.random() < 0.3:
                bench.scheduler.cancel(mine.pop(chance.randrange(len(mine))), FinishReason.CANCELLED)
            with lock:
                done = [bench.started.pop() for _ in range(min(2, len(bench.started)))]
            for request in done:
                bench.finish(request)
            if chance.random() < 0.2:
                digest = chance.choice(digests)
                bench.residency.arrive(digest, OSError("lost") if chance.random() < 0.3 else None)
            if chance.random() < 0.2:
                with bench.residency.lock:
                    bench.residency.here.discard(chance.choice(digests))
            assert bench.residency.leases <= 5 + 3 + 6

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for outcome in [pool.submit(work, seed) for seed in range(6)]:
                outcome.result(60)
    finally:
        sys.setswitchinterval(interval)
    for digest in digests:
        bench.residency.arrive(digest)
    bench.step()
    while bench.started:
        bench.finish(bench.started.pop())
    assert bench.holds_nothing()
    assert len(all_requests) == 2400 and all(request.is_finished for request in all_requests)
