"""Task generate: the loss on what the adapter must write, with every prompt tokenised as the server does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sera_serve.base import FrozenBase
from sera_serve.trainer.generate_data import GenerateData, Passage
from sera_serve.trainer.model import AdapterModel, GeneratorModel
from sera_serve.trainer.passages import PassageTokeniser
from sera_serve.trainer.task import TokenRow, by_length, pad_labels, pad_tokens

_EVAL_BATCH = 32


class GenerateTask:
    """Tokenised rows, the language model, and its evaluation; see `TrainingTask`."""

    def __init__(self, base: FrozenBase, data: GenerateData, *, max_length: int) -> None:
        self.base = base
        self.generator = GeneratorModel(base)
        self.model: AdapterModel = self.generator
        self.notes: list[str] = []
        self.max_length = max_length
        self.train_rows: Sequence[Any] = self._tokenise(data.train, "training")
        self.eval_rows: Sequence[Any] = self._tokenise(data.eval, "evaluation")
        self.test_rows: Sequence[Any] = self._tokenise(data.test, "test")
        self.lengths: Sequence[int] = [len(row["input_ids"]) for row in self.train_rows]

    def _tokenise(self, passages: list[Passage], name: str) -> list[TokenRow]:
        tokeniser = PassageTokeniser(self.base, self.max_length)
        rows = [row for passage in passages for row in tokeniser.rows_of(passage)]
        self.notes.extend(f"{note} ({name} rows)" for note in tokeniser.notes())
        return rows

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Tensors of one batch, the model's keyword arguments."""
        pad_id: Any = self.base.tokenizer.pad_token_id
        tensors = pad_tokens(rows, int(pad_id))
        return {**tensors, "labels": pad_labels(rows, tensors["input_ids"].shape[1])}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Mean loss in nats a learned token, its perplexity, and bits per byte of the learned text.

        The end-of-text token counts as a token and adds no byte.
        """
        self.model.eval()
        nats, tokens = 0.0, 0
        for batch in by_length([len(row["input_ids"]) for row in rows], _EVAL_BATCH):
            inputs = {k: v.to(self.base.device) for k, v in self.collate([rows[i] for i in batch]).items()}
            nats += float(self.generator.token_losses(**inputs).double().sum())
            tokens += int((inputs["labels"][:, 1:] != -100).sum())
        text_bytes = sum(row["text_bytes"] for row in rows)
        loss = nats / tokens
        return {
            "loss": loss,
            # A broken run may reach infinity, which JSON cannot hold.
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / text_bytes,
        }
