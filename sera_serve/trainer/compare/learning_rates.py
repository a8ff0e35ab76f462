"""How a comparison chooses learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LearningRateRule(BaseModel):
    """How learning rates are chosen: on held-out rows of the training file, with a seed of its own.

    All rates of `start` are tried. While the best one is the lowest or the highest tried, the next of `ladder` on that
    side is tried too. The highest score on the held-out rows wins; of equal scores, the lower loss; of equal losses,
    the lower rate. Test rows are not read.

    Attributes:
        ladder: All rates that may be tried, ascending.
        start: Those that are tried first.
        seed: The seed of these runs; none of the plan's own.
        data: With names of data sets, a method has one rate for all, by its mean score on these. Without, each data
            set has a rate of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ladder: list[float]
    start: list[float] = Field(min_length=1)
    seed: int = Field(100, ge=0, lt=2**32)
    data: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _is_a_ladder(self) -> LearningRateRule:
        if sorted(set(self.ladder)) != self.ladder or not all(0 < rate <= 10 for rate in self.ladder):
            raise ValueError("ladder must be ascending rates above 0, at most 10")
        places = [self.ladder.index(rate) if rate in self.ladder else -1 for rate in self.start]
        if -1 in places or places != list(range(places[0], places[0] + len(places))):
            raise ValueError("start must be neighbouring rates of ladder, ascending")
        return self

    def next_rate(self, tried: Mapping[float, tuple[float, float]]) -> float | None:
        """Return the next rate to try, or None if the choice is made.

        Args:
            tried: (score, minus loss) by rate; minus infinity for a run that failed.
        """
        for rate in self.start:
            if rate not in tried:
                return rate
        best = self.ladder.index(self.best(tried))
        places = sorted(self.ladder.index(rate) for rate in tried)
        if not any(score > -math.inf for score, _ in tried.values()):
            # Nothing worked so far: a lower rate is what may.
            best = places[0]
        if best == places[0] and best > 0:
            return self.ladder[best - 1]
        if best == places[-1] and best + 1 < len(self.ladder):
            return self.ladder[best + 1]
        return None

    def best(self, tried: Mapping[float, tuple[float, float]]) -> float:
        """Return the best rate of those tried."""
        return max(tried, key=lambda rate: (tried[rate], -rate))
