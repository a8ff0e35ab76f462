"""Generated texts with marked spans: people and places in templates."""

from __future__ import annotations

import random
from typing import Any

PEOPLE = ["Ann", "Bob Lee", "Mia", "Tom Ray", "Zoe"]
PLACES = ["Rome", "New Delhi", "Oslo", "Lima", "Cape Town"]
TEMPLATES = ["{person} lives in {place}.", "In {place}, {person} met {person}.", "{place} is far.", "It rains."]


def marked(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows `{"text", "spans": [{"start", "end", "label"}]}`."""
    draw = random.Random(seed)
    return [_row(draw.choice(TEMPLATES), draw) for _ in range(count)]


def _row(template: str, draw: random.Random) -> dict[str, Any]:
    text, spans = "", []
    rest = template
    while "{" in rest:
        before, _, rest = rest.partition("{")
        kind, _, rest = rest.partition("}")
        text += before
        name = draw.choice(PEOPLE if kind == "person" else PLACES)
        spans.append({"start": len(text), "end": len(text) + len(name), "label": kind})
        text += name
    return {"text": text + rest, "spans": spans}


def as_words(row: dict[str, Any]) -> dict[str, Any]:
    """The same row as words and their tags."""
    words, tags, place = [], [], 0
    for word in row["text"].split(" "):
        start = place
        place += len(word) + 1
        inside = [span for span in row["spans"] if span["start"] <= start < span["end"]]
        words.append(word)
        tags.append(f"{'B' if inside[0]['start'] == start else 'I'}-{inside[0]['label']}" if inside else "O")
    return {"tokens": words, "tags": tags}
