"""Rates and latencies of a run, from the answers that the clients got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.http_load import Answer

PERCENTILES = (50, 95, 99)


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`{name}_p50_s`, `_p95_s` and `_p99_s`; None without a value."""
    if not seconds:
        return {f"{name}_p{percent}_s": None for percent in PERCENTILES}
    values = np.percentile(seconds, PERCENTILES)
    return {f"{name}_p{percent}_s": round(float(v), 5) for percent, v in zip(PERCENTILES, values, strict=True)}


def latency(answers: Iterable[Answer]) -> dict[str, float | None]:
    """Percentiles of the time to the first token, and of the time between tokens of one request."""
    begun = [answer for answer in answers if answer.times]
    between = [later - earlier for answer in begun for earlier, later in pairwise(answer.times)]
    return percentiles("ttft", [answer.ttft for answer in begun]) | percentiles("itl", between)


def rates(answers: Sequence[Answer], start: float, end: float) -> dict[str, float]:
    """Requests that ended well, and tokens that came, a second of the time between two moments."""
    whole = sum(answer.complete and start <= answer.ended < end for answer in answers)
    return {
        "requests_per_s": round(whole / (end - start), 2),
        "tokens_per_s": round(sum(tokens_between(a, start, end) for a in answers) / (end - start), 1),
    }


def tokens_between(answer: Answer, start: float, end: float) -> int:
    """New tokens that came between two moments."""
    return sum(count for moment, count in zip(answer.times, answer.counts, strict=True) if start <= moment < end)


def span(answers: Sequence[Answer]) -> tuple[float, float]:
    """From when the first request was due to when the last one ended."""
    return min(answer.due for answer in answers), max(answer.ended for answer in answers)


def failures(answers: Iterable[Answer]) -> dict[str, int]:
    """How many requests were refused or failed, by status and code."""
    return dict(Counter(f"{a.status} {a.error or 'cut short'}" for a in answers if not a.right_length))


def fairness(answers: Sequence[Answer], start: float, end: float) -> dict[str, Any]:
    """Service of each adapter's tenant between two moments, and the greatest over the least.

    Service is counted as the scheduler counts cost to the base: tokens of prompts begun, and new tokens.
    """
    served: Counter[str] = Counter()
    for answer in answers:
        prompt = len(answer.request.prompt) if answer.times and start <= answer.times[0] < end else 0
        served[answer.adapter] += prompt + tokens_between(answer, start, end)
    least = min(served.values())
    return {
        "tenants": len(served),
        "max_over_min": round(max(served.values()) / least, 3) if least else None,
        "tokens_per_s": {tenant: round(tokens / (end - start), 1) for tenant, tokens in sorted(served.items())},
    }
