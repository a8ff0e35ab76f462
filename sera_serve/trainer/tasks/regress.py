"""The task regress: a pooled state, a head with one output, the squared error."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import mean_squared_error
from torch import Tensor

from sera_serve.base import FrozenBase
from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.targets import load_numbers
from sera_serve.trainer.heads import ScaledHeadModel
from sera_serve.trainer.model import new_head
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.protocol import TaskKind
from sera_serve.trainer.tasks.text_head import TextHeadTask, TextRow

_LEAST_EXPONENT = -40


class RegressTask(TextHeadTask[float]):
    """Task regress: pooled state of the adapted base, a linear head with one output, the mean squared error.

    The head trains in units of the power of two that is nearest to the numbers' standard deviation, and begins at
    their mean. So one learning rate suits numbers of any size.
    """

    def __init__(
        self, settings: TrainSettings, base: FrozenBase, data: Examples[Example[float]], max_length: int
    ) -> None:
        head = new_head(base, 1)
        pooling = settings.pooling or base.default_pooling
        super().__init__(settings, base, data, max_length, pooling)
        numbers = [item.target for item in data.train]
        # float32 has room for the head in either unit.
        self.scale = 2.0 ** max(_LEAST_EXPONENT, round(math.log2(statistics.pstdev(numbers))))
        torch.nn.init.constant_(head.bias, statistics.fmean(numbers) / self.scale)
        self.model = ScaledHeadModel(self.base_to_train, head, pooling, settings.dropout, self.scale)

    def targets(self, rows: Sequence[TextRow[float]], length: int) -> Tensor:
        """The numbers in units of the scale, float32 (rows,)."""
        return torch.tensor([row.example.target / self.scale for row in rows], dtype=torch.float32)

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the loss (in units of the scale), Pearson, Spearman and the mean squared error.

        A correlation that is not defined, because all numbers are equal, is 0.
        """
        predicted = [float(scores[0]) * self.scale for scores in self.logits(rows)]
        expected = [row.example.target for row in rows]
        return {
            "loss": mean_squared_error(expected, predicted) / self.scale**2,
            **regression_metrics(expected, predicted),
        }

    def bundle_fields(self) -> dict[str, Any]:
        """Pooling, and the length to which the server truncates, as training did."""
        return {"pooling": self.pooling, "max_length": self.max_length}


def regression_metrics(expected: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, 0 where one is not defined, and the mean squared error."""
    correlations = []
    for correlation in (pearsonr, spearmanr):
        value = math.nan
        if len(expected) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstantInputWarning)
                value = float(correlation(expected, predicted).statistic)
        correlations.append(value if math.isfinite(value) else 0.0)
    error = float(mean_squared_error(expected, predicted))
    return {"pearson": correlations[0], "spearman": correlations[1], "mse": error}


REGRESS = TaskKind(load=load_numbers, build=RegressTask)
