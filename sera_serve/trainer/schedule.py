"""The learning rate of each step: it rises linearly, then falls linearly, and no step has a rate of 0.

With T steps and w = floor(ratio * T) steps of warm-up, step s (from 0) has the peak rate times (s + 1) / (w + 1) while
s < w, and times (T - s) / (T - w) from there on. transformers' linear schedule has a rate of 0 at its first step where
there is a warm-up, and always one step of warm-up at least: a run of one step would publish what it started from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

# Names this schedule where results of several schedules could meet. A change of the rates needs another name.
SCHEDULE = "linear-above-zero"
# A product such as 0.29 * 100 is a little below the whole number that is meant.
_ROUNDING = 1e-9


def warmup_steps(ratio: float, steps: int) -> int:
    """The steps in which the rate rises: floor(ratio * steps), and fewer than `steps`."""
    return min(math.floor(ratio * steps + _ROUNDING), steps - 1)


def rate_factor(step: int, *, warmup: int, steps: int) -> float:
    """The rate of a step by the peak rate: above 0 for each step from 0 to `steps` - 1, and 0 after the last one."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(steps - step, 0) / (steps - warmup)


def rate_factors(ratio: float, steps: int) -> Callable[[int], float]:
    """Return `rate_factor` for a run of `steps` steps, of which the part `ratio` (below 1) is warm-up."""
    return partial(rate_factor, warmup=warmup_steps(ratio, steps), steps=steps)
