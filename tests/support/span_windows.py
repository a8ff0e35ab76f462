"""The spans of a long text, made by hand: windows of tokens, each token decided by the window with most context."""

from __future__ import annotations

import torch

from adapters_store import AdapterBundle
from sera_serve.base import FrozenBase
from sera_serve.base.spans import Span, decode_tags, token_ranges
from support.factories import merged


def windows_of(tokens: int, room: int) -> list[tuple[int, int]]:
    """First token of each window, and the one after its last. The last quarter of a window begins the next one."""
    step = room - room // 4
    starts = [0]
    while starts[-1] + room < tokens:
        starts.append(starts[-1] + step)
    return [(start, min(start + room, tokens)) for start in starts]


def owner_of(token: int, windows: list[tuple[int, int]]) -> int:
    """The window in which a token is farthest from an end that is not the text's; the earlier one of two equal ones."""
    total = windows[-1][1]

    def context(window: tuple[int, int]) -> float:
        begin, end = window
        if not begin <= token < end:
            return -1
        before = float("inf") if begin == 0 else token - begin
        return min(before, float("inf") if end == total else end - 1 - token)

    best = max(context(window) for window in windows)
    return min(index for index, window in enumerate(windows) if context(window) == best)


def spans_by_hand(base: FrozenBase, bundle: AdapterBundle, text: str) -> list[Span]:
    """The spans of the whole text, however long, on the merged base; a forward pass for each window."""
    config = bundle.config
    assert config.max_length is not None
    special = base.tokenizer("a")["input_ids"]
    place = special.index(base.tokenizer("a", add_special_tokens=False)["input_ids"][0])
    before, after = special[:place], special[place + 1 :]
    encoded = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ranges = encoded["input_ids"], token_ranges(text, encoded["offset_mapping"])
    windows = windows_of(len(ids), config.max_length - len(before) - len(after))
    whole = merged(base, bundle)
    probabilities = []
    for begin, end in windows:
        row = torch.tensor([[*before, *ids[begin:end], *after]])
        states = whole.hidden_states(row, torch.ones_like(row))[0][len(before) : len(before) + end - begin]
        probabilities.append((states @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]).softmax(1))
    best = []
    for token in range(len(ids)):
        window = owner_of(token, windows)
        best.append(probabilities[window][token - windows[window][0]].max(0))
    tags, scores = [int(found.indices) for found in best], [float(found.values) for found in best]
    return decode_tags(text, ranges, tags, scores, config.labels or [])
