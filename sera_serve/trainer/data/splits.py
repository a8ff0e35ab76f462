"""Choosing rows: a limit on their number, and a part that is held out for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def draw(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Draw at most `limit` rows without replacement, and keep their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(f"limit {seed}").sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def hold_out(
    rows: Sequence[T], fraction: float, seed: int, *, key: Callable[[T], str], stratum: Callable[[T], str]
) -> tuple[list[T], list[T]]:
    """Split rows into (kept, held out), each in the file's order.

    Rows of equal `key` stay on one side; otherwise a prompt with several completions could be on both sides. About
    `fraction` of each stratum is held out, and at least one group of it is kept.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    strata: dict[str, list[list[int]]] = {}
    for members in groups.values():
        strata.setdefault(stratum(rows[members[0]]), []).append(members)
    shuffle = random.Random(f"hold out {seed}")
    held: set[int] = set()
    owed = 0.0
    for name in sorted(strata):
        candidates = strata[name]
        shuffle.shuffle(candidates)
        # The rounding error of a stratum is carried to the next stratum, so that the total is right.
        owed += fraction * len(candidates)
        count = min(round(owed), len(candidates) - 1)
        owed -= count
        held.update(i for members in candidates[:count] for i in members)
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
