"""JSON with one meaning: what is accepted is what the standard library reads, and its structure is bounded."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from adapters_store import parse_json
from adapters_store.format.strict_json import MAX_DEPTH

STRINGS = ["", "a", 'quote " and \\', "[{:,}]", '\\"[', "☠ 😀 é", "\u2028\n\t", "\\\\", "\\u", "]" * 50, "\x7f"]


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice(STRINGS) + rng.choice(STRINGS)
    if kind < 6:
        return rng.choice([None, True, False, 0, -5, 10**30, 1.5, -2e300])
    size = rng.randrange(6)
    if kind == 6:
        return [random_value(rng, depth - 1) for _ in range(size)]
    return {rng.choice(STRINGS) + str(number): random_value(rng, depth - 1) for number in range(size)}


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_valid_json_is_what_the_standard_library_reads(ensure_ascii: bool) -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = json.dumps(random_value(rng, 6), ensure_ascii=ensure_ascii, indent=rng.choice([None, 1]))
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        (b'{"a": 1, "b": 2, "b": 3}', "'b' appears twice"),
        (b"[NaN]", "NaN"),
        (b"\xff", "UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "integer of more than 4300 digits"),
        (b'["\\ud83d"]', "surrogate"),
        (b'["\\uDC00 \\ud83d\\ude00"]', "surrogate"),
        (b'[[[{"\\ud800": 1}]]]', "surrogate"),
        (b'["\\\\\\ud800"]', "surrogate"),
        ('["\ud800"]', "surrogate"),
        (b"[" * 50 + b"]" * 50, "levels"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "levels"),
        (b"[" * 100, "levels"),
        (b"[]]" * 50, "Extra data"),
        (b"[" + b"[]," * 100 + b"[]]", "more than 100 lists"),
        (b"{" + b",".join(b'"%d":1' % number for number in range(101)) + b"}", "more than 100 lists"),
        (b'"' + b'\\"' * 1000 + b"[" * 100, "Unterminated"),
        (b"[" + b"1e9," * 6001 + b"1]", "more than 6000 items"),
    ],
)
def test_other_json_is_refused(data: str | bytes, said: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=said):
        parse_json(data, max_members=100, max_items=6000)


@pytest.mark.parametrize(
    "data",
    [
        b'["\\ud83d\\ude00", "\\\\ud800", "\\uD83D\\uDE00"]',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"[" + b'"[[[[{{{{::::", ' * 500 + b'"\\"[\\\\"]',
        b"[" + b"[]," * 97 + b'{"a":1}]',
        b"[" + b"1," * 6000 + b"1]",
        b"[" + b'"\\",,,,,,,,,,,,,,,,", ' * 600 + b"1]",
        b'["' + b"," * 6001 + b'"' + b" " * 6001 + b"]",
    ],
)
def test_strings_and_numbers_do_not_count(data: bytes) -> None:
    assert parse_json(data, max_members=100, max_items=6000) == json.loads(data)
