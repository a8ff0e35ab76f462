"""Which rows a classification pass takes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from sera_serve.engine.tasks.classify import ClassificationRunner, choose_rows


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


def test_among_as_many_the_earliest_go() -> None:
    assert choose_rows([500, 500, 10, 10], 2, 4096) == [0, 1]
    assert choose_rows([10, 10, 500, 500], 2, 4096) == [0, 1]


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
