"""Reading of options that give values by module: mappings from patterns of module names to values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from adapters_store import MOST_RANK

PATTERN_OPTIONS = ("rank_pattern", "split_pattern", "alpha_pattern")
_MOST_PATTERNS = 1000
_MOST_CHARACTERS = 256

Pattern = tuple[tuple[str, float], ...]
"""Pairs of a module-name pattern and a value, in the order in which they were written."""


def parse_pattern(option: str, value: Any) -> Pattern | None:
    """Read the value of a pattern option.

    Args:
        option: Name of the option. `alpha_pattern` takes positive numbers, the others positive integers.
        value: A mapping, pairs, or text such as `q_proj=8,layers.0.*.v_proj=4`.

    Raises:
        ValueError: The value is no such mapping. The message names the entry.
    """
    if value is None:
        return None
    number = _positive_number if option == "alpha_pattern" else _positive_integer
    pairs: list[tuple[str, float]] = []
    for name, given in _entries(value):
        if not isinstance(name, str) or not name.strip() or len(name) > _MOST_CHARACTERS:
            raise ValueError(f"{name!r} is no module name or pattern; write q_proj=8,layers.0.*.v_proj=4")
        if name.strip() in (known for known, _ in pairs):
            raise ValueError(f"pattern {name.strip()!r} is there twice; keep one")
        pairs.append((name.strip(), number(name.strip(), given)))
    if not pairs:
        raise ValueError("no pattern is given; write q_proj=8,layers.0.*.v_proj=4, or leave the option out")
    if len(pairs) > _MOST_PATTERNS:
        raise ValueError(f"{len(pairs)} patterns are given; the limit is {_MOST_PATTERNS}")
    return tuple(pairs)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        for part in parts:
            if part.count("=") != 1:
                raise ValueError(f"{part!r} is not of the form pattern=value; write q_proj=8,layers.0.*.v_proj=4")
        return [(name, number) for name, _, number in (part.partition("=") for part in parts)]
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return [(name, number) for name, number in value]
    raise ValueError("a mapping is needed, such as `q_proj: 8` or q_proj=8,layers.0.*.v_proj=4")


def _positive_integer(name: str, value: Any) -> float:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if type(number) is not int or not 1 <= number <= MOST_RANK:
        raise ValueError(f"{name}={value} needs an integer from 1 to {MOST_RANK}")
    return number


def _positive_number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={value} needs a positive number")
    return number
