"""Classification with several labels a text: a pooled state, a linear head, a probability of its own for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional

from sera_serve.base import FrozenBase, Pooling
from sera_serve.trainer.data.labelled import LabelledExamples, LabelSet
from sera_serve.trainer.heads import HeadModel
from sera_serve.trainer.model import new_head
from sera_serve.trainer.tasks.text_head import TextHeadTask, TextRow

THRESHOLD = 0.5
"""The probability from which on a text has a label, here as on the server."""


class MultiLabelTask(TextHeadTask[LabelSet]):
    """Task classify with several labels: the binary cross-entropy of each label's sigmoid."""

    def __init__(
        self,
        base: FrozenBase,
        data: LabelledExamples[LabelSet],
        *,
        pooling: Pooling,
        max_length: int,
        dropout: float,
        adapted: bool,
    ) -> None:
        head = new_head(base, len(data.labels))
        super().__init__(base, data, pooling=pooling, max_length=max_length, adapted=adapted)
        self.labels = data.labels
        loss = functional.binary_cross_entropy_with_logits
        self.model = HeadModel(self.base_to_train, head, loss, pooling, dropout)

    def targets(self, rows: Sequence[TextRow[LabelSet]], length: int) -> Tensor:
        """1 for each label of a row, float32 (rows, labels)."""
        return torch.tensor([[float(label in row.example.target) for label in self.labels] for row in rows])

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the mean loss, micro and macro F1, and the part of rows whose labels are all right."""
        logits, expected = torch.stack(self.logits(rows)), self.targets(rows, 0)
        loss = functional.binary_cross_entropy_with_logits(logits.double(), expected.double())
        predicted = logits.sigmoid() >= THRESHOLD
        return {"loss": float(loss), **label_set_metrics(expected.bool().numpy(), predicted.numpy())}

    def bundle_fields(self) -> dict[str, Any]:
        """Labels, pooling, and the length to which the server truncates, as training did."""
        return {
            "labels": self.labels,
            "multi_label": True,
            "pooling": self.pooling,
            "max_length": self.max_length,
        }


def label_set_metrics(expected: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, float]:
    """Micro F1, macro F1 over the labels that occur, and the part of rows whose labels are all right.

    Args:
        expected: (rows, labels), whether a row has a label.
        predicted: The same, as it was predicted.
    """
    # One column is a binary task to scikit-learn, whose second class is the rows without the label.
    classes = [True] if expected.shape[1] == 1 else None
    macro = float(f1_score(expected, predicted, labels=classes, average="macro", zero_division=np.nan))
    return {
        "micro_f1": float(f1_score(expected, predicted, labels=classes, average="micro", zero_division=0.0)),
        # Without any label in any row, no label occurs.
        "macro_f1": macro if macro == macro else 0.0,
        "subset_accuracy": float(accuracy_score(expected, predicted)),
    }
