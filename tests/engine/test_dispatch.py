"""From queue to batch, one event at a time, with adapters that arrive when the test says so."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_residency import Line

from sera_serve.engine.request import Stage
from sera_serve.errors import EngineUnavailable, UnsupportedTask


def test_requests_enter_as_places_come_free() -> None:
    line = Line(places=2)
    a, b, c = (line.submit("a") for _ in range(3))
    assert line.begun == [a, b]
    assert (line.dispatcher.waiting(), line.dispatcher.running()) == (1, 2)
    line.dispatcher.finish(a)
    assert line.begun == [a, b, c]
    for request in (b, c):
        line.dispatcher.finish(request)
    assert line.ended == [(a, True), (b, True), (c, True)]
    assert line.holds_nothing()


def test_a_loading_adapter_holds_nobody_up_and_its_request_keeps_its_turn() -> None:
    line = Line(places=1)
    slow = line.submit("a", "slow")
    assert line.begun == [] and len(line.residency.waiting) == 1
    first, second = line.submit("b"), line.submit("b")
    assert line.begun == [first]
    line.residency.arrive("slow")
    assert line.begun == [first]
    line.dispatcher.finish(first)
    assert line.begun == [first, slow], "its tenant was served less"
    assert line.residency.wishes == 0, "the lease takes the wish's place"
    line.dispatcher.finish(slow)
    line.dispatcher.finish(second)
    assert line.holds_nothing()


def test_who_has_to_wait_has_their_adapter_brought_near() -> None:
    line = Line(places=1)
    running = line.submit("a")
    waiting = line.submit("a", "x")
    assert line.residency.wishes == 1 and not line.residency.waiting
    line.dispatcher.finish(running)
    line.residency.arrive("x")
    assert line.begun == [running, waiting] and line.residency.wishes == 0
    line.dispatcher.finish(waiting)
    assert line.holds_nothing()


def test_an_adapter_that_is_there_is_leased_only_for_who_runs() -> None:
    line = Line(places=1)
    line.residency.arrive("x")
    requests = [line.submit("a", "x") for _ in range(5)]
    assert line.residency.leases == 1
    for request in requests:
        line.dispatcher.finish(request)
    assert line.begun == requests and line.holds_nothing()


def test_those_who_wait_hold_few_leases_and_the_first_in_order_keep_theirs() -> None:
    line = Line(places=1, max_waiting_leases=2)
    late = [line.submit("flood", f"f{i}") for i in range(6)]
    running = line.submit("b")
    for i in reversed(range(6)):
        line.residency.arrive(f"f{i}")
        assert line.residency.leases <= 2
    assert line.residency.wishes == 4, "whose lease was taken back wants the adapter all the same"
    assert {request for request in late if request.lease} == set(late[:2])
    line.dispatcher.finish(running)
    for request in late:
        line.dispatcher.finish(request)
    assert line.begun == [running, *late] and line.holds_nothing()


def test_a_load_that_fails_is_told_to_its_requests_alone() -> None:
    line = Line(places=4)
    lost = [line.submit("a", "broken") for _ in range(3)]
    fine = line.submit("a", "fine")
    line.residency.arrive("broken", OSError("no disk"))
    line.residency.arrive("fine")
    for request in lost:
        with pytest.raises(OSError, match="no disk"):
            request.begun.result(0)
    assert line.begun == [fine]
    line.dispatcher.finish(fine)
    assert line.holds_nothing()


def test_a_request_that_the_batch_refuses_gives_its_place_to_the_next() -> None:
    line = Line(places=1)
    line.residency.arrive("x")
    running = line.submit("a")
    wrong = [line.submit("a", "x", refuse=True) for _ in range(3000)]
    right = line.submit("a", "x")
    line.dispatcher.finish(running)
    for request in wrong:
        with pytest.raises(UnsupportedTask):
            request.begun.result(0)
    assert line.begun == [running, right]
    assert line.ended[-1] == (wrong[-1], False)
    line.dispatcher.finish(right)
    assert line.holds_nothing()


@pytest.mark.parametrize("stage", ["waiting", "loading", "loaded", "running"])
def test_withdrawing_at_each_stage(stage: str) -> None:
    line = Line(places=1)
    other = None if stage == "running" else line.submit("b")
    if stage == "loading":
        # It has to be asked for: when its turn comes, and its adapter is not there.
        line.dispatcher.finish(other)  # type: ignore[arg-type]
        other = None
    if stage in ("waiting", "running"):
        line.residency.arrive("x")
    if stage == "loaded":
        line.dispatcher.finish(other)  # type: ignore[arg-type]
        request = line.submit("a", "x")
        other = line.submit("b")
        line.residency.arrive("x")
        assert request.lease is not None
    else:
        request = line.submit("a", "x")
    assert line.dispatcher.withdraw(request) == (stage != "running")
    assert all(load.cancelled() for _, load in line.residency.waiting), "others may need its place in that line"
    if stage == "running":
        line.dispatcher.finish(request, served=False)
    assert line.dispatcher.withdraw(request), "nothing is left to withdraw"
    line.residency.arrive("x")
    assert line.ended.count((request, False)) == 1
    assert (request in line.begun) == (stage == "running")
    if other is not None:
        line.dispatcher.finish(other)
    assert request.stage is Stage.GONE and line.holds_nothing()


def test_a_request_whose_listener_gave_up_does_not_begin() -> None:
    line = Line(places=1)
    running, left, next_one = line.submit("a"), line.submit("a"), line.submit("a")
    assert left.begun.cancel()
    line.dispatcher.finish(running)
    assert line.begun == [running, next_one]
    assert (left, False) in line.ended
    line.dispatcher.finish(next_one)
    assert line.holds_nothing()


def test_a_withdrawal_lets_the_next_in() -> None:
    line = Line(places=2)
    running = line.submit("a")
    wide = line.submit("b", places=2)
    narrow = line.submit("c")
    assert line.begun == [running], "whose turn it is waits for its room, or it would starve"
    line.dispatcher.withdraw(wide)
    assert line.begun == [running, narrow]


def test_turning_away_takes_the_last_that_waits_never_one_that_runs() -> None:
    line = Line(places=1)
    running = line.submit("a")
    first, urgent, last = line.submit("a"), line.submit("a", priority=1), line.submit("a")
    error = EngineUnavailable("full")
    assert [line.dispatcher.turn_away("a", error) for _ in range(4)] == [last, first, urgent, None]
    assert running.begun.result(0) is None
    for request in (first, urgent, last):
        assert request.begun.exception(0) is error


def test_closing_refuses_all_that_wait_and_all_that_come() -> None:
    line = Line(places=1)
    running, waits = line.submit("a"), line.submit("a", "x")
    line.dispatcher.close()
    with pytest.raises(EngineUnavailable):
        waits.begun.result(0)
    with pytest.raises(EngineUnavailable):
        line.submit("a", "x")
    line.dispatcher.finish(running)
    assert line.holds_nothing()


def test_a_prompt_that_is_computed_makes_way_for_the_next() -> None:
    line = Line(places=8)
    line.room._prefill_tokens = 15
    first, second = line.submit("a"), line.submit("b")
    assert line.begun == [first]
    line.dispatcher.progress(first, 1)
    assert line.begun == [first, second]
    assert line.queue.counter("a") == 10 + 2


def test_threads_that_submit_withdraw_finish_and_load_at_once_lose_nothing() -> None:
    line = Line(places=5, max_waiting_leases=3)
    lock = threading.Lock()
    digests = [f"d{i}" for i in range(6)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine = []
        for _ in range(400):
            mine.append(line.submit(f"t{chance.randrange(5)}", chance.choice([None, *digests])))
            if chance.random() < 0.3:
                line.dispatcher.withdraw(mine.pop(chance.randrange(len(mine))))
            with lock:
                done = [line.begun.pop() for _ in range(min(2, len(line.begun)))]
            for request in done:
                line.dispatcher.finish(request)
            if chance.random() < 0.2:
                digest = chance.choice(digests)
                line.residency.arrive(digest, OSError("lost") if chance.random() < 0.3 else None)
            if chance.random() < 0.2:
                with line.residency.lock:
                    line.residency.here.discard(chance.choice(digests))
            assert line.residency.leases <= 5 + 3 + 6

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for outcome in [pool.submit(work, seed) for seed in range(6)]:
                outcome.result(60)
    finally:
        sys.setswitchinterval(interval)
    for digest in digests:
        line.residency.arrive(digest)
    while line.begun:
        line.dispatcher.finish(line.begun.pop())
    assert line.holds_nothing()
    assert len(line.ended) == 2400
    assert len({request for request, _ in line.ended}) == 2400
