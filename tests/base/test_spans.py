"""Spans and tags of tokens where tokens share characters, or where characters have no token."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from sera_serve.base.spans import Span, bio_tags, decode_tags, encode_tags, token_ranges

TAGS = bio_tags(["a", "b"])
# Arabic, Chinese, Cyrillic, Devanagari, Hangul, Latin with and without composed accents, and emoji of several parts.
WORDS = [
    "القاهرة",
    "مرحبا",
    "東京",
    "田中さん",
    "Олег",
    "हिन्दी",
    "서울",
    "José",
    "Jose\u0301",
    "Sa\u0303o",
    "🧑🏽‍🚀",
    "🇩🇪",
    "e\u0301\u0308\u20dd",
    "Ann",
]


def byte_level() -> Tokenizer:
    """A byte-level tokenizer whose merges end and begin within characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS[:6] * 9, trainer)
    return tokenizer


def uncased() -> Tokenizer:
    """A tokenizer in the manner of uncased BERT: accents are dropped, and each character is a token."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz", *"".join(WORDS[:5]).lower()})
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def ranges_of(tokenizer: Tokenizer, text: str) -> list[tuple[int, int] | None]:
    return token_ranges(text, tokenizer.encode(text).offsets)


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", ". "]) for _ in range(draw.randint(1, 8)))


@pytest.mark.parametrize("make", [byte_level, uncased])
def test_spans_never_overlap_whatever_the_tags(make: Callable[[], Tokenizer]) -> None:
    tokenizer, draw = make(), random.Random(0)
    shared = 0
    for _ in range(300):
        text = random_text(draw)
        offsets = tokenizer.encode(text).offsets
        shared += sum(after[0] < before[1] for before, after in pairwise(offsets))
        ranges = token_ranges(text, offsets)
        tags = [draw.randrange(len(TAGS)) for _ in ranges]
        spans = decode_tags(text, ranges, tags, [0.5] * len(tags), TAGS)
        assert all(before.end <= after.start for before, after in pairwise(spans))
        assert all(span.start < span.end and span.text == text[span.start : span.end] for span in spans)
        # The spans are themselves training data: their tags give them again.
        again = decode_tags(text, ranges, [max(tag, 0) for tag in encode_tags(ranges, spans, TAGS, -1)], tags, TAGS)
        assert [(s.start, s.end, s.label) for s in again] == [(s.start, s.end, s.label) for s in spans]
    assert (shared > 100) == (make is byte_level)


def test_every_character_of_a_byte_level_text_has_one_token() -> None:
    tokenizer, draw = byte_level(), random.Random(1)
    for _ in range(100):
        text = random_text(draw)
        own = [place for token in ranges_of(tokenizer, text) if token is not None for place in range(*token)]
        assert own == sorted(set(own))
        assert {place for place, letter in enumerate(text) if not letter.isspace()} <= set(own)


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    assert token_ranges("🧑", [(0, 1)] * 4) == [None, None, None, (0, 1)]
    # The second token has the end of one character and the beginning of another.
    assert token_ranges("القاهرة", [(0, 2), (1, 7), (0, 0)]) == [(0, 1), (1, 7), None]
    assert token_ranges("éß", [(0, 1), (0, 2), (1, 2)]) == [None, (0, 1), (1, 2)]
    spans = [Span(0, 1, "a", 1.0, "é"), Span(1, 2, "b", 1.0, "ß")]
    assert [TAGS[tag] for tag in encode_tags([None, (0, 1), (1, 2)], spans, TAGS, -1)[1:]] == ["B-a", "B-b"]


def test_windows_whose_ends_share_a_character_give_one_span_of_it() -> None:
    # The last token of a window does not know that the next window begins within its character.
    ranges: list[tuple[int, int] | None] = [*token_ranges("a🧑", [(0, 1), (1, 2)]), *token_ranges("a🧑", [(1, 2)])]
    found = decode_tags("a🧑", ranges, [1, 1, 3], [1.0, 1.0, 0.5], TAGS)
    assert [(span.start, span.end, span.label, span.score) for span in found] == [(0, 1, "a", 1.0), (1, 2, "b", 0.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Jose\u0301 and Zoe\u0308", ["Jose\u0301", "and", "Zoe\u0308"]),
        ("Sa\u0303o", ["Sa\u0303o"]),
        # An enclosing mark (category Me), and several marks of one letter.
        ("e\u0301\u0308\u20dd b", ["e\u0301\u0308\u20dd", "b"]),
        # A mark after a space belongs to no letter.
        ("a \u0301b", ["a", "b"]),
    ],
)
def test_marks_that_the_tokenizer_drops_belong_to_their_letters(text: str, words: list[str]) -> None:
    ranges = ranges_of(uncased(), text)
    found = [(start, end) for start, end in filter(None, ranges)]
    starts = [text.index(word) for word in words]
    spans = [Span(at, at + len(word), "a", 1.0, word) for at, word in zip(starts, words, strict=True)]
    assert {span.start for span in spans} <= {start for start, _ in found}
    tags = encode_tags(ranges, spans, TAGS, -1)
    decoded = decode_tags(text, ranges, [max(tag, 0) for tag in tags], [1.0] * len(tags), TAGS)
    assert decoded == spans


def test_a_mark_with_a_token_of_its_own_is_not_taken_from_it() -> None:
    assert token_ranges("Jose\u0301", [(0, 4), (4, 5)]) == [(0, 4), (4, 5)]
    assert token_ranges("Jose\u0301\u0308", [(0, 4), (5, 6)]) == [(0, 5), (5, 6)]
