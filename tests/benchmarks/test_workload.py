"""The synthetic workload has the moments that its spec asks for, and repeats."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.workload import WorkloadSpec, make_trace

SPEC = WorkloadSpec(adapters=1000, rate=50, duration=400)


def test_a_spec_gives_the_same_trace_again_and_another_seed_another() -> None:
    spec = replace(SPEC, duration=2)
    assert make_trace(spec) == make_trace(spec)
    assert make_trace(spec) != make_trace(replace(spec, seed=43))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_are_of_the_rate_and_the_variation(cv: float) -> None:
    due = np.array([request.due for request in make_trace(replace(SPEC, cv=cv))])
    gaps = np.diff(due, prepend=0)
    assert len(due) == 20_000
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    # The third moment tells a Gamma distribution from others with the same two: its skewness is 2 cv.
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 * cv, rel=0.25)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_the_most_popular_have_the_power_law_s_share(alpha: float) -> None:
    trace = make_trace(replace(SPEC, alpha=alpha))
    for fraction in (0.01, 0.1, 0.5):
        share = sum(request.adapter < fraction * 1000 for request in trace) / len(trace)
        assert share == pytest.approx(fraction**alpha, abs=0.015)
    assert {request.adapter for request in trace} <= set(range(1000))


def test_lengths_are_uniform_in_their_ranges() -> None:
    trace = make_trace(replace(SPEC, input_range=(3, 7), output_range=(10, 11)))
    inputs = Counter(len(request.prompt) for request in trace)
    outputs = Counter(request.new_tokens for request in trace)
    assert sorted(inputs) == [3, 4, 5, 6, 7]
    assert sorted(outputs) == [10, 11]
    assert min(inputs.values()) > 0.9 * len(trace) / 5
    assert all(3 <= token < 4096 for request in trace for token in request.prompt)


def test_fleets_of_any_size_get_the_same_work_at_the_same_time() -> None:
    small, large = (make_trace(replace(SPEC, duration=2, adapters=adapters)) for adapters in (5, 5000))
    for one, other in zip(small, large, strict=True):
        assert replace(one, adapter=0) == replace(other, adapter=0)
    assert max(request.adapter for request in small) == 4 < max(request.adapter for request in large)


def test_other_prompts_leave_the_rest_of_a_trace_as_it_is() -> None:
    one, other = (make_trace(replace(SPEC, duration=2, prompts=prompts)) for prompts in (3, 4))
    assert [replace(a, prompt=()) for a in one] == [replace(a, prompt=()) for a in other]
    assert [len(a.prompt) for a in one] == [len(a.prompt) for a in other]
    assert not {a.prompt for a in one} & {a.prompt for a in other}


def test_rotation_makes_another_adapter_the_most_popular() -> None:
    spec = replace(SPEC, adapters=5, alpha=0.3)
    for rotation in range(5):
        counts = Counter(request.adapter for request in make_trace(replace(spec, rotation=rotation)))
        assert counts.most_common(1)[0][0] == rotation
