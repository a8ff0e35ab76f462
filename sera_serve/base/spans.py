"""Spans of a text and the tags of its tokens in BIO form: from one to the other, the same in training and serving.

A tag is `O` (no span), `B-name` (the first token of a span of that kind) or `I-name` (a further token of it).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

OUTSIDE = "O"


@dataclass(frozen=True)
class Span:
    """A part of a text with a label.

    Attributes:
        start: Its first character.
        end: The character after its last one.
        label: Its kind.
        score: The mean probability of the tags of its tokens; 1 for one that a person has marked.
        text: Its characters.
    """

    start: int
    end: int
    label: str
    score: float
    text: str


def bio_tags(kinds: Sequence[str]) -> list[str]:
    """The tags for kinds of spans: `O`, and `B-` and `I-` of each kind."""
    return [OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI")]


def kinds_of(tags: Sequence[str]) -> list[str]:
    """The kinds of spans that tags stand for, in the order of the tags."""
    return list(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))


def token_ranges(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int] | None]:
    """The characters of each token, without white space around them. No character belongs to two tokens.

    None stands for a token without characters of its own, such as a special token: it has no tag. A character that
    several tokens share belongs to the last of them. A combining mark that no token stands for belongs to the token
    before it.

    Args:
        text: What was tokenized.
        offsets: First character and the one after the last, of each token, as fast tokenizers give them.
    """
    ranges: list[tuple[int, int] | None] = []
    for start, end in offsets:
        # Tokenizers in the manner of SentencePiece and GPT-2 count the space before a word as a part of its token.
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        ranges.append((start, end) if start < end else None)
    return _exclusive(text, ranges)


def _exclusive(text: str, ranges: Sequence[tuple[int, int] | None]) -> list[tuple[int, int] | None]:
    """Give each character to one token. Ranges that are exclusive stay as they are."""
    own: list[tuple[int, int] | None] = []
    follower = len(text)
    for token in reversed(ranges):
        if token is None:
            own.append(None)
            continue
        # Byte-level tokenizers write a character as several bytes, and a token may begin or end within it. The last
        # token of a character completes it: a causal model knows the character there, and not before.
        start, end = token[0], min(token[1], follower)
        # Tokenizers of uncased models drop the accents of decomposed text, as "e" with U+0301.
        while start < end < follower and unicodedata.category(text[end])[0] == "M":
            end += 1
        own.append((start, end) if start < end else None)
        follower = min(follower, start)
    own.reverse()
    return own


def encode_tags(
    ranges: Sequence[tuple[int, int] | None],
    spans: Sequence[Span],
    tags: Sequence[str],
    ignored: int,
    goes_on: bool = False,
) -> list[int]:
    """The tag of each token.

    Args:
        ranges: From `token_ranges`.
        spans: In the order of their places, without overlaps.
        tags: The names of the tags; `O` is the first.
        ignored: What a token without characters has.
        goes_on: Whether tokens of the text come before these, so that a span may have begun there.
    """
    index = {tag: i for i, tag in enumerate(tags)}
    found: list[int] = []
    place, begun = 0, -1
    for token in ranges:
        if token is None:
            found.append(ignored)
            continue
        start, end = token
        while place < len(spans) and spans[place].end <= start:
            place += 1
        if goes_on and place < len(spans) and spans[place].start < start:
            begun = place
        goes_on = False
        if place == len(spans) or spans[place].start >= end:
            found.append(0)
            continue
        found.append(index[f"{'I' if begun == place else 'B'}-{spans[place].label}"])
        begun = place
    return found


def decode_tags(
    text: str,
    ranges: Sequence[tuple[int, int] | None],
    predicted: Sequence[int],
    probabilities: Sequence[float],
    tags: Sequence[str],
) -> list[Span]:
    """The spans that predicted tags stand for, in the order of their places.

    `I-name` after another kind, or after `O`, begins a span, as in the evaluation of CoNLL-2000 (conlleval). Tokens
    without characters are left out. No two spans overlap.

    Args:
        text: What was tokenized.
        ranges: From `token_ranges`; of a text of several windows, those of all its windows.
        predicted: The tag of each token.
        probabilities: The probability of that tag.
        tags: The names of the tags.
    """
    spans: list[Span] = []
    kind, start, end = "", 0, 0
    scores: list[float] = []

    def close() -> None:
        if scores:
            spans.append(Span(start, end, kind, sum(scores) / len(scores), text[start:end]))
            scores.clear()

    # The ranges of windows are put together here. The last token of a window does not know the token after it.
    for token, tag_index, probability in zip(_exclusive(text, ranges), predicted, probabilities, strict=True):
        if token is None:
            continue
        tag = tags[tag_index]
        if tag == OUTSIDE:
            close()
            continue
        if not scores or tag[0] == "B" or tag[2:] != kind:
            close()
            kind, start = tag[2:], token[0]
        end = token[1]
        scores.append(probability)
    close()
    return spans
