"""What a task gives the training loop: a model, rows of tokens, a collator and an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from sera_serve.trainer.model import IGNORED, AdapterModel


class TokenRow(TypedDict):
    """One tokenised row. `labels`: the class index, or a list with one entry a token (`IGNORED`: not learned).

    `text_bytes` is the UTF-8 length of the labelled tokens' text, for bits per byte; 0 for a class.
    """

    input_ids: list[int]
    labels: int | list[int]
    text_bytes: int


class TrainingTask(Protocol):
    """A task bound to a base and data.

    Attributes:
        model: The module to train.
        train_rows: One mapping a row; `lengths` gives their lengths in tokens.
        notes: What was done to the data that the user should know (rows cut, texts split).
    """

    model: AdapterModel
    train_rows: Sequence[Any]
    lengths: Sequence[int]
    eval_rows: Sequence[Any]
    test_rows: Sequence[Any]
    notes: list[str]

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors of one batch, the model's keyword arguments."""
        ...

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Metrics of the model as it is on `rows`; draws no random numbers."""
        ...


def pad_tokens(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`, int64 (rows, longest row)."""
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        attention_mask[i, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pad_labels(rows: Sequence[TokenRow], length: int) -> Tensor:
    """Token labels, int64 (rows, length), `IGNORED` at padding."""
    labels = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        values = row["labels"]
        assert isinstance(values, list)
        labels[i, : len(values)] = torch.tensor(values)
    return labels


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar lengths, longest first: little padding, and memory runs out at once if ever."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
