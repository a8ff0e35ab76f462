"""The statistic of the timing benchmark."""

from __future__ import annotations

import random

import pytest

from benchmarks.tenant_timing import area, chance_width


def test_the_area_counts_pairs() -> None:
    assert area([1, 2, 3], [4, 5]) == 1
    assert area([4, 5], [1, 2, 3]) == 0
    assert area([1, 2], [1, 2]) == 0.5
    assert area([1, 3], [2, 2]) == 0.5
    assert area([1, 2, 3, 4], [2, 5]) == pytest.approx((1 + 0.5 + 4) / 8)


def test_equal_values_stay_at_chance_and_a_tenth_of_a_deviation_does_not() -> None:
    rng = random.Random(1)
    outside = 0
    for _ in range(200):
        first, second = ([rng.expovariate(1) for _ in range(100)] for _ in range(2))
        outside += abs(area(first, second) - 0.5) > chance_width(100, 100)
    # 10 are expected.
    assert 2 <= outside <= 22
    first = [rng.gauss(1, 0.1) for _ in range(500)]
    assert abs(area(first, [value + 0.03 for value in first]) - 0.5) > chance_width(500, 500, tests=30)


def test_more_comparisons_allow_more() -> None:
    assert chance_width(500, 500) == pytest.approx(0.0358, abs=5e-4)
    assert chance_width(500, 500, tests=29) > 1.5 * chance_width(500, 500)
