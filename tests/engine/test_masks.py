"""The threads of masks: turns of tenants, steps that do not wait, and what is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sera_serve.engine.loop import masks
from sera_serve.engine.loop.masks import MaskThreads
from sera_serve.errors import EngineUnavailable, InvalidRequest

VOCABULARY = 40
# In place of a row: the request has no constraint, or no more.
FREE = -2


@dataclass(eq=False)
class Row:
    """What masks read of a request; it is its own constraint.

    Attributes:
        opened: Its masks are not ready before.
        begun: Whether a thread computes one, or has.
        threads: How many threads are in it.
    """

    tenant: str
    order: int
    opened: threading.Event | None = None
    error: Exception | None = None
    row: int = 0
    id: str = "generate-1"
    bars_end: bool = False
    generated: int = 3
    begun: threading.Event = field(default_factory=threading.Event)
    threads: int = 0
    masks: int = 0

    @property
    def constraint(self) -> Row | None:
        return None if self.row == FREE else self

    def fill(self, allowed: Any) -> None:
        self.threads += 1
        assert self.threads == 1, "two threads in one constraint"
        self.begun.set()
        if self.opened is not None:
            assert self.opened.wait(20)
        self.threads -= 1
        self.masks += 1
        if self.error is not None:
            raise self.error
        allowed[:] = self.masks


@pytest.fixture
def opened() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


Started = Callable[[int], MaskThreads]


@pytest.fixture
def started() -> Iterator[Started]:
    """Masks on so many threads, which end with the test."""
    made: list[MaskThreads] = []

    def start(threads: int) -> MaskThreads:
        made.append(MaskThreads(VOCABULARY, threads))
        return made[-1]

    yield start
    for each in made:
        each.close()


def no_wait() -> None:
    pass


def take(threads: MaskThreads, rows: list[Row]) -> masks.RowMasks:
    return threads.take(rows, no_wait)  # type: ignore[arg-type]


def begin(threads: MaskThreads, rows: list[Row]) -> None:
    threads.begin(rows)  # type: ignore[arg-type]


def wait_until_taken(threads: MaskThreads, rows: list[Row]) -> masks.RowMasks:
    """The masks of all rows, however many steps it takes."""
    taken = masks.RowMasks()
    while rows:
        begin(threads, rows)
        got = take(threads, rows)
        taken.allowed.update(got.allowed)
        taken.failures.update(got.failures)
        rows = [row for row in rows if row in got.postponed]
    return taken


def test_slow_masks_of_one_tenant_delay_no_other(started: Started, opened: threading.Event) -> None:
    # With a grammar of 200 terminals each, 128 requests of one tenant made a step last for five seconds.
    threads = started(4)
    slow = [Row("slow", order, opened) for order in range(20)]
    quick = [Row("quick", 100 + order) for order in range(20)]
    begin(threads, [*reversed(slow), *quick])
    for row in slow[:3]:
        assert row.begun.wait(20)
    got = wait_until_taken(threads, quick)
    assert got.allowed.keys() == set(quick)
    assert take(threads, slow).postponed == set(slow)
    assert not any(row.begun.is_set() for row in slow[3:]), "a thread is left to others, in the order of arrival"
    opened.set()
    assert wait_until_taken(threads, slow).allowed.keys() == set(slow)
    assert {row.masks for row in [*slow, *quick]} == {1}, "no mask is computed twice"


def test_tenants_take_turns(started: Started, opened: threading.Event) -> None:
    threads = started(1)
    done: list[str] = []
    first = Row("a", 0, opened)
    rows = [Row(tenant, order) for tenant in "ab" for order in range(1, 4)]
    fill = Row.fill

    with pytest.MonkeyPatch.context() as patch:

        def noted(row: Row, allowed: Any) -> None:
            fill(row, allowed)
            done.append(f"{row.tenant}{row.order}")

        patch.setattr(Row, "fill", noted)
        begin(threads, [first])
        assert first.begun.wait(20)
        begin(threads, rows)
        opened.set()
        wait_until_taken(threads, [first, *rows])
    assert done == ["a0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_a_step_waits_in_proportion_to_its_own_time(
    started: Started, opened: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(masks.time, "monotonic", lambda: now[0])
    threads = started(2)
    waits: list[float] = []
    monkeypatch.setattr(threads._changed, "wait_for", lambda ready, timeout: waits.append(timeout))
    late = Row("a", 0, opened)

    def logits() -> None:
        now[0] += 0.02

    # Beside a request without a constraint, and alone: then the step would give no token at all.
    for others, seconds in [([Row("b", 1, row=FREE)], [0.01]), ([], [0.01, 0.04])]:
        begin(threads, [late, *others])
        assert threads.take([late], logits).postponed == {late}  # type: ignore[list-item, comparison-overlap]
        assert waits == pytest.approx(seconds)
        waits.clear()
    begin(threads, [late, Row("b", 1, row=FREE)])
    take(threads, [late])
    assert waits == [masks._LEAST_PATIENCE_S]


def test_a_ready_mask_waits_for_no_device(started: Started) -> None:
    threads = started(2)
    row = Row("a", 0)
    begin(threads, [row])
    with threads._changed:
        assert threads._changed.wait_for(lambda: threads._jobs[row].is_done, 20)  # type: ignore[index]
    got = threads.take([row], lambda: 1 / 0)  # type: ignore[list-item]
    assert got.allowed[row].tolist() == [1, 1]  # type: ignore[index]


def test_a_constraint_that_fails_ends_its_own_request(started: Started) -> None:
    threads = started(2)
    refused = Row("a", 0, error=InvalidRequest("too complex", param="grammar"))
    broken = Row("a", 1, error=RuntimeError("odd"))
    sound = Row("a", 2)
    got = wait_until_taken(threads, [refused, broken, sound])
    assert got.failures[refused] is refused.error  # type: ignore[index]
    assert isinstance(got.failures[broken], EngineUnavailable)  # type: ignore[index]
    assert set(got.allowed) == {sound}


def test_requests_that_leave_leave_nothing(started: Started, opened: threading.Event) -> None:
    threads = started(1)
    begun, waiting, done = Row("a", 1, opened), Row("a", 2), Row("a", 0)
    begin(threads, [done])
    with threads._changed:
        assert threads._changed.wait_for(lambda: threads._jobs[done].is_done, 20)  # type: ignore[index]
    begin(threads, [begun, waiting])
    assert begun.begun.wait(20)
    for row in (begun, waiting, done):
        row.row = -1
    threads.forget_left()
    assert list(threads._jobs) == [begun] and not threads._waiting
    opened.set()
    with threads._changed:
        assert threads._changed.wait_for(lambda: not threads._jobs, 20)
    assert not waiting.masks and not threads._working


def test_a_request_that_comes_back_gets_the_mask_that_is_under_way(started: Started, opened: threading.Event) -> None:
    threads = started(2)
    row = Row("a", 0, opened)
    begin(threads, [row])
    assert row.begun.wait(20)
    row.row = -1
    threads.forget_left()
    row.row = 3
    begin(threads, [row])
    opened.set()
    assert wait_until_taken(threads, [row]).allowed.keys() == {row}
    assert row.masks == 1


def test_a_request_that_was_finished_before_its_turn_is_not_looked_at(
    started: Started, opened: threading.Event
) -> None:
    threads = started(1)
    first, second = Row("a", 0, opened), Row("a", 1)
    begin(threads, [first, second])
    assert first.begun.wait(20)
    second.row = FREE
    opened.set()
    with threads._changed:
        assert threads._changed.wait_for(lambda: list(threads._jobs) == [first], 20)
    assert not second.masks


def test_nothing_begins_after_the_end(started: Started, opened: threading.Event) -> None:
    threads = started(1)
    first, second = Row("a", 0, opened), Row("a", 1)
    begin(threads, [first, second])
    assert first.begun.wait(20)
    threading.Timer(0.1, opened.set).start()
    threads.close()
    # What ran has ended: the end of a process must not meet it.
    assert first.masks and not second.masks
    # The step under way outlasts the end: it gets no mask for the second, and both leave the batch after it.
    begin(threads, [second])
    assert take(threads, [second]).postponed == {second}  # type: ignore[comparison-overlap]
    first.row = second.row = -1
    threads.forget_left()
    assert not threads._jobs and not threads._waiting


def test_threads_that_cannot_be_started_are_asked_for_again(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = started(3)
    rows = [Row(tenant, order) for tenant in "ab" for order in range(3)]
    start, left = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        for _ in range(2):
            begin(threads, rows)
            assert take(threads, rows).postponed == set(rows)  # type: ignore[comparison-overlap]
        assert caplog.text.count("no thread can be started for masks") == 1
        # One thread is enough for all of them.
        left = 1
        assert wait_until_taken(threads, rows).allowed.keys() == set(rows)
    more = [Row(tenant, order) for tenant in "cd" for order in range(3)]
    assert wait_until_taken(threads, more).allowed.keys() == set(more)
    assert not threads._jobs and not threads._waiting and not threads._working


@pytest.mark.slow
def test_a_mask_that_never_ends_does_not_keep_the_process_from_ending() -> None:
    program = """
import threading
from sera_serve.engine.loop.masks import MaskThreads
begun = threading.Event()
class Row:
    tenant, order = "a", 0
    @property
    def constraint(self):
        return self
    def fill(self, allowed):
        begun.set()
        threading.Event().wait()
threads = MaskThreads(8, 1)
threads.begin([Row()])
assert begun.wait(20)
threads.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
