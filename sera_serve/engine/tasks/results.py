"""What the scores of an adapter's head say of a row: by the adapter's task, a label, labels, a number, or spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters_store import AdapterConfig
from sera_serve.base import ModelInputs
from sera_serve.base.preprocess import Window
from sera_serve.base.spans import decode_tags, token_ranges
from sera_serve.engine.request import HeadResult, LabelScores, LabelSet, RowResult, Score, Spans, TaggedTokens

THRESHOLD = 0.5
"""The probability from which on an input has a label, where it may have several."""


def head_results(
    config: AdapterConfig, logits: Tensor, mask: Tensor, norms: Tensor | None, rows: Sequence[ModelInputs]
) -> list[HeadResult | TaggedTokens | None]:
    """The result of each row; None where the adapter overflows. Windows of a text have tags: see `joined_windows`.

    Args:
        config: The adapter's configuration.
        logits: float32, of the head: (rows, rows of the head), or (rows, length, tags) for token-classify.
        mask: (rows, length), 1 at real tokens.
        norms: Finite where a row of a watched pass is sound, (rows,), or None.
        rows: The inputs.
    """
    if config.task == "token-classify":
        # Padding says nothing.
        sound = (logits.isfinite().all(2) | ~mask.bool()).all(1)
    else:
        sound = logits.isfinite().all(1)
    if norms is not None:
        sound &= norms.isfinite()
    if config.task == "token-classify":
        return _spans(config, logits, sound, rows)
    if config.task == "regress":
        numbers = logits
    elif config.multi_label:
        numbers = logits.sigmoid()
    else:
        numbers = logits.softmax(dim=1)
    # One transfer for both.
    outcome = torch.cat([sound[:, None], numbers], dim=1).tolist()
    return [_result(config, values) if is_sound else None for is_sound, *values in outcome]


def _result(config: AdapterConfig, values: list[float]) -> HeadResult:
    if config.task == "regress":
        return Score(values[0])
    by_label = dict(zip(config.labels or [], values, strict=True))
    if config.multi_label:
        return LabelSet([label for label, value in by_label.items() if value >= THRESHOLD], by_label)
    return LabelScores(max(by_label, key=by_label.__getitem__), by_label)


def _spans(
    config: AdapterConfig, logits: Tensor, sound: Tensor, rows: Sequence[ModelInputs]
) -> list[HeadResult | TaggedTokens | None]:
    best = logits.softmax(dim=2).max(dim=2)
    # One transfer for all three. float32 holds the numbers of tags, which are far fewer than 2^24.
    outcome = torch.cat([sound[:, None], best.indices, best.values], dim=1).tolist()
    length = logits.shape[1]
    results: list[HeadResult | TaggedTokens | None] = []
    for row, (is_sound, *values) in zip(rows, outcome, strict=True):
        if not is_sound:
            results.append(None)
            continue
        assert row.text is not None and row.offsets is not None
        tags = [int(tag) for tag in values[: len(row)]]
        ranges = token_ranges(row.text, row.offsets)
        if row.window is not None:
            results.append(_decided(ranges, tags, values[length : length + len(row)], row.window))
            continue
        found = decode_tags(row.text, ranges, tags, values[length : length + len(row)], config.labels or [])
        results.append(Spans(found, row.is_cut))
    return results


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
