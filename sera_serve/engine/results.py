"""What requests get beside text: log-probabilities of tokens, and the result of each row of a pass.

A row's result is its vector, or by the task of its adapter a label, labels, a number, or spans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store import AdapterConfig, Task
from sera_serve.base import ModelInputs, Span
from sera_serve.base.preprocess import Window
from sera_serve.base.spans import decode_tags, token_ranges

THRESHOLD = 0.5
"""The probability from which on an input has a label, where it may have several."""


@dataclass(frozen=True, slots=True)
class LikelyTokens:
    """Tokens and their log-probabilities, likeliest first, in 8 bytes each. As pairs they would take 120.

    Attributes:
        ids: int32 of the tokens.
        logprobs: float32 of their log-probabilities.
    """

    ids: bytes
    logprobs: bytes

    def first(self, count: int) -> LikelyTokens:
        """The likeliest ones."""
        return LikelyTokens(self.ids[: 4 * count], self.logprobs[: 4 * count])

    def __len__(self) -> int:
        return len(self.ids) // 4

    def __iter__(self) -> Iterator[tuple[int, float]]:
        ids: list[int] = np.frombuffer(self.ids, np.int32).tolist()
        logprobs: list[float] = np.frombuffer(self.logprobs, np.float32).tolist()
        return zip(ids, logprobs, strict=True)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model before temperature and noise, adapters included.

    Attributes:
        token: The token at this position.
        logprob: Its log-probability; None for a prompt's first token, which nothing comes before.
        top: The likeliest tokens and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float | None
    top: LikelyTokens | tuple[tuple[int, float], ...] = ()

    def of_top(self, count: int) -> TokenLogprobs:
        """The same with so many of the likeliest tokens."""
        if not isinstance(self.top, LikelyTokens) or count >= len(self.top):
            return self
        return TokenLogprobs(self.token, self.logprob, self.top.first(count) if count else ())


@dataclass(frozen=True)
class LabelScores:
    """The likeliest label of one input, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class LabelSet:
    """The labels of one input whose probability is at least 0.5, and the probability of each label on its own."""

    labels: list[str]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Score:
    """The number of one input."""

    score: float


@dataclass(frozen=True)
class Spans:
    """The spans of one input, in the order of their places.

    Attributes:
        spans: Their places count characters of the input.
        truncated: Whether the input was longer than all its windows; nothing was looked for in its rest.
    """

    spans: list[Span]
    truncated: bool


@dataclass(frozen=True)
class TaggedTokens:
    """The tags of one window of an input: of the tokens that it decides and that have characters.

    Attributes:
        ranges: The characters of each token.
        tags: The number of its tag.
        scores: The probability of that tag.
    """

    ranges: list[tuple[int, int]]
    tags: list[int]
    scores: list[float]


HeadResult: TypeAlias = LabelScores | LabelSet | Score | Spans
"""Of one row, by the task of its adapter."""
RowResult: TypeAlias = HeadResult | TaggedTokens | NDArray[np.float32]
"""Of one row: what its adapter's head says, or its vector (hidden,)."""


@dataclass(frozen=True)
class RowKind:
    """Rows whose numbers the same operations give, whatever their adapters.

    Attributes:
        task: Of the adapters; None where the rows become vectors.
        width: Numbers of a row, or of a token to tag, that the operations read.
        multi_label: Whether a row may have several labels.
        normalize: Whether vectors are scaled to length 1.
    """

    task: Task | None
    width: int
    multi_label: bool = False
    normalize: bool = False


def row_numbers(kind: RowKind, found: Tensor) -> Tensor:
    """What is told of each row, on the device; NaN where an adapter overflows.

    Args:
        kind: Of the rows.
        found: float32 (rows, width), a head's logits or pooled states; for token-classify (rows, length, width).

    Returns:
        float32 (rows, numbers): a score, probabilities, or a vector. For token-classify the tag of each token, then the
        probability of each tag.
    """
    if kind.task is None:
        return _vectors(found, kind.normalize)
    overflows = ~found.isfinite().all(-1, keepdim=True)
    if kind.task == "token-classify":
        best = found.softmax(dim=2).max(dim=2)
        # float32 holds the numbers of tags, which are far fewer than 2^24.
        return torch.cat([best.indices, best.values.masked_fill(overflows[..., 0], math.nan)], dim=1)
    if kind.multi_label:
        found = found.sigmoid()
    elif kind.task != "regress":
        found = found.softmax(dim=1)
    return found.masked_fill(overflows, math.nan)


def _vectors(pooled: Tensor, normalize: bool) -> Tensor:
    """A vector of zeros has no direction, and stays as it is."""
    length = torch.linalg.vector_norm(pooled, dim=1, keepdim=True)
    vectors = torch.where(length > 0, pooled / length, pooled) if normalize else pooled
    return vectors.masked_fill(~length.isfinite(), math.nan)


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """Copy float32 tensors to the host, waiting for the device once."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(flat, ends), tensors, strict=True)]


def head_result(
    config: AdapterConfig, numbers: NDArray[np.float32], row: ModelInputs
) -> HeadResult | TaggedTokens | None:
    """The result of a row by what `row_numbers` gave for it; None where the adapter overflows.

    A window of a text has tags: see `joined_windows`.
    """
    values: list[float] = numbers.tolist()
    if config.task == "token-classify":
        return _spans(config, values, row)
    if math.isnan(values[0]):
        return None
    if config.task == "regress":
        return Score(values[0])
    by_label = dict(zip(config.labels or [], values, strict=True))
    if config.multi_label:
        return LabelSet([label for label, value in by_label.items() if value >= THRESHOLD], by_label)
    return LabelScores(max(by_label, key=by_label.__getitem__), by_label)


def _spans(config: AdapterConfig, values: list[float], row: ModelInputs) -> HeadResult | TaggedTokens | None:
    # Padding says nothing.
    length = len(values) // 2
    tags, scores = [int(tag) for tag in values[: len(row)]], values[length : length + len(row)]
    if any(map(math.isnan, scores)):
        return None
    assert row.text is not None and row.offsets is not None
    ranges = token_ranges(row.text, row.offsets)
    if row.window is not None:
        return _decided(ranges, tags, scores, row.window)
    return Spans(decode_tags(row.text, ranges, tags, scores, config.labels or []), row.is_cut)


def _decided(
    ranges: Sequence[tuple[int, int] | None], tags: Sequence[int], scores: Sequence[float], window: Window
) -> TaggedTokens:
    found = TaggedTokens([], [], [])
    for place in range(window.first, window.last):
        if (characters := ranges[place]) is not None:
            found.ranges.append(characters)
            found.tags.append(tags[place])
            found.scores.append(scores[place])
    return found


def joined_windows(
    results: Sequence[RowResult], rows: Sequence[ModelInputs], labels: Sequence[str]
) -> Sequence[RowResult]:
    """The result of each input, where a long input has several rows: the spans of its whole text.

    Args:
        results: Of each row, in the order of the inputs and, of an input, of its windows.
        rows: The rows.
        labels: The names of the tags.
    """
    joined: list[RowResult] = []
    tagged: list[TaggedTokens] = []
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        if row.window is None or not isinstance(result, TaggedTokens):
            joined.append(result)
            continue
        tagged.append(result)
        follower = rows[index + 1].window if index + 1 < len(rows) else None
        if follower is not None and follower.index > 0:
            continue
        assert row.text is not None
        ranges = [characters for part in tagged for characters in part.ranges]
        tags = [tag for part in tagged for tag in part.tags]
        scores = [score for part in tagged for score in part.scores]
        joined.append(Spans(decode_tags(row.text, ranges, tags, scores, labels), row.is_cut))
        tagged.clear()
    return joined
