"""The task classify: a pooled state, a linear head, and one label or several a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn import functional

from sera_serve.base import FrozenBase
from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.targets import load_classify_data
from sera_serve.trainer.heads import HeadModel
from sera_serve.trainer.model import new_head
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.multi_label import multi_label_metrics
from sera_serve.trainer.tasks.protocol import TaskKind
from sera_serve.trainer.tasks.text_head import TextHeadTask, TextRow


class ClassifyTask(TextHeadTask[Any]):
    """Task classify: pooled state of the adapted base, a linear head, cross-entropy over the labels.

    With sets of labels, each label has a sigmoid of its own, and the loss is the binary cross-entropy.
    """

    def __init__(
        self, settings: TrainSettings, base: FrozenBase, data: Examples[Example[Any]], max_length: int
    ) -> None:
        head = new_head(base, len(data.labels))
        pooling = settings.pooling or base.default_pooling
        super().__init__(settings, base, data, max_length, pooling)
        self.labels = data.labels
        self.multi_label = settings.multi_label
        self._index = {label: i for i, label in enumerate(data.labels)}
        loss = functional.binary_cross_entropy_with_logits if self.multi_label else functional.cross_entropy
        self.model = HeadModel(self.base_to_train, head, loss, pooling, settings.dropout)

    def targets(self, rows: Sequence[TextRow[Any]], length: int) -> Tensor:
        """The index of each row's label, int64 (rows,); of sets of labels float32 (rows, labels), 1 for each label."""
        if self.multi_label:
            return torch.tensor([[float(label in row.example.target) for label in self.labels] for row in rows])
        return torch.tensor([self._index[row.example.target] for row in rows])

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics of `label_metrics`; of sets of labels those of `multi_label_metrics`."""
        metrics = multi_label_metrics if self.multi_label else label_metrics
        return metrics(torch.stack(self.logits(rows)), self.targets(rows, 0))

    def bundle_fields(self) -> dict[str, Any]:
        """Labels, pooling, and the length to which the server truncates, as training did."""
        fields = {"labels": self.labels, "pooling": self.pooling, "max_length": self.max_length}
        return fields | {"multi_label": self.multi_label}


def label_metrics(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """Compute mean loss in nats, accuracy, macro F1 over the labels that occur, and Matthews correlation.

    Args:
        logits: (rows, labels).
        truth: int64 (rows,), the index of each row's label.
    """
    logits = logits.double()
    predicted, expected = logits.argmax(1).numpy(), truth.numpy()
    with warnings.catch_warnings():
        # Of a few rows that all have one label, and get it.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        matthews = float(matthews_corrcoef(expected, predicted))
    return {
        "loss": float(functional.cross_entropy(logits, truth)),
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=np.nan)),
        "matthews": matthews,
    }


CLASSIFY = TaskKind(load=load_classify_data, build=ClassifyTask)
