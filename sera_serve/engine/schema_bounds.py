"""Bounds on a JSON schema before it is compiled, and a refusal by name of every keyword that would not be enforced.

The schema is the client's. The compiler's time is not linear in it: the intersection of many patterns, or a large
`multipleOf`, takes minutes (docs/decisions.md). So what may be costly is counted here first, in linear time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import unquote

_MAX_DEPTH = 32
_MAX_SUBSCHEMAS = 1000
# Objects, lists and values of the whole schema. Members of an enum that are objects cost most: 9,000 took 0.9 s.
_MAX_VALUES = 5000
_MAX_PATTERNS = 64
# Of patterns that may have to hold at once. The time doubles with each: 16 took 0.4 s, and 30 more than four minutes.
_MAX_INTERSECTED_PATTERNS = 8
_MAX_PATTERN_CHARACTERS = 1024
# The automaton of a multiple of m has m states: 10,000 take 0.2 s to make, and 1,000,000 take 9 s.
_MAX_MULTIPLES = 10_000

_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_PATTERNS = ("pattern", "format")
_PLAIN = frozenset(
    [
        "type",
        "enum",
        "const",
        "$ref",
        "required",
        "multipleOf",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
    ]
)
# They say nothing about which values conform.
_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
        "discriminator",
        "contentMediaType",
        "contentEncoding",
    ]
)
_KNOWN = frozenset((*_ONE, *_LISTS, *_MAPS, *_PATTERNS, *_PLAIN)) | _ANNOTATIONS
_HINTS = {
    "nullable": 'add "null" to type instead',
    "x-guidance": "the server chooses the options of the compiler",
    "$anchor": "refer to the place by its path, such as #/$defs/name",
}


class SchemaRefused(ValueError):
    """A schema is too large, or cannot be enforced. The message names the place and the reason."""


def check_schema(schema: Any) -> None:
    """Check a parsed JSON schema, in time linear in its size.

    Raises:
        SchemaRefused: It is no schema, exceeds a bound, has a keyword that is not enforced, or refers to elsewhere.
    """
    if not isinstance(schema, dict):
        raise SchemaRefused("a schema is a JSON object")
    _check_values(schema)
    nodes = dict[int, dict[str, Any]]()
    patterns = multiples = 0
    intersects = False
    pending: list[tuple[Any, str, int]] = [(schema, "", 0)]
    while pending:
        node, path, depth = pending.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise SchemaRefused(f"{path or 'the schema'} must be a schema: an object, true or false")
        if depth > _MAX_DEPTH:
            raise SchemaRefused(f"subschemas are nested deeper than {_MAX_DEPTH} levels")
        if len(nodes) == _MAX_SUBSCHEMAS:
            raise SchemaRefused(f"it has more than {_MAX_SUBSCHEMAS} subschemas")
        nodes[id(node)] = node
        _check_keywords(node, path)
        found = _patterns(node, path)
        patterns += len(found)
        multiples += _multiples(node, path)
        intersects = intersects or _is_intersection(node)
        pending += [(child, f"{path}/{name}"[-200:], depth + 1) for name, child in _children(node, path)]
    if patterns > _MAX_PATTERNS:
        raise SchemaRefused(f"it has {patterns} patterns and formats; the most is {_MAX_PATTERNS}")
    if intersects and patterns > _MAX_INTERSECTED_PATTERNS:
        raise SchemaRefused(
            f"it combines schemas (by allOf, or by keywords beside $ref, anyOf or oneOf) and has {patterns} patterns "
            f"and formats; the most with combined schemas is {_MAX_INTERSECTED_PATTERNS}"
        )
    if multiples > _MAX_MULTIPLES:
        raise SchemaRefused(f"the digits of multipleOf, as integers, add up to {multiples}; at most {_MAX_MULTIPLES}")
    for node in nodes.values():
        if "$ref" in node:
            _check_reference(schema, node["$ref"], nodes)


def _check_values(schema: dict[str, Any]) -> None:
    """Count everything in the schema, what it gives as values too."""
    pending: list[Any] = [schema]
    count = 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _MAX_VALUES:
            raise SchemaRefused(f"it has more than {_MAX_VALUES} objects, lists and values")
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            # No longer list is needed to exceed the bound.
            pending += value[: _MAX_VALUES + 1]


def _check_keywords(node: dict[str, Any], path: str) -> None:
    for name in node:
        if name not in _KNOWN or (name == "$id" and path):
            hint = _HINTS.get(name)
            reason = f"; {hint}" if hint else ""
            raise SchemaRefused(f"the keyword {name[:64]!r} at {path or '/'} is not supported{reason}")


def _children(node: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name in _ONE:
        if name in node:
            # A list of items is the older form of prefixItems.
            if name == "items" and isinstance(node[name], list):
                yield from ((f"items/{index}", item) for index, item in enumerate(node[name]))
            else:
                yield name, node[name]
    for name in _LISTS:
        items = node.get(name, [])
        if not isinstance(items, list):
            raise SchemaRefused(f"{path}/{name} must be a list of schemas")
        yield from ((f"{name}/{index}", item) for index, item in enumerate(items))
    for name in _MAPS:
        members = node.get(name, {})
        if not isinstance(members, dict):
            raise SchemaRefused(f"{path}/{name} must be an object of schemas")
        yield from ((f"{name}/{key[:64]}", member) for key, member in members.items())


def _patterns(node: dict[str, Any], path: str) -> list[str]:
    """The regular expressions of one subschema; a format is one too."""
    found = [node[name] for name in _PATTERNS if name in node]
    members = node.get("patternProperties", {})
    found += members if isinstance(members, dict) else []
    for text in found:
        if not isinstance(text, str):
            raise SchemaRefused(f"pattern and format at {path or '/'} must be strings")
        if len(text) > _MAX_PATTERN_CHARACTERS:
            raise SchemaRefused(f"a pattern at {path or '/'} has more than {_MAX_PATTERN_CHARACTERS} characters")
    return found


def _multiples(node: dict[str, Any], path: str) -> int:
    """The integer that the digits of `multipleOf` make: 25 for 0.25, and 100 for 100."""
    value = node.get("multipleOf")
    if value is None:
        return 0
    # Python reads 1e999 as infinite.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SchemaRefused(f"multipleOf at {path or '/'} must be a number above 0, and finite")
    try:
        number = Decimal(repr(value)).normalize()
    except InvalidOperation:
        raise SchemaRefused(f"multipleOf at {path or '/'} has too many digits") from None
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    # Before the power is taken: an exponent may be large.
    if number.adjusted() > 15 or exponent < -15:
        raise SchemaRefused(f"multipleOf at {path or '/'} has too many digits")
    return int(number if exponent >= 0 else number.scaleb(-exponent))


def _is_intersection(node: dict[str, Any]) -> bool:
    """Whether several subschemas must hold for one value."""
    asserting = node.keys() - _ANNOTATIONS
    return "allOf" in node or (not asserting.isdisjoint(("$ref", "anyOf", "oneOf")) and len(asserting) > 1)


def _check_reference(schema: dict[str, Any], reference: Any, nodes: dict[int, dict[str, Any]]) -> None:
    """Check that a reference leads to a subschema that was checked."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise SchemaRefused(f"$ref {str(reference)[:64]!r} leads out of the schema; put its target under $defs")
    place: Any = schema
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict):
            place = place.get(name)
        elif isinstance(place, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(place):
            place = place[int(name[:9])]
        else:
            place = None
    if reference not in ("#", "#/") and not reference.startswith("#/"):
        raise SchemaRefused(f"$ref {reference[:64]!r} must be a path, such as #/$defs/name")
    if not isinstance(place, bool) and id(place) not in nodes:
        raise SchemaRefused(f"$ref {reference[:64]!r} leads to no subschema; put its target under $defs")
