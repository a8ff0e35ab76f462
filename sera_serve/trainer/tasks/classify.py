"""The task classify: a pooled state, a linear head, cross-entropy over the labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from adapters_store import AdapterConfig
from sera_serve.base import FrozenBase, Pooling
from sera_serve.trainer.data.labelled import ClassifyData, LabelledText, load_classify_data
from sera_serve.trainer.data.targets import LabelledExamples, load_label_sets
from sera_serve.trainer.data.token_rows import TokenRow, by_length, encode_texts, pad_tokens
from sera_serve.trainer.model import AdapterModel, ClassifierModel, HeadOnlyModel, new_head
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.multi_label import MultiLabelTask
from sera_serve.trainer.tasks.protocol import TaskKind

# Rows of one evaluation batch.
_EVAL_BATCH = 64


class FeatureRow(TypedDict):
    """A row of head-only training: pooled state, float32 (hidden_size,), and class index."""

    features: Tensor
    labels: int


class ClassifyTask:
    """Task classify: pooled state of the adapted base, a linear head, cross-entropy over the labels."""

    def __init__(
        self,
        base: FrozenBase,
        data: ClassifyData,
        *,
        pooling: Pooling,
        max_length: int,
        dropout: float,
        adapted: bool,
    ) -> None:
        self.base = base
        self.labels = data.labels
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.notes: list[str] = list(data.notes)
        self._index = {label: i for i, label in enumerate(data.labels)}
        head = new_head(base, len(data.labels))
        rows = [self._tokenise(part, name) for name, part in _parts(data)]
        self.train_tokens = sum(len(row["input_ids"]) for row in rows[0])
        self.model: AdapterModel
        self.train_rows: Sequence[Any]
        self.eval_rows: Sequence[Any]
        self.test_rows: Sequence[Any]
        if adapted:
            self.model = ClassifierModel(base, head, pooling, dropout)
            self.train_rows, self.eval_rows, self.test_rows = rows
            self.lengths: Sequence[int] = [len(row["input_ids"]) for row in rows[0]]
        else:
            self.model = HeadOnlyModel(head, dropout)
            self.train_rows, self.eval_rows, self.test_rows = map(self._features, rows)
            self.lengths = [1] * len(self.train_rows)

    def _tokenise(self, texts: list[LabelledText], name: str) -> list[TokenRow]:
        if not texts:
            return []
        tokens, cut = encode_texts(self.base, [item.text for item in texts], self.max_length)
        if cut:
            self.notes.append(f"{cut} of {len(texts)} {name} rows were cut to {self.max_length} tokens")
        return [
            {**row, "labels": self._index[item.label], "text_bytes": 0} for row, item in zip(tokens, texts, strict=True)
        ]

    @torch.no_grad()
    def _features(self, rows: list[TokenRow]) -> list[FeatureRow]:
        features: list[FeatureRow | None] = [None] * len(rows)
        for batch in by_length([len(row["input_ids"]) for row in rows], _EVAL_BATCH):
            tokens = self._to_device(pad_tokens([rows[i] for i in batch], self._pad_id))
            pooled = self.base.pooled_states(**tokens, pooling=self.pooling).float()
            for i, state in zip(batch, pooled.cpu(), strict=True):
                labels = rows[i]["labels"]
                assert isinstance(labels, int)
                features[i] = {"features": state, "labels": labels}
        return [row for row in features if row is not None]

    @property
    def _pad_id(self) -> int:
        return int(self.base.tokenizer.pad_token_id)

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.base.device) for name, tensor in tensors.items()}

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        labels = torch.tensor([row["labels"] for row in rows])
        if "features" in rows[0]:
            return {"features": torch.stack([row["features"] for row in rows]), "labels": labels}
        return {**pad_tokens(rows, self._pad_id), "labels": labels}

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> Tensor:
        """Compute logits, float32 (rows, labels), in the order of `rows`."""
        self.model.eval()
        result = torch.empty(len(rows), len(self.labels))
        lengths = [len(row["input_ids"]) if "input_ids" in row else 1 for row in rows]
        for batch in by_length(lengths, _EVAL_BATCH):
            inputs = self._to_device(self.collate([rows[i] for i in batch]))
            result[batch] = self.model(**inputs)["logits"].cpu()
        return result

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute mean loss in nats, accuracy, macro F1 over the labels that occur, and Matthews correlation."""
        return label_metrics(self.logits(rows), torch.tensor([row["labels"] for row in rows]))

    def bundle_fields(self) -> dict[str, Any]:
        """Labels, pooling, and the length to which the server truncates, as training did."""
        return {"labels": self.labels, "pooling": self.pooling, "max_length": self.max_length}


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
        "loss": float(torch.nn.functional.cross_entropy(logits, truth)),
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=np.nan)),
        "matthews": matthews,
    }


def _parts(data: ClassifyData) -> list[tuple[str, list[LabelledText]]]:
    return [("training", data.train), ("evaluation", data.eval), ("test", data.test)]


def _load(settings: TrainSettings, initial: AdapterConfig | None) -> ClassifyData | LabelledExamples:
    labels = initial.labels if initial is not None else None
    return load_label_sets(settings, labels) if settings.multi_label else load_classify_data(settings, labels)


def _build(
    settings: TrainSettings, base: FrozenBase, data: ClassifyData | LabelledExamples, max_length: int
) -> ClassifyTask | MultiLabelTask:
    pooling, adapted = settings.pooling or base.default_pooling, settings.adapter_config() is not None
    if isinstance(data, LabelledExamples):
        return MultiLabelTask(
            base, data, pooling=pooling, max_length=max_length, dropout=settings.dropout, adapted=adapted
        )
    return ClassifyTask(base, data, pooling=pooling, max_length=max_length, dropout=settings.dropout, adapted=adapted)


CLASSIFY = TaskKind(load=_load, build=_build)
