"""JSON with one meaning and bounded nesting, for headers, configurations and request bodies alike."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NoReturn

import numpy as np
from pydantic_core import PydanticSerializationError, to_json

from adapters_store.errors import InvalidBundle

MAX_DEPTH = 32
HALF_PAIR = "a string holds half of a surrogate pair"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# What a character outside of strings adds to the depth of nesting.
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def parse_json(data: str | bytes, max_members: int = 250_000, max_items: int | None = None) -> Any:
    """Parse JSON that has one meaning: UTF-8, no repeated key, no NaN, no lone surrogate, at most `MAX_DEPTH` levels.

    The standard library's parser holds the interpreter's lock for the whole time. So the time must be short: it is
    linear in the length, some tens of milliseconds for a MiB of any content (docs/decisions.md).

    Args:
        data: The text.
        max_members: The most lists, objects and keys. They cost most, because the garbage collector visits new
            containers again and again.
        max_items: The most items of all lists and objects together, about; None is any number. 250,000 floating-point
            numbers in a MiB take 60 ms, of which nothing else uses the interpreter.

    Raises:
        json.JSONDecodeError: The data is anything else. Its message names the fault.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        if isinstance(data, str):
            data.encode("utf-8")
        _check_structure(text, max_members, max_items)
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        if has_lone_surrogate(text, value):
            raise json.JSONDecodeError(HALF_PAIR, "", 0)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("not UTF-8", "", error.start) from error
    except UnicodeEncodeError as error:
        raise json.JSONDecodeError(HALF_PAIR, "", 0) from error
    except ValueError as error:
        message = str(error)
        if message.startswith("Exceeds the limit"):
            # The interpreter's own bound, in its own words, which are about its settings.
            message = f"an integer of more than {sys.get_int_max_str_digits()} digits"
        raise json.JSONDecodeError(message, "", 0) from error
    return value


def parse_json_object(data: str | bytes, what: str, error: type[InvalidBundle], param: str) -> dict[str, Any]:
    """`parse_json` of an object; anything else raises `error`, whose message calls the text `what`."""
    try:
        value = parse_json(data)
    except json.JSONDecodeError as fault:
        raise error(f"{what} is not valid JSON: {fault}", param=param) from fault
    if not isinstance(value, dict):
        raise error(f"{what} must be a JSON object", param=param)
    return value


def has_lone_surrogate(text: str, value: Any) -> bool:
    """Tell whether a string of `value`, which was parsed from `text`, holds half of a surrogate pair.

    It is legal in JSON's escapes. No text contains one, and it cannot be written back.
    """
    if not _SURROGATE_ESCAPE.search(text):
        return False
    try:
        to_json(value)
    except PydanticSerializationError:
        return True
    return False


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space; NaN is refused by `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_structure(text: str, max_members: int, max_items: int | None) -> None:
    """Bound what the parser would build, by counts that take next to no time; raises ValueError."""
    opened = text.count("[") + text.count("{")
    few = max_items is None or text.count(",") <= max_items
    if few and opened <= MAX_DEPTH and opened + text.count(":") <= max_members:
        return
    # Brackets and colons within strings do not count. Without escapes, every other quote begins a string. With numpy:
    # pieces of text would take 45 ms for a MiB of short strings, of which nothing else uses the interpreter.
    plain = text.replace("\\\\", "").replace('\\"', "").encode("utf-8", "replace")
    characters = np.frombuffer(plain, np.uint8)
    quotes = np.cumsum(characters == ord('"'), dtype=np.uint8)
    outside = characters[quotes & 1 == 0]
    if sum(np.count_nonzero(outside == ord(mark)) for mark in "[{:") > max_members:
        raise ValueError(f"more than {max_members} lists, objects and keys")
    if max_items is not None and np.count_nonzero(outside == ord(",")) > max_items:
        raise ValueError(f"more than {max_items} items in lists and objects")
    if np.cumsum(_STEPS[outside], dtype=np.int32).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:64]!r} appears twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
