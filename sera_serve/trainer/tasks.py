"""The tasks classify and generate: each gives the training loop a model, token rows, a collator and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from sera_serve.base import FrozenBase, Pooling
from sera_serve.trainer.data import ClassifyData, GenerateData, LabelledText, Passage
from sera_serve.trainer.model import AdapterModel, ClassifierModel, GeneratorModel, HeadOnlyModel, new_head
from sera_serve.trainer.rows import PassageTokenizer, TokenRow, by_length, pad_labels, pad_tokens

# Rows of one evaluation batch.
_CLASSIFY_EVAL_BATCH = 64
_GENERATE_EVAL_BATCH = 32


class TrainingTask(Protocol):
    """What the training loop needs from a task: a model, rows, and their evaluation.

    Attributes:
        model: The module to train.
        train_rows: The training rows, each a mapping.
        lengths: Length of each training row in tokens; 1 for a row of head-only training.
        train_tokens: Tokens of all training rows.
        eval_rows: The rows that choose the best epoch; may be empty.
        test_rows: The rows that are scored once at the end; may be empty.
        notes: Changes to the data that the user should know (rows truncated, texts split).
    """

    model: AdapterModel
    train_rows: Sequence[Any]
    lengths: Sequence[int]
    train_tokens: int
    eval_rows: Sequence[Any]
    test_rows: Sequence[Any]
    notes: list[str]

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        ...

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics of the model on `rows`, without drawing random numbers."""
        ...


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
        self.notes: list[str] = []
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
        full = self.base.tokenizer([item.text for item in texts], verbose=False)["input_ids"]
        cut = sum(len(ids) > self.max_length for ids in full)
        if cut:
            self.notes.append(f"{cut} of {len(texts)} {name} rows were cut to {self.max_length} tokens")
            # The tokenizer's own truncation keeps closing special tokens, as on the server.
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
        for batch in by_length([len(row["input_ids"]) for row in rows], _CLASSIFY_EVAL_BATCH):
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
        for batch in by_length(lengths, _CLASSIFY_EVAL_BATCH):
            inputs = self._to_device(self.collate([rows[i] for i in batch]))
            result[batch] = self.model(**inputs)["logits"].cpu()
        return result

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute mean loss in nats, accuracy, macro F1 over the labels that occur, and Matthews correlation."""
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


class GenerateTask:
    """Task generate: the loss on the tokens that the adapter must write. Prompts are tokenised as on the server."""

    def __init__(self, base: FrozenBase, data: GenerateData, *, max_length: int) -> None:
        self.base = base
        self.generator = GeneratorModel(base)
        self.model: AdapterModel = self.generator
        self.notes: list[str] = []
        self.max_length = max_length
        self.chat_template = data.chat_template
        self.train_rows: Sequence[Any] = self._tokenise(data.train, "training")
        self.eval_rows: Sequence[Any] = self._tokenise(data.eval, "evaluation")
        self.test_rows: Sequence[Any] = self._tokenise(data.test, "test")
        self.lengths: Sequence[int] = [len(row["input_ids"]) for row in self.train_rows]
        self.train_tokens = sum(self.lengths)

    def _tokenise(self, passages: list[Passage], name: str) -> list[TokenRow]:
        with closing(PassageTokenizer(self.base, self.max_length, self.chat_template)) as tokeniser:
            rows = [row for passage in passages for row in tokeniser.rows_of(passage)]
        self.notes.extend(f"{note} ({name} rows)" for note in tokeniser.notes())
        return rows

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        pad_id: Any = self.base.tokenizer.pad_token_id
        tensors = pad_tokens(rows, int(pad_id))
        return {**tensors, "labels": pad_labels(rows, tensors["input_ids"].shape[1])}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Compute mean loss in nats a learned token, perplexity, and bits per byte of the learned text.

        The end-of-text token counts as a token without bytes.
        """
        self.model.eval()
        nats, tokens = 0.0, 0
        for batch in by_length([len(row["input_ids"]) for row in rows], _GENERATE_EVAL_BATCH):
            inputs = {k: v.to(self.base.device) for k, v in self.collate([rows[i] for i in batch]).items()}
            nats += float(self.generator.token_losses(**inputs).double().sum())
            tokens += int((inputs["labels"][:, 1:] != -100).sum())
        text_bytes = sum(row["text_bytes"] for row in rows)
        loss = nats / tokens
        return {
            "loss": loss,
            # JSON has no infinity, which a broken run may reach.
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / text_bytes,
        }
