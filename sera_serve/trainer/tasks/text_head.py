"""What the tasks with a head on texts share: rows as the server makes them, batches, states of the frozen base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sera_serve.base import FrozenBase, ModelInputs, Pooling, preprocess
from sera_serve.errors import InvalidRequest
from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.token_rows import by_length
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tasks.protocol import TrainingTask

# Rows of one evaluation batch.
_EVAL_BATCH = 64

T = TypeVar("T")


@dataclass
class TextRow(Generic[T]):
    """One row of a text.

    Attributes:
        inputs: Its tokens.
        example: What it was made of.
        features: Pooled state of the frozen base, float32 (hidden_size,), where nothing but the head trains.
    """

    inputs: ModelInputs
    example: Example[T]
    features: Tensor | None = None

    def __len__(self) -> int:
        return 1 if self.features is not None else len(self.inputs)


class TextHeadTask(TrainingTask, ABC, Generic[T]):
    """A task with a head on the states of a text. Subclasses have the targets, the loss and the metrics.

    Attributes:
        model: The module to train; set by the subclass.
        pooling: How the states become one; None leaves one for each token.
    """

    # Whether the rows have the characters of their tokens.
    needs_offsets = False

    def __init__(
        self,
        settings: TrainSettings,
        base: FrozenBase,
        data: Examples[Example[T]],
        max_length: int,
        pooling: Pooling | None,
    ) -> None:
        self.base = base
        self.pooling: Pooling | None = pooling
        self.max_length = max_length
        self.notes = list(data.notes)
        # States of all tokens would take too much memory to keep.
        self._keeps_features = settings.adapter_config() is None and pooling is not None
        parts = (("training", data.train), ("evaluation", data.eval), ("test", data.test))
        rows = [self._rows(examples, name) for name, examples in parts]
        self.train_tokens = sum(len(row.inputs) for row in rows[0])
        self.train_rows, self.eval_rows, self.test_rows = rows
        if self._keeps_features:
            for part in rows:
                self._add_features(part)
        self.lengths = [len(row) for row in rows[0]]

    @property
    def base_to_train(self) -> FrozenBase | None:
        """The base that the model computes with; None where the rows bring their states."""
        return None if self._keeps_features else self.base

    @abstractmethod
    def targets(self, rows: Sequence[TextRow[T]], length: int) -> Tensor:
        """What the loss takes for these rows; `length` is that of the longest row in tokens."""

    def _rows(self, examples: list[Example[T]], name: str) -> list[TextRow[T]]:
        if not examples:
            return []
        if self.needs_offsets:
            return self._windows(examples, name)
        texts = [example.text for example in examples]
        try:
            inputs = self.base.preprocessor.rows(texts, self.max_length, "rows")
        except InvalidRequest as error:
            raise InvalidData(f"{name} rows: {error.message}") from error
        full = [i for i, row in enumerate(inputs) if len(row) == self.max_length]
        longer = self.base.preprocessor.rows([texts[i] for i in full], self.max_length + 1)
        if cut := sum(len(row) > self.max_length for row in longer):
            self.notes.append(f"{cut} of {len(examples)} {name} rows were cut to {self.max_length} tokens")
        return [TextRow(row, example) for row, example in zip(inputs, examples, strict=True)]

    def _windows(self, examples: list[Example[T]], name: str) -> list[TextRow[T]]:
        """The rows of texts whose every token counts: several of a text that is longer than a row, as on the server."""
        texts = [example.text for example in examples if isinstance(example.text, str)]
        rows: list[TextRow[T]] = []
        long = cut = 0
        try:
            for example, found in zip(
                examples, self.base.preprocessor.windows(texts, self.max_length, "rows"), strict=True
            ):
                rows += [TextRow(inputs, example) for inputs in found]
                long += len(found) > 1
                cut += found[0].is_cut
        except InvalidRequest as error:
            raise InvalidData(f"{name} rows: {error.message}") from error
        if long:
            self.notes.append(
                f"{long} of {len(examples)} {name} rows have more than {self.max_length} tokens and were read in "
                "windows that overlap"
            )
        if cut:
            self.notes.append(f"{cut} of {len(examples)} {name} rows were cut after {preprocess.MAX_WINDOWS} windows")
        return rows

    @torch.no_grad()
    def _add_features(self, rows: list[TextRow[T]]) -> None:
        assert self.pooling is not None
        for batch in by_length([len(row.inputs) for row in rows], _EVAL_BATCH):
            tensors = self.base.pad([rows[i].inputs for i in batch])
            pooled = self.base.pooled_states(pooling=self.pooling, **tensors).float().cpu()
            for i, state in zip(batch, pooled, strict=True):
                rows[i].features = state

    def collate(self, rows: Sequence[TextRow[T]]) -> dict[str, Tensor]:
        """Build the tensors of one batch on the CPU: the keyword arguments of the model.

        The loop moves them; it would pin their memory first, which no tensor of a GPU can be.
        """
        labels = self.targets(rows, max(len(row.inputs) for row in rows))
        if self._keeps_features:
            features = [row.features for row in rows if row.features is not None]
            return {"features": torch.stack(features), "labels": labels}
        return {**self.base.pad([row.inputs for row in rows], torch.device("cpu")), "labels": labels}

    @torch.no_grad()
    def logits(self, rows: Sequence[TextRow[T]]) -> list[Tensor]:
        """Compute the scores of each row, float32 (rows of the head,) or (tokens, rows of the head), in order."""
        self.model.eval()
        found: dict[int, Tensor] = {}
        for batch in by_length([len(row) for row in rows], _EVAL_BATCH):
            inputs = {k: v.to(self.base.device) for k, v in self.collate([rows[i] for i in batch]).items()}
            scores = self.model(**inputs)["logits"].cpu()
            for i, score in zip(batch, scores, strict=True):
                found[i] = score if self.pooling is not None else score[: len(rows[i].inputs)]
        return [found[i] for i in range(len(rows))]
