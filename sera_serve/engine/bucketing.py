"""Which rows go into one padded forward pass: rows of like length, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence

# Padding may be a fifth of the pass, or as many tokens as cost less than another pass.
_PADDING_SHARE = 0.2
_PADDING_OF_NO_ACCOUNT = 128


def choose_rows(lengths: Sequence[int], max_rows: int, max_tokens: int, must: int | None = None) -> list[int]:
    """Choose the rows of the next pass: as many as fit, and among as many the earliest.

    Args:
        lengths: Tokens of each waiting row, the one that came first at the front.
        max_rows: The most rows of a pass.
        max_tokens: The most tokens of a pass, padding included; one row may have more.
        must: A row that has to be among them, or None.

    Returns:
        Positions in `lengths`, ascending; at least one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    best: list[int] = []
    start = total = 0
    # Windows over the rows by length: each ends at the longest row of its pass.
    for end, row in enumerate(order):
        total += lengths[row]
        while start < end and not _fits(end + 1 - start, lengths[row], total, max_rows, max_tokens):
            total -= lengths[order[start]]
            start += 1
        window = order[start : end + 1]
        if (must is None or must in window) and (-len(window), min(window)) < (-len(best), min(best, default=0)):
            best = window
    return sorted(best)


def _fits(rows: int, longest: int, tokens: int, max_rows: int, max_tokens: int) -> bool:
    padded = rows * longest
    padding = padded - tokens
    return (
        rows <= max_rows
        and padded <= max_tokens
        and (padding <= _PADDING_OF_NO_ACCOUNT or padding <= _PADDING_SHARE * padded)
    )
