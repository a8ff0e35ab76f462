"""Which rows a classification pass takes."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from sera_serve.base import ModelInputs
from sera_serve.engine import BASE_PRINCIPAL
from sera_serve.engine.request import ClassificationRequest
from sera_serve.engine.tasks.classify import ClassificationRunner, RowGroup, choose_rows, split_call


def test_a_batch_has_rows_for_a_few_passes_and_an_empty_one_takes_any_request() -> None:
    runner = SimpleNamespace(_max_rows=2, _requests=[])

    def fits(num_rows: int) -> bool:
        return ClassificationRunner._fits(runner, SimpleNamespace(num_rows=num_rows))  # type: ignore[arg-type]

    assert fits(100)
    runner._requests = [SimpleNamespace(num_rows=2), SimpleNamespace(num_rows=3)]
    assert fits(3) and not fits(4)


def test_rows_of_like_length_go_together() -> None:
    assert choose_rows([10, 500, 11, 12, 480, 9], 8, 4096) == [0, 2, 3, 5]
    assert choose_rows([10, 500, 11, 12, 480, 9], 8, 4096, must=1) == [1, 4]


def test_few_tokens_are_not_worth_a_pass_of_their_own() -> None:
    assert choose_rows([3, 60, 40], 8, 4096) == [0, 1, 2]


def test_limits_of_a_pass() -> None:
    assert choose_rows([10] * 20, 8, 4096) == list(range(8))
    assert len(choose_rows([100] * 20, 8, 512)) == 5
    assert choose_rows([1000], 8, 512) == [0]
    # To the last token, and to the last one of padding: 128, or a fifth.
    assert (choose_rows([5, 5], 8, 10), choose_rows([5, 5], 8, 9)) == ([0, 1], [0])
    assert (choose_rows([1, 129], 8, 4096), choose_rows([1, 130], 8, 4096)) == ([0, 1], [0])
    assert (choose_rows([300, 500], 8, 4096), choose_rows([299, 500], 8, 4096)) == ([0, 1], [0])


def test_among_as_many_the_earliest_go() -> None:
    assert choose_rows([500, 500, 10, 10], 2, 4096) == [0, 1]
    assert choose_rows([10, 10, 500, 500], 2, 4096) == [0, 1]
    assert choose_rows([500, 10, 10, 500], 2, 4096) == [0, 3]
    assert choose_rows([10, 500, 500, 10], 2, 4096) == [0, 3]


IMAGE = ModelInputs.of(pixels=np.zeros((3, 1, 1), np.float32), image_tokens=4)


def text(length: int) -> ModelInputs:
    return ModelInputs.of(range(length))


@pytest.mark.parametrize(
    ("rows", "max_wait_s", "taken"),
    [
        ([IMAGE, text(5), text(6)], 60, [1, 2]),
        ([text(5), IMAGE, IMAGE], 60, [1, 2]),
        ([IMAGE, text(5), text(6)], 0, [0]),
        ([text(5), IMAGE, IMAGE], 0, [0]),
        ([text(5), IMAGE], 60, [0]),
        ([text(5), IMAGE, IMAGE, text(6)], 60, [0, 3]),
        # The first text is too long to go with the others.
        ([text(500), IMAGE, text(5), text(6), IMAGE], 60, [1, 4]),
        ([text(500), IMAGE, text(5), text(6), IMAGE], 0, [0]),
    ],
)
def test_a_pass_is_of_texts_or_of_images_and_late_rows_go_first(
    rows: list[ModelInputs], max_wait_s: float, taken: list[int]
) -> None:
    now = time.monotonic()
    waiting = [SimpleNamespace(inputs=row, entered=now, place=place) for place, row in enumerate(rows)]
    runner = SimpleNamespace(_max_rows=8, _max_tokens=4096, _max_wait_s=max_wait_s, _rows=list(waiting))
    found = ClassificationRunner._take_rows(runner)  # type: ignore[arg-type]
    assert [row.place for row in found] == taken  # type: ignore[attr-defined]
    assert runner._rows == [row for row in waiting if row.place not in taken]


def test_the_parts_of_a_call_are_what_one_pass_takes() -> None:
    texts = [text(length) for length in (5, 1, 3, 2, 3)]
    call = ClassificationRequest(principal=BASE_PRINCIPAL)
    parts = split_call(call, [RowGroup(None, [IMAGE, *texts]), RowGroup(None, texts[:2])], max_rows=2, max_tokens=9)
    assert [part.positions for part in parts] == [[2, 4], [3, 5], [1], [0], [7], [6]]
    assert [part.num_rows for part in parts] == [2, 2, 1, 1, 1, 1]
    assert [part.prompt_tokens for part in parts] == [3, 6, 5, 4, 1, 5]
    assert [part.rows for part in parts[-2:]] == [[texts[1]], [texts[0]]]


@pytest.mark.parametrize("seed", range(20))
def test_a_pass_of_many_tokens_is_little_padding(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice([5, 30, 200, 500]) + chance.randrange(40) for _ in range(chance.randint(1, 120))]
    must = chance.choice([None, chance.randrange(len(lengths))])
    rows = choose_rows(lengths, 32, 4096, must)
    assert rows == sorted(set(rows)) and rows
    assert must is None or must in rows
    padded = len(rows) * max(lengths[row] for row in rows)
    padding = padded - sum(lengths[row] for row in rows)
    assert len(rows) <= 32 and padded <= 4096
    assert padding <= max(128, padded / 5)
