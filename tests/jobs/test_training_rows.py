"""Rows of an uploaded training file: half of a surrogate pair is refused with its row, and the check makes pauses."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from sera_serve.jobs import rows
from sera_serve.jobs.rows import InvalidTrainingFile, check_rows

HALF = "a\ud800"
ROWS: list[dict[str, Any]] = [
    {"text": "a", "label": HALF},
    {"text": HALF, "label": "b"},
    {"text": "a", "text_pair": HALF, "label": "b"},
    {"text": "a", "labels": ["b", HALF]},
    {"text": "a", HALF: "b"},
    {"text": "ab", "spans": [{"start": 0, "end": 1, "label": HALF}]},
    {"text": "ab", "spans": [{"start": 0, "end": 1, "label": "b", HALF: 1}]},
    {"prompt": HALF, "completion": "b"},
    {"prompt": "a", "completion": HALF},
    {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_half_of_a_surrogate_pair_is_refused_with_its_row(row: dict[str, Any]) -> None:
    content = (json.dumps(row) + "\n").encode()
    with pytest.raises(InvalidTrainingFile, match=r"row 1 \(line 1\): not JSON \(a string holds half of a surrogate"):
        check_rows(io.BytesIO(content))


def test_a_whole_pair_is_text() -> None:
    content = json.dumps({"text": "\U0001f600", "label": "\U0001f600"}).encode()
    assert b"\\ud83d\\ude00" in content
    assert check_rows(io.BytesIO(content)).labels == 1


def test_the_check_makes_a_pause_after_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(rows, "pause", lambda: pauses.append(1))
    assert check_rows(io.BytesIO(b'{"text": "a", "labels": ["b", "c"]}\n' * 3)).labels == 2
    assert len(pauses) == 3
