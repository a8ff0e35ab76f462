"""Random JSON schemas, each a function of its seed: objects, arrays, every type, bounds, formats, references."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("id", "name", "price", "tags", "kind", "note", "address", "city", "when", "items", "count", "active")
_PATTERNS = ("^[A-Z]{2}-[0-9]{2}$", "^[a-z]+$", "^(red|green|blue)$", "^[0-9]{3}$")
_MEMBERS = ["red", 'say "hi"', 3, 4.5, None, True, "\u00e9t\u00e9", "\u6c34"]
_FORMATS = ("date", "time", "date-time", "ipv4", "uuid", "email")


def random_schema(seed: int, bounded: bool = True) -> dict[str, Any]:
    """A schema with an object at its root.

    Args:
        seed: Chooses it.
        bounded: Whether every string and array has an upper bound, and every number few digits, so that a model's
            text ends.
    """
    rng = random.Random(seed)
    schema = _object(rng, 0, bounded)
    if rng.random() < 0.2:
        schema["$defs"] = {"part": _value(rng, 2, bounded)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
    return schema


def _object(rng: random.Random, depth: int, bounded: bool) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 4 - depth))
    properties = {name: _value(rng, depth + 1, bounded) for name in names}
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int, bounded: bool) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "nullable"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "tuple"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(3, 10)}
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 5000)}
        case "number":
            # A fraction may have any number of digits.
            return {"enum": [0.5, -1.25, 3e3, 7]} if bounded else {"type": "number", "minimum": 0, "maximum": 100.5}
        case "enum":
            return {"enum": rng.sample(_MEMBERS, rng.randint(1, 5))}
        case "const":
            return {"const": rng.choice(["fixed", 42, False, {"a": [1, "b"]}])}
        case "pattern":
            # Without an end, a string may go on.
            return {"type": "string", "pattern": rng.choice([_PATTERNS[0], *_PATTERNS[2:]] if bounded else _PATTERNS)}
        case "format":
            return {"type": "string", "format": rng.choice(("date", "ipv4", "uuid") if bounded else _FORMATS)}
        case "nullable":
            return {"type": ["string", "null"], "maxLength": 8}
        case "object":
            return _object(rng, depth, bounded)
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": _value(rng, depth + 1, bounded),
                "minItems": low,
                "maxItems": low + rng.randint(0, 2),
            }
        case "anyOf":
            return {"anyOf": [_value(rng, depth + 1, bounded) for _ in range(rng.randint(1, 3))]}
        case "tuple":
            return {
                "type": "array",
                "prefixItems": [_value(rng, depth + 1, bounded) for _ in range(2)],
                "items": False,
                "minItems": 2,
            }
        case kind:
            return {"type": kind}
