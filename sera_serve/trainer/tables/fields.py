"""The values of one row: texts, labels and the turns of a chat. Each fault is added to the file's problems."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any

from sera_serve.trainer.tables.faults import Problems, Row

LONGEST_LABEL = 512
_ROLES = ("system", "user", "assistant", "tool")
# The same roles as others call them.
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
# Whole numbers up to here are exact in float64.
_EXACT = 2.0**53
_WHOLE = re.compile(r"-?[0-9]{1,20}(\.0{1,20})?")


def text_of(row: Row, column: str, problems: Problems) -> str:
    """Return the text of a column. A text that is missing, no string or blank is added to `problems`."""
    value = string_of(row, column, problems)
    if value is not None and not value.strip():
        problems.add(row, f"{column} is empty; fill it in or delete the row")
    return value or ""


def label_of(row: Row, column: str, problems: Problems) -> str:
    """Return the label of a column as text. A value that is no label is added to `problems`."""
    value = row.values.get(column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # pandas writes whole numbers as 1.0 where a column has gaps.
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    # SQL's NUMERIC in a Parquet file.
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, Decimal):
        problems.add(row, f"{column} is {value} of a decimal column; cast it to int or text")
        return ""
    if isinstance(value, float) and value.is_integer():
        problems.add(row, f"{column} is {value:g}, too large a number to be read exactly; write it in quotes, as text")
        return ""
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} {value!r}"
        problems.add(row, f"{column} is {kind}; a label is a name or a whole number")
        return ""
    label = value.strip()
    if not label:
        problems.add(row, f"{column} is empty; fill it in or delete the row")
    elif len(label) > LONGEST_LABEL:
        problems.add(row, f"{column} has {len(label)} characters, at most {LONGEST_LABEL} are allowed; is it a text?")
    return label


def whole_number_names(labels: Iterable[str], known: Collection[str] | None = None) -> dict[str, str]:
    """Find labels that are whole numbers with a needless `.0`, as pandas writes them to CSV, and return their names.

    Args:
        labels: The labels of the rows.
        known: The labels of the adapter: a label that is one of them keeps its name. None where the rows give the
            labels: then no label gets another name unless all are whole numbers, because `1.0` is a name of its own
            beside `1.5` or `other`.

    Returns:
        The new name by label, for the labels that get one.
    """
    pointed = {label: label.partition(".")[0] for label in set(labels) if _WHOLE.fullmatch(label) and "." in label}
    if known is not None:
        return {label: name for label, name in pointed.items() if label not in known and name in known}
    return pointed if all(_WHOLE.fullmatch(label) for label in labels) else {}


def string_of(row: Row, column: str, problems: Problems) -> str | None:
    """Return the string of a column, which may be empty. Anything else is added to `problems`."""
    value = row.values.get(column)
    if isinstance(value, str):
        return value
    kind = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
    problems.add(row, f"{column} is {kind}; write a string or delete the row")
    return None


def messages_of(row: Row, column: str, problems: Problems) -> tuple[dict[str, str], ...]:
    """Return the turns of a column, with the keys `role` and `content` and the roles of this project.

    Turns may have the keys `from` and `value`, and other people's names of roles (human, gpt and the like). A chat that
    cannot be learned from is added to `problems`.
    """
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        problems.add(row, f'{column} must be a list such as [{{"role": "user", "content": "..."}}, ...]')
        return ()
    messages = [_message(row, f"{column}[{i}]", turn, problems) for i, turn in enumerate(value)]
    # A turn with a fault, which is told, may be the assistant's.
    if all(messages) and not any(message["role"] == "assistant" for message in messages):
        problems.add(
            row, f"{column} has no turn of the assistant, so there is nothing to learn; add one or delete the row"
        )
    return tuple(messages)


def _message(row: Row, where: str, turn: Any, problems: Problems) -> dict[str, str]:
    # Arrow gives every turn of a column the same keys, and null where a turn has none.
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    if set(given) not in _MESSAGE_KEYS:
        more = sorted(set(given) - {"role", "content", "from", "value"})
        hint = f"; {str(more[0])[:64]!r} is not used: delete it" if more else ""
        problems.add(row, f'{where} must have exactly the keys "role" and "content" (or "from" and "value"){hint}')
        return {}
    role, content = (given["role"], given["content"]) if "role" in given else (given["from"], given["value"])
    name = _OTHER_ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if name not in _ROLES:
        problems.add(row, f"{where} has the role {role!r}; use one of {', '.join(_ROLES)}")
    if not isinstance(content, str) or not content.strip():
        problems.add(row, f"{where} has no text as its content; fill it in or delete the turn")
    return {"role": name, "content": content}
