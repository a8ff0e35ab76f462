"""Metrics of rows with several labels: each label has a probability of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional

THRESHOLD = 0.5
"""The probability from which on a row has a label, here as on the server."""


def multi_label_metrics(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """Compute the mean loss in nats, and the metrics of `label_set_metrics`.

    Args:
        logits: (rows, labels).
        truth: float32 (rows, labels), 1 for each label of a row.
    """
    loss = functional.binary_cross_entropy_with_logits(logits.double(), truth.double())
    predicted = logits.sigmoid() >= THRESHOLD
    return {"loss": float(loss), **label_set_metrics(truth.bool().numpy(), predicted.numpy())}


def label_set_metrics(expected: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, float]:
    """Micro F1, macro F1 over the labels that occur, and the part of rows whose labels are all right.

    Args:
        expected: (rows, labels), whether a row has a label.
        predicted: The same, as it was predicted.
    """
    # scikit-learn takes one column for a task of two classes, and would also score the rows without the label.
    classes = [True] if expected.shape[1] == 1 else None
    macro = float(f1_score(expected, predicted, labels=classes, average="macro", zero_division=np.nan))
    return {
        "micro_f1": float(f1_score(expected, predicted, labels=classes, average="micro", zero_division=0.0)),
        # Without any label in any row, no label occurs.
        "macro_f1": macro if macro == macro else 0.0,
        "subset_accuracy": float(accuracy_score(expected, predicted)),
    }
