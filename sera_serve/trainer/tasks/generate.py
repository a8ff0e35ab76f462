"""The task generate: the loss on the tokens that the adapter must write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.trainer.data.packing import check_packing, pack_rows, packed_length
from sera_serve.trainer.data.passages import GenerateData, Passage, load_generate_data
from sera_serve.trainer.data.token_rows import PassageTokenizer, TokenRow, by_length, pad_labels
from sera_serve.trainer.model import IGNORED, GeneratorModel
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.protocol import TaskKind, TrainingTask

# Rows of one evaluation batch.
_EVAL_BATCH = 32


class GenerateTask(TrainingTask):
    """Task generate: the loss on the tokens that the adapter must write. Prompts are tokenised as on the server."""

    def __init__(self, base: FrozenBase, data: GenerateData, *, max_length: int, packing: bool = False) -> None:
        """Tokenise the rows.

        Args:
            base: A decoder, perhaps with an adapter attached.
            data: The rows.
            max_length: The longest row in tokens.
            packing: Whether the training rows of a step share sequences.

        Raises:
            InvalidConfiguration: The base is no decoder, has no chat template for chats, or cannot pack.
            InvalidData: A row does not fit the chat template.
        """
        self.base = base
        self.generator = GeneratorModel(base)
        self.model = self.generator
        self.notes = list(data.notes)
        self.max_length = max_length
        self.chat_template = data.chat_template
        self.packing = packing
        if packing:
            check_packing(base)
        has_template = data.chat_template is not None or bool(base.tokenizer.chat_template)
        self.trains_chats = data.prefers_chat and has_template
        self._as_chats = data.prefers_chat and data.chat_template is None and bool(base.tokenizer.chat_template)
        if self._as_chats:
            self.notes.append("the rows are chats by the base's own template: send them to /v1/chat/completions")
        self.train_rows = self._tokenise(data.train, "training")
        self.eval_rows = self._tokenise(data.eval, "evaluation")
        self.test_rows = self._tokenise(data.test, "test")
        self.lengths = [len(row["input_ids"]) for row in self.train_rows]
        self.train_tokens = sum(self.lengths)

    def _tokenise(self, passages: list[Passage], name: str) -> list[TokenRow]:
        if self._as_chats:
            passages = [passage.as_chat() for passage in passages]
        with closing(PassageTokenizer(self.base, self.max_length, self.chat_template)) as tokeniser:
            rows = [row for passage in passages for row in tokeniser.rows_of(passage)]
        self.notes.extend(f"{note} ({name} rows)" for note in tokeniser.notes())
        return rows

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Build the tensors of one training batch: the keyword arguments of the model. Rows are packed if asked."""
        if not self.packing:
            return self._padded(rows)
        capacity = packed_length(self.base, [len(row["input_ids"]) for row in rows])
        pad_id: Any = self.base.tokenizer.pad_token_id
        return pack_rows(rows, capacity, int(pad_id))

    def _padded(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        tensors = self.base.pad([ModelInputs.of(row["input_ids"]) for row in rows], torch.device("cpu"))
        return {**tensors, "labels": pad_labels(rows, tensors["input_ids"].shape[1])}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Compute mean loss in nats a learned token, perplexity, and bits per byte of the learned text.

        The end-of-text token counts as a token without bytes.
        """
        self.model.eval()
        nats, tokens = 0.0, 0
        for batch in by_length([len(row["input_ids"]) for row in rows], _EVAL_BATCH):
            inputs = {k: v.to(self.base.device) for k, v in self._padded([rows[i] for i in batch]).items()}
            nats += float(self.generator.token_losses(**inputs).double().sum())
            tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        # The learned tokens may all be ends of texts.
        text_bytes = max(sum(row["text_bytes"] for row in rows), 1)
        loss = nats / tokens
        return {
            "loss": loss,
            # JSON has no infinity, which a broken run may reach.
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / text_bytes,
        }

    def bundle_fields(self) -> dict[str, Any]:
        """The template of the chats that the adapter was trained on."""
        return {"chat_template": self.chat_template}


def _build(settings: TrainSettings, base: FrozenBase, data: GenerateData, max_length: int) -> GenerateTask:
    return GenerateTask(base, data, max_length=max_length, packing=settings.packing)


GENERATE = TaskKind(load=load_generate_data, build=_build)
