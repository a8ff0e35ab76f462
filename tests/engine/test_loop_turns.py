"""Long work on the event loop: one piece at a time, owners in turn, and rests for everybody else."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sera_serve import loop_turns
from sera_serve.loop_turns import LoopTurns

PIECE_S = 0.02


async def piece(turns: LoopTurns, owner: str, log: list[str]) -> None:
    async with turns.turn(owner):
        log.append(owner)
        time.sleep(PIECE_S)


def test_owners_take_turns_whatever_they_have_waiting() -> None:
    log: list[str] = []

    async def main() -> None:
        turns = LoopTurns()
        flood = [asyncio.create_task(piece(turns, "flood", log)) for _ in range(6)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(piece(turns, name, log)) for name in ("b", "c", "b")]
        await asyncio.gather(*flood, *others)
        # The rest after the last piece is as long as that took. Then nobody waits: the turn is there at once.
        while turns._is_taken:
            await asyncio.sleep(PIECE_S)
        assert not turns._waiting
        log.append("end")
        await piece(turns, "b", log)

    asyncio.run(main())
    assert log == ["flood", "flood", "b", "c", "flood", "b", "flood", "flood", "flood", "end", "b"]


def test_others_run_between_pieces_for_as_long_as_pieces_take() -> None:
    async def main() -> int:
        turns, log = LoopTurns(), list[str]()
        flood = asyncio.gather(*(piece(turns, "flood", log) for _ in range(8)))
        began = time.monotonic()
        ticks = 0
        while not flood.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert time.monotonic() - began >= 15 * PIECE_S
        return ticks

    # Without turns there is one, after all pieces.
    assert asyncio.run(main()) > 8


@pytest.mark.parametrize("moment", ["waiting", "granted"])
def test_a_turn_that_is_given_up_is_the_next_one_s(moment: str) -> None:
    log: list[str] = []

    async def main() -> None:
        turns, free = LoopTurns(), asyncio.Event()

        async def hold() -> None:
            async with turns.turn("a"):
                await free.wait()

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(piece(turns, "b", log)) for _ in range(2)]
        await asyncio.sleep(0)
        give_turn = turns._next

        def give_to_who_leaves() -> None:
            turns._next = give_turn  # type: ignore[method-assign]
            give_turn()
            waiting[0].cancel()

        if moment == "granted":
            turns._next = give_to_who_leaves  # type: ignore[method-assign]
        else:
            waiting[0].cancel()
        free.set()
        await asyncio.wait([holder, *waiting])
        assert waiting[0].cancelled()
        await asyncio.sleep(3 * PIECE_S)
        assert not turns._is_taken and not turns._waiting

    asyncio.run(main())
    assert log == ["b"]


def test_an_error_ends_the_turn() -> None:
    async def main() -> None:
        turns = LoopTurns()
        with pytest.raises(ValueError, match="no JSON"):
            async with turns.turn("a"):
                raise ValueError("no JSON")
        await asyncio.wait_for(piece(turns, "b", []), 2)

    asyncio.run(main())


class Clock:
    """Stands still until the test says how long something took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(loop_turns, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_a_rest_comes_after_some_milliseconds_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rests: list[float] = []

    async def main() -> None:
        turns, loop = LoopTurns(), asyncio.get_running_loop()

        def rest(seconds: float, end: Callable[[], object]) -> None:
            rests.append(seconds)
            loop.call_soon(end)

        monkeypatch.setattr(loop, "call_later", rest)
        # In the last one the process was stopped.
        for seconds in (0.002, 0.002, 0.002, 0.001, 0.02, 600.0):
            async with turns.turn("a"):
                clock.now += seconds
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main())
    assert rests == pytest.approx([0.006, 0.021, 0.1])


def test_short_work_is_done_at_once_until_much_was_done_in_this_turn_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, log = Clock(monkeypatch), list[str]()

    async def short(turns: LoopTurns, owner: str) -> None:
        await turns.short_turn(owner)
        log.append(owner)
        clock.now += 0.004

    async def main() -> None:
        turns = LoopTurns()
        for _ in range(2):
            asked = [asyncio.create_task(short(turns, owner)) for owner in "abcddef"]
            await asyncio.sleep(0)
            assert log == ["a", "b", "c"]
            # This one's turn does not come, and nobody waits for it.
            asked[5].cancel()
            asked.append(asyncio.create_task(short(turns, "g")))
            await asyncio.wait(asked)
            # One in a turn of the loop, the owners in turn. Who comes later is no earlier.
            assert log == ["a", "b", "c", "d", "f", "d", "g"]
            log.clear()
            await asyncio.sleep(0)

    asyncio.run(main())


def test_nobody_waits_for_those_who_come_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, done = Clock(monkeypatch), Counter[int]()

    async def client(turns: LoopTurns, number: int) -> None:
        while done.total() < 2000:
            await turns.short_turn(number)
            clock.now += 0.001
            done[number] += 1
            await asyncio.sleep(0)

    async def main() -> None:
        turns = LoopTurns()
        await asyncio.gather(*(client(turns, number) for number in range(40)))

    asyncio.run(main())
    assert min(done.values()) > 40
