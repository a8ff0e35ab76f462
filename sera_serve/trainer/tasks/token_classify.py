"""The task token-classify: the state of every token, a linear head, cross-entropy over BIO tags, spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.nn import functional

from sera_serve.base import FrozenBase
from sera_serve.base.spans import Span, bio_tags, decode_tags, encode_tags, token_ranges
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.spans import Marked, load_spans
from sera_serve.trainer.heads import HeadModel
from sera_serve.trainer.model import IGNORED, new_head
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.protocol import TaskKind
from sera_serve.trainer.tasks.text_head import TextHeadTask, TextRow


@dataclass
class _TaggedText:
    """The predicted tags of the tokens of a whole text."""

    example: Example[Marked]
    ranges: list[tuple[int, int] | None] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def spans(self, names: Sequence[str]) -> list[Span]:
        """The spans that the tags stand for."""
        assert isinstance(self.example.text, str)
        return decode_tags(self.example.text, self.ranges, self.tags, self.scores, names)


class TokenClassifyTask(TextHeadTask[Marked]):
    """Task token-classify: a tag for each token that has characters of its own."""

    needs_offsets = True

    def __init__(
        self, settings: TrainSettings, base: FrozenBase, data: Examples[Example[Marked]], max_length: int
    ) -> None:
        if not base.preprocessor.has_offsets:
            raise InvalidConfiguration(
                f"the tokenizer of base {base.name} does not tell which characters a token stands for, which "
                "token-classify needs; take a base with a fast tokenizer (a tokenizer.json)",
                param="base",
            )
        self.tags = bio_tags(data.labels)
        head = new_head(base, len(self.tags))
        super().__init__(settings, base, data, max_length, None)
        # Padding and tokens without characters are ignored.
        self.model = HeadModel(base, head, _mean_loss, None, settings.dropout)

    def targets(self, rows: Sequence[TextRow[Marked]], length: int) -> Tensor:
        """The tag of each token, int64 (rows, length), `IGNORED` where a token has none."""
        targets = torch.full((len(rows), length), IGNORED)
        for i, row in enumerate(rows):
            window = row.inputs.window
            goes_on = window is not None and window.index > 0
            found = encode_tags(_ranges(row), row.example.target, self.tags, IGNORED, goes_on)
            targets[i, : len(found)] = torch.tensor(found)
        return targets

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the mean loss of a token, precision, recall and F1 of whole spans, and the accuracy of tags.

        A span is right where its first and last character and its label are. Of a long text, each token counts once:
        by the window that decides it, as on the server. Spans beyond the last window count as missed.
        """
        logits = self.logits(rows)
        losses, tokens = 0.0, 0
        truth: list[int] = []
        found: list[int] = []
        tagged: dict[int, _TaggedText] = {}
        for row, scores in zip(rows, logits, strict=True):
            targets = self.targets([row], len(row.inputs))[0]
            window = row.inputs.window
            own = slice(None) if window is None else slice(window.first, window.last)
            targets, scores = targets[own], scores[own]
            losses += float(functional.cross_entropy(scores.double(), targets, ignore_index=IGNORED, reduction="sum"))
            best = scores.softmax(1).max(1)
            predicted = best.indices.tolist()
            is_tagged = (targets != IGNORED).tolist()
            truth += [tag for tag, keeps in zip(targets.tolist(), is_tagged, strict=True) if keeps]
            found += [tag for tag, keeps in zip(predicted, is_tagged, strict=True) if keeps]
            tokens += sum(is_tagged)
            text = tagged.setdefault(id(row.example), _TaggedText(row.example))
            text.ranges += _ranges(row)[own]
            text.tags += predicted
            text.scores += best.values.tolist()
        texts = list(tagged.values())
        return {
            "loss": losses / max(tokens, 1),
            **span_metrics([text.example.target for text in texts], [text.spans(self.tags) for text in texts]),
            "token_accuracy": float(accuracy_score(truth, found)) if truth else 0.0,
        }

    def bundle_fields(self) -> dict[str, Any]:
        """Tags, and the length to which the server truncates, as training did."""
        return {"labels": self.tags, "max_length": self.max_length}


def span_metrics(expected: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans: one is right where start, end and label are. 0 where there are none."""

    def places(found: Sequence[Sequence[Span]]) -> Counter[tuple[int, int, int, str]]:
        return Counter((row, span.start, span.end, span.label) for row, spans in enumerate(found) for span in spans)

    truth, found = places(expected), places(predicted)
    right = (truth & found).total()
    return {
        "precision": right / found.total() if found else 0.0,
        "recall": right / truth.total() if truth else 0.0,
        "f1": 2 * right / (truth.total() + found.total()) if truth or found else 0.0,
    }


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # A batch in which no token has a tag has a mean of nothing, which is NaN.
    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _ranges(row: TextRow[Marked]) -> list[tuple[int, int] | None]:
    text = row.example.text
    assert isinstance(text, str) and row.inputs.offsets is not None
    return token_ranges(text, row.inputs.offsets)


TOKEN_CLASSIFY = TaskKind(load=load_spans, build=TokenClassifyTask)
