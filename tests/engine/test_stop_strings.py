"""Stop strings in pieces of text: what is found and held back is what comparing everything says, at a bounded cost."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest

from sera_serve.engine.stop_strings import StopSearch


def compared(text: str, words: list[str]) -> tuple[list[tuple[int, str]], int]:
    """What a text has of strings, and how much of its end may begin one."""
    found = [(text.find(word), word) for word in words if word in text]
    ends = [size for word in words for size in range(1, len(word)) if text.endswith(word[:size])]
    return found, max(ends, default=0)


@pytest.mark.parametrize("letters", ["ab", "aab", "abc", "añ😀"])
def test_it_finds_what_a_comparison_finds(letters: str) -> None:
    dice = random.Random(letters)
    cuts = 0
    for _ in range(1500):
        words = ["".join(dice.choices(letters, k=dice.randint(1, 9))) for _ in range(dice.randint(0, 4))]
        search, text = StopSearch(words), ""
        for _ in range(20):
            piece = "".join(dice.choices(letters, k=dice.randint(0, 5)))
            cut = search.push(piece)
            found, held = compared(text + piece, words)
            if cut is not None:
                assert (len(text) + cut[0], cut[1]) == min(found)
                cuts += 1
                break
            assert not found and search.held == held
            text += piece
    assert cuts > 500


def lines_run(search: StopSearch, pieces: list[str]) -> int:
    """Lines that a search runs for some pieces."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in pieces:
            assert search.push(piece) is None
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "words",
    [
        [f"{number:02d}" + "a" * 253 for number in range(15)] + ["a" * 255 + "b"],
        ["a" * (240 + number) + "b" for number in range(16)],
        ["a" * 127 + "b" + "a" * (100 + number) + "c" for number in range(16)],
    ],
)
def test_a_character_takes_a_bounded_number_of_steps(words: list[str]) -> None:
    search = StopSearch(words)
    # Without the tables of the strings, which are made once.
    lines_run(search, ["a"] * 300)
    assert lines_run(search, ["a"] * 1000) < 1000 * len(words) * 25
    assert lines_run(StopSearch(words), ["x"] * 1000) < 1000 * len(words) * 12
