"""Task classify: pooled state of the adapted base, a linear head, cross-entropy over the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from sera_serve.base import FrozenBase, Pooling
from sera_serve.trainer.classify_data import ClassifyData, LabelledText
from sera_serve.trainer.model import AdapterModel, ClassifierModel, HeadOnlyModel, new_head
from sera_serve.trainer.task import TokenRow, by_length, pad_tokens

_EVAL_BATCH = 64


class FeatureRow(TypedDict):
    """A row of head-only training: the pooled state, float32 (hidden_size,), and the class index."""

    features: Tensor
    labels: int


class ClassifyTask:
    """Tokenised rows, the classifier, and its evaluation; see `TrainingTask`."""

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
        self.notes: list[str] = []
        self._index = {label: i for i, label in enumerate(data.labels)}
        head = new_head(base, len(data.labels))
        rows = [self._tokenise(part, name) for name, part in _parts(data)]
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
        full = self.base.tokenizer([item.text for item in texts], verbose=False)["input_ids"]
        cut = sum(len(ids) > self.max_length for ids in full)
        if cut:
            self.notes.append(f"{cut} of {len(texts)} {name} rows were cut to {self.max_length} tokens")
            # The tokenizer's own truncation keeps closing special tokens, as the server's does.
            full = self.base.tokenizer([item.text for item in texts], truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
        return [
            {"input_ids": ids, "labels": self._index[item.label], "text_bytes": 0}
            for ids, item in zip(full, texts, strict=True)
        ]

    @torch.no_grad()
    def _features(self, rows: list[TokenRow]) -> list[FeatureRow]:
        features: list[FeatureRow | None] = [None] * len(rows)
        for batch in by_length([len(row["input_ids"]) for row in rows], _EVAL_BATCH):
            tokens = self._to_device(pad_tokens([rows[i] for i in batch], self._pad_id))
            pooled = self.base.pooled_states(tokens["input_ids"], tokens["attention_mask"], self.pooling).float()
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
        """Tensors of one batch, the model's keyword arguments."""
        labels = torch.tensor([row["labels"] for row in rows])
        if "features" in rows[0]:
            return {"features": torch.stack([row["features"] for row in rows]), "labels": labels}
        return {**pad_tokens(rows, self._pad_id), "labels": labels}

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> Tensor:
        """float32 (rows, labels), in the order of `rows`."""
        self.model.eval()
        result = torch.empty(len(rows), len(self.labels))
        lengths = [len(row["input_ids"]) if "input_ids" in row else 1 for row in rows]
        for batch in by_length(lengths, _EVAL_BATCH):
            inputs = self._to_device(self.collate([rows[i] for i in batch]))
            result[batch] = self.model(**inputs)["logits"].cpu()
        return result

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Mean loss in nats, accuracy, macro F1 over the labels that occur, and Matthews correlation."""
        logits = self.logits(rows).double()
        truth = torch.tensor([row["labels"] for row in rows])
        predicted, expected = logits.argmax(1).numpy(), truth.numpy()
        return {
            "loss": float(torch.nn.functional.cross_entropy(logits, truth)),
            "accuracy": float(accuracy_score(expected, predicted)),
            "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=np.nan)),
            "matthews": float(matthews_corrcoef(expected, predicted)),
        }


def _parts(data: ClassifyData) -> list[tuple[str, list[LabelledText]]]:
    return [("training", data.train), ("evaluation", data.eval), ("test", data.test)]
