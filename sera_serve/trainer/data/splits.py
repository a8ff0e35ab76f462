"""Choosing rows: a limit on their number, and a part that is held out for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData

T = TypeVar("T")


def draw(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Draw at most `limit` rows without replacement, and keep their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(f"limit {seed}").sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def hold_out(
    rows: Sequence[T],
    fraction: float,
    seed: int,
    *,
    key: Callable[[T], str],
    stratum: Callable[[T], str],
    keep_single: bool = False,
    labels: Callable[[T], Iterable[str]] | None = None,
) -> tuple[list[T], list[T]]:
    """Split rows into (kept, held out), each in the file's order.

    Rows of equal `key` are a group, which stays on one side; otherwise a prompt with several completions could be on
    both sides. About `fraction` of each stratum is held out, and at least one group of it is kept. Strata of one group
    are one stratum together. At least one group is held out, unless every stratum has a single group.

    Args:
        rows: The rows.
        fraction: The part to hold out, above 0 and at most 0.5.
        seed: Of the choice.
        key: The group of a row.
        stratum: The stratum of a row. A group has that of its first row.
        keep_single: Hold no stratum of one group out: a class without training rows cannot be learned.
        labels: The labels of a row that has several: a group with a label that no kept row has is kept, too.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    by_name: dict[str, list[list[int]]] = {}
    for members in groups.values():
        by_name.setdefault(stratum(rows[members[0]]), []).append(members)
    strata = [by_name[name] for name in sorted(by_name) if len(by_name[name]) > 1]
    if not keep_single and (single := [by_name[name][0] for name in sorted(by_name) if len(by_name[name]) == 1]):
        strata.append(single)
    shuffle = random.Random(f"hold out {seed}")
    held: set[int] = set()
    owed = 0.0
    for candidates in strata:
        shuffle.shuffle(candidates)
        # The rounding error of a stratum is carried to the next stratum, so that the total is right. It is at most half
        # a group, because every stratum but the last one has two groups to choose from.
        owed += fraction * len(candidates)
        count = min(round(owed), len(candidates) - 1)
        owed -= count
        held.update(i for members in candidates[:count] for i in members)
    largest: list[list[int]] = max(strata, key=len, default=[])
    if not held and len(largest) > 1:
        smallest: list[int] = min(largest, key=len)
        held.update(smallest)
    if labels is not None:
        learned = {label for i, row in enumerate(rows) if i not in held for label in labels(row)}
        for members in groups.values():
            wanted = {label for i in members for label in labels(rows[i])}
            if members[0] in held and not wanted <= learned:
                held.difference_update(members)
                learned |= wanted
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def hold_out_for(
    settings: TrainSettings,
    rows: Sequence[T],
    notes: list[str],
    *,
    key: Callable[[T], str],
    stratum: Callable[[T], str],
    keep_single: bool = False,
    labels: Callable[[T], Iterable[str]] | None = None,
) -> tuple[list[T], list[T]]:
    """Split the training rows of a run as `hold_out` does, and add a note where no row can be held out.

    Raises:
        InvalidData: No row can be held out, and the run needs evaluations for `patience`.
    """
    kept, held = hold_out(
        rows, settings.eval_fraction, settings.seed, key=key, stratum=stratum, keep_single=keep_single, labels=labels
    )
    if not held:
        fault = "no row can be held out, because rows of the same input stay together"
        fault += " and each label needs a training row" if keep_single or labels is not None else ""
        if settings.patience is not None:
            raise InvalidData(
                f"{settings.train}: {fault}, and --patience needs evaluations; give --eval, or leave --patience out",
                param="patience",
            )
        notes.append(f"{fault}: the last epoch is kept; give --eval to choose the best one")
    return kept, held
