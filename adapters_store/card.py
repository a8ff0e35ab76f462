"""The run card: what an adapter's configuration tells of its training, in short lines for people.

A bundle's training record is written by whoever made the bundle, so it may hold anything. The trainer's own fields get
words; any other field is shown as it is, cut to a bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from adapters_store.format.config import AdapterConfig

MAX_LINES = 32
MAX_TEXT = 600
_DIGEST_SHOWN = 16
_EVALUATIONS_SHOWN = 12
_USES = ("train", "eval", "test")


def run_card(config: AdapterConfig, max_lines: int = MAX_LINES, max_text: int = MAX_TEXT) -> dict[str, str]:
    """Return short texts by what they tell: data, settings, metrics and the like.

    Returns:
        At most `max_lines` entries of at most `max_text` characters, without line breaks; none without a record.
    """
    record = config.training
    card: dict[str, str] = {}
    # The trainer's fields come first, in the order of `_WORDS`.
    for name in sorted(record, key=lambda name: _PLACES.get(name, len(_PLACES))):
        if name in _INSIDE_OTHERS and "chosen_epoch" in record:
            continue
        title, words = _WORDS.get(name, (name.replace("_", " ")[:64], None))
        # A field with another kind of value than the trainer's is shown as it is.
        text = (words(record) if words is not None else None) or _plain(record[name])
        if len(card) == max_lines:
            break
        card[" ".join(title.split())] = _short(text, max_text)
    return card


def _short(text: str, most: int) -> str:
    # What lies far behind the bound need not be split.
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _pairs(name: str, joint: str = " ") -> Callable[[Mapping[str, Any]], str | None]:
    def words(record: Mapping[str, Any]) -> str | None:
        value = record[name]
        if not isinstance(value, dict):
            return None
        return ", ".join(
            f"{key}{joint}{_number(each)}" for key, each in value.items() if each is not None and each is not False
        )

    return words


def _rows(record: Mapping[str, Any]) -> str | None:
    value = record["rows"]
    if not isinstance(value, dict):
        return None
    return ", ".join(f"{_number(value[use])} {use}" for use in sorted(value, key=_use_key) if value[use])


def _digests(record: Mapping[str, Any]) -> str | None:
    value = record["data_sha256"]
    if not isinstance(value, dict):
        return None
    return ", ".join(f"{use} {str(value[use])[:_DIGEST_SHOWN]}" for use in sorted(value, key=_use_key))


def _use_key(use: str) -> tuple[int, str]:
    """Training, evaluation and test rows in this order: a stored record has its keys sorted."""
    return (_USES.index(use) if use in _USES else len(_USES), use)


def _chosen(record: Mapping[str, Any]) -> str | None:
    epochs, step = record.get("epochs"), record.get("chosen_step")
    if not isinstance(record["chosen_epoch"], int) or not isinstance(epochs, int):
        return None
    return f"{record['chosen_epoch']} of {epochs}" + (f", step {step:,}" if isinstance(step, int) else "")


def _evaluations(record: Mapping[str, Any]) -> str | None:
    value = record["evaluations"]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    names = dict.fromkeys(name for entry in value for name in entry if name != "epoch")
    shown = value if len(value) <= _EVALUATIONS_SHOWN else value[: _EVALUATIONS_SHOWN - 1]
    more = " …" if len(shown) < len(value) else ""
    return "; ".join(f"{name} {' '.join(_number(entry.get(name)) for entry in shown)}{more}" for name in names)


def _notes(record: Mapping[str, Any]) -> str | None:
    value = record["notes"]
    return "; ".join(map(_plain, value)) or "none" if isinstance(value, list) else None


# The trainer's fields, in the order of the card.
_WORDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str | None] | None]] = {
    "description": ("description", None),
    "init_from": ("goes on from", _pairs("init_from")),
    "rows": ("rows", _rows),
    "data_sha256": ("sha256 of the data", _digests),
    "notes": ("changes to the data", _notes),
    "settings": ("settings", _pairs("settings", "=")),
    "learning_rate": ("learning rate", lambda record: _number(record["learning_rate"])),
    "trained_tokens": ("trained tokens", lambda record: _number(record["trained_tokens"])),
    "chosen_epoch": ("chosen epoch", _chosen),
    "metrics": ("metrics", _pairs("metrics")),
    "evaluations": ("metrics by epoch", _evaluations),
}
_PLACES = {name: place for place, name in enumerate(_WORDS)}
_INSIDE_OTHERS = ("epochs", "chosen_step")
