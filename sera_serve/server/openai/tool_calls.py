"""Finds the calls of tools in what a model writes, whole or piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters_store import parse_json
from sera_serve.base.chat import CallFormat
from sera_serve.engine.constraint import ConstraintKind, ConstraintSpec
from sera_serve.errors import InvalidRequest
from sera_serve.random_bytes import random_hex
from sera_serve.server.openai.chat_schemas import Function, ToolUse

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKERS = ("[TOOL_CALLS]", "<|python_tag|>")
_KEYS = ('"name"', '"type"', '"function"', '"arguments"', '"parameters"', '"id"')
_BEFORE_CALL = re.compile(r"\s*[\[,]\s*")
_BETWEEN = re.compile(r"[\s;,]*")


@dataclass(frozen=True)
class Call:
    """One call of a tool.

    Attributes:
        id: Nine letters and digits. Templates of Mistral's models accept no other form.
        name: The function.
        arguments: The JSON of an object.
    """

    id: str
    name: str
    arguments: str


class ToolCallParser:
    """Splits a text into its content and its calls. Pieces of the text give what the whole text gives.

    Text that looks like a call and is none is content. Space between content and a call belongs to neither.
    """

    def __init__(
        self, call_format: CallFormat, names: Sequence[str], most_calls: int | None = None, is_forced: bool = False
    ) -> None:
        """Begin a text.

        Args:
            call_format: How the model writes calls.
            names: The functions that there are. JSON alone is a call only if it names one of them.
            most_calls: Further calls are left out. None is no limit.
            is_forced: The text is a list of calls in JSON, whatever the format. Where it is cut, what follows its last
                whole call is left out; without a whole call, the text is content.
        """
        self._hermes = call_format == "hermes" and not is_forced
        self._is_forced = is_forced
        self._names = frozenset(names)
        self._most = most_calls
        self._held = ""
        self._space = ""
        self._decided = False
        self.calls: list[Call] = []

    def push(self, text: str) -> list[str | Call]:
        """Take a piece of the text. Returns the content and the calls that are certain now."""
        self._held += text
        return self._push_hermes() if self._hermes else self._push_json()

    def end(self) -> list[str | Call]:
        """Return the rest at the end of the text."""
        held, self._held = self._held, ""
        if self._hermes:
            inside = held.startswith(_OPEN)
            call = _one_call(held.removeprefix(_OPEN)) if inside else None
            found = self._content(held) if call is None else self._call(call)
        else:
            calls = None if self._decided else _all_calls(held, self._names)
            if calls is None and self._is_forced:
                calls = _whole_calls(held)
            found = self._content(held) if calls is None else [each for call in calls for each in self._call(call)]
        if self._space and not self.calls:
            found.append(self._space)
        return found

    def _push_hermes(self) -> list[str | Call]:
        found: list[str | Call] = []
        # The rest is cut off once, at the end. Where it was cut off at each call, a text of 32,000 calls took the event
        # loop 1.7 s in place of 0.3.
        held, at = self._held, 0
        while (begin := held.find(_OPEN, at)) >= 0:
            found += self._content(held[at:begin])
            at = begin
            end = held.find(_CLOSE, begin)
            if end < 0:
                break
            at = end + len(_CLOSE)
            call = _one_call(held[begin + len(_OPEN) : end])
            found += self._content(held[begin:at]) if call is None else self._call(call)
        else:
            certain = len(held) - _possible_start(held[at:], _OPEN)
            found += self._content(held[at:certain])
            at = certain
        self._held = held[at:]
        return found

    def _push_json(self) -> list[str | Call]:
        if not self._decided:
            if _may_be_calls(self._held):
                return []
            self._decided = True
        held, self._held = self._held, ""
        return self._content(held)

    def _content(self, text: str) -> list[str | Call]:
        kept = text.rstrip()
        if not kept:
            self._space += text
            return []
        content = self._space + kept
        self._space = text[len(kept) :]
        return [content]

    def _call(self, call: Call) -> list[str | Call]:
        self._space = ""
        if self._most is not None and len(self.calls) >= self._most:
            return []
        self.calls.append(call)
        return [call]


def parser_of_calls(use: ToolUse, call_format: CallFormat) -> ToolCallParser:
    """Return the parser of one answer to a request that has tools; arguments as `constraint_of_calls`."""
    names = [function.name for function in use.functions]
    return ToolCallParser(call_format, names, 1 if use.parallel_tool_calls is False else None, use.is_forced)


def constraint_of_calls(use: ToolUse, call_format: CallFormat) -> ConstraintSpec | None:
    """Return the constraint of an answer that may have calls, or None for any text.

    Args:
        use: What the request says of tools.
        call_format: How the model writes calls.

    Raises:
        InvalidRequest: As `_schema_of_call`.
    """
    if use.is_forced:
        return forced_calls(use.functions, use.forced_function, use.parallel_tool_calls is not False)
    # Where calls are JSON alone, nothing tells their beginning from that of another text.
    is_strict = use.has_tools and call_format == "hermes" and any(function.strict for function in use.functions)
    return strict_calls(use.functions) if is_strict else None


def strict_calls(functions: Sequence[Function]) -> ConstraintSpec:
    """Return the constraint of a text in which each `<tool_call>` begins a call of a function.

    The arguments conform to the function's schema where it is strict, and are else any object. There is at least one
    function. Raises InvalidRequest as `_schema_of_call`.
    """
    call, definitions = _schema_of_call(functions, strict_alone=True)
    return _spec("tool_calls", {**call, **definitions})


def forced_calls(functions: Sequence[Function], name: str | None, parallel: bool) -> ConstraintSpec:
    """Return the constraint of an answer that is nothing but calls: a JSON list of `name` and `arguments`.

    Args:
        functions: What may be called.
        name: The one function that must be called, or None for any.
        parallel: Whether the answer may have several calls.

    Raises:
        InvalidRequest: As `_schema_of_call`.
    """
    called = [function for function in functions if name in (None, function.name)]
    call, definitions = _schema_of_call(called)
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": call, **definitions}
    if name is not None or not parallel:
        whole["maxItems"] = 1
    return _spec("json_schema", whole)


def _spec(kind: ConstraintKind, schema: dict[str, Any]) -> ConstraintSpec:
    return ConstraintSpec(kind, json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def _schema_of_call(
    functions: Sequence[Function], strict_alone: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the schema of a call of one of the functions, and the definitions that belong to the schema's root.

    Args:
        functions: What may be called.
        strict_alone: Arguments of functions that are not strict may be any object.

    Raises:
        InvalidRequest: Two functions define different schemas under one name, or the definitions are no object.
    """
    definitions: dict[str, dict[str, Any]] = {}
    items: list[dict[str, Any]] = []
    for function in functions:
        parameters = {"type": "object"} if strict_alone and not function.strict else function.arguments_schema()
        # References lead from the root of the whole schema.
        for key in ("$defs", "definitions"):
            own = parameters.pop(key, None) or {}
            if not isinstance(own, dict):
                raise InvalidRequest(f"{key} of function {function.name!r} must be an object", param="tools")
            for label, schema in own.items():
                if definitions.setdefault(key, {}).setdefault(label, schema) != schema:
                    raise InvalidRequest(
                        f"two functions define {label[:64]!r} differently in {key}; give them different names",
                        param="tools",
                    )
        items.append(
            {
                "type": "object",
                # In this order: the name first.
                "properties": {"name": {"const": function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return (items[0] if len(items) == 1 else {"anyOf": items}), definitions


def _possible_start(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _may_be_calls(text: str) -> bool:
    """Whether a text that begins so may be calls alone."""
    start = text.lstrip()
    for marker in _MARKERS:
        if start.startswith(marker) or marker.startswith(start):
            return True
    if start[0] not in "[{":
        return False
    inner = start.lstrip("[{ \t\r\n")
    return any(key.startswith(inner[: len(key)]) for key in _KEYS)


def _all_calls(text: str, names: frozenset[str]) -> list[Call] | None:
    """The calls that a text consists of, or None if the text is anything else."""
    rest = text.strip()
    marked = False
    for marker in _MARKERS:
        if rest.startswith(marker):
            rest, marked = rest.removeprefix(marker), True
    calls: list[Call] = []
    decoder = json.JSONDecoder()
    at = _BETWEEN.match(rest).end()  # type: ignore[union-attr]
    while at < len(rest):
        begin = at
        try:
            # Where the value ends. What it is must have one meaning, and must be able to be written back.
            _, at = decoder.raw_decode(rest, begin)
            value = parse_json(rest[begin:at])
        except (ValueError, RecursionError):
            return None
        for each in value if isinstance(value, list) else [value]:
            call = _call_of(each)
            if call is None or (not marked and call.name not in names):
                return None
            calls.append(call)
        at = _BETWEEN.match(rest, at).end()  # type: ignore[union-attr]
    return calls or None


def _whole_calls(text: str) -> list[Call] | None:
    """The whole calls at the beginning of a list that is cut, or None if there are none."""
    calls: list[Call] = []
    decoder = json.JSONDecoder()
    at = _BEFORE_CALL.match(text)
    while at is not None:
        try:
            _, end = decoder.raw_decode(text, at.end())
        except (ValueError, RecursionError):
            break
        call = _one_call(text[at.end() : end])
        if call is None:
            break
        calls.append(call)
        at = _BEFORE_CALL.match(text, end)
    return calls or None


def _one_call(text: str) -> Call | None:
    try:
        return _call_of(parse_json(text))
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        # A number such as 1e999 is infinite, and JSON has no form of it.
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
    return Call(random_hex(5)[:9], name, written)
