"""Calls of tools in what models write: whole, and cut into pieces anywhere."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_serve.base.chat import CallFormat
from sera_serve.errors import InvalidRequest
from sera_serve.server.openai.chat_schemas import Function
from sera_serve.server.openai.tool_calls import Call, ToolCallParser, forced_calls, strict_calls

NAMES = ["weather", "time"]
WEATHER = '{"name": "weather", "arguments": {"city": "Zürich", "n": [1, {"a": "</x>"}]}}'
TIME = '{"name": "time", "parameters": {}}'
FOUND = [("weather", {"city": "Zürich", "n": [1, {"a": "</x>"}]}), ("time", {})]
TEXTS: list[tuple[CallFormat, str, str, list[tuple[str, dict[str, object]]]]] = [
    ("hermes", "Hello, world. \n", "Hello, world. \n", []),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", FOUND[:1]),
    (
        "hermes",
        f"Let me see.\n\n<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{TIME}</tool_call>\n",
        "Let me see.",
        FOUND,
    ),
    ("hermes", f"<tool_call>{WEATHER}", "", FOUND[:1]),
    ("hermes", "<tool_call>not JSON</tool_call> so", "<tool_call>not JSON</tool_call> so", []),
    ("hermes", "<tool_call>{", "<tool_call>{", []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", '<tool_call>{"name": "t", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("t", {"a": 1})]),
    ("json", WEATHER, "", FOUND[:1]),
    ("json", f"\n[{WEATHER}, {TIME}]\n", "", FOUND),
    ("json", f"{WEATHER}; {TIME}", "", FOUND),
    ("json", f"[TOOL_CALLS][{WEATHER}]", "", FOUND[:1]),
    ("json", f"<|python_tag|>{TIME}", "", FOUND[1:]),
    ("json", '{"type": "function", "function": ' + TIME + "}", "", FOUND[1:]),
    ("json", '{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ("json", '{"answer": 42}', '{"answer": 42}', []),
    ("json", '{"name": "weather", "arguments"', '{"name": "weather", "arguments"', []),
    ("json", "[1, 2]", "[1, 2]", []),
    ("json", "It is warm. ", "It is warm. ", []),
    ("json", "  \n", "  \n", []),
    ("json", "", "", []),
    ("json", "[" * 50_000, "[" * 50_000, []),
]


def parse(form: CallFormat, pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolCallParser(form, NAMES, most)
    found = [part for piece in pieces for part in parser.push(piece)] + parser.end()
    calls = [part for part in found if isinstance(part, Call)]
    assert calls == parser.calls
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    content = "".join(part for part in found if isinstance(part, str))
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("form", "text", "content", "calls"), TEXTS)
def test_content_and_calls_of_a_whole_text(
    form: CallFormat, text: str, content: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    assert parse(form, [text]) == (content, calls)
    if len(text) < 1000:
        assert parse(form, list(text)) == (content, calls)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_pieces_give_what_the_whole_gives(data: st.DataObject) -> None:
    form: CallFormat = data.draw(st.sampled_from(["hermes", "json"]))
    parts = [
        "<tool_call>",
        "</tool_call>",
        WEATHER,
        TIME,
        "<",
        "tool_call>",
        "[TOOL_CALLS]",
        "[",
        "{",
        " \n",
        "text",
        ";",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(form, pieces) == parse(form, [text])


def test_a_whole_text_takes_no_longer_than_its_pieces() -> None:
    pieces = [f"<tool_call>{TIME}</tool_call>"] * 24_000
    spent = []
    for texts in (pieces, ["".join(pieces)]):
        began = time.process_time()
        assert len(parse("hermes", texts)[1]) == len(pieces)
        spent.append(time.process_time() - began)
    assert spent[1] < 2 * spent[0]


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "-Infinity", "1e999", '{"a": 1, "a": 2}'])
def test_a_call_that_cannot_be_written_back_is_content(value: str) -> None:
    call = f'{{"name": "weather", "arguments": {{"city": {value}}}}}'
    inner = f'{{"name": "weather", "arguments": {json.dumps(f"""{{"city": {value}}}""")}}}'
    for text in (call, inner):
        assert parse("json", [text]) == (text, [])
        assert parse("hermes", [f"<tool_call>{text}</tool_call>"]) == (f"<tool_call>{text}</tool_call>", [])
    named = r'{"name": "\ud800", "arguments": {}}'
    assert parse("hermes", [f"<tool_call>{named}</tool_call>"]) == (f"<tool_call>{named}</tool_call>", [])


def test_content_is_given_as_soon_as_it_cannot_be_a_call() -> None:
    hermes = ToolCallParser("hermes", NAMES)
    assert hermes.push("Hello <to") == ["Hello"]
    assert hermes.push("p>") == [" <top>"]
    plain = ToolCallParser("json", NAMES)
    assert plain.push("  ") == []
    assert plain.push("[no") == ["  [no"]
    assert plain.push("w]") == ["w]"]


def test_further_calls_are_left_out() -> None:
    assert parse("json", [f"[{WEATHER}, {TIME}]"], most=1) == ("", FOUND[:1])


def test_forced_calls_that_are_cut_give_the_whole_ones() -> None:
    for cut, found in ((2, FOUND[:1]), (len(TIME) - 1, FOUND[:1]), (len(TIME), FOUND)):
        text = f"[{WEATHER}, {TIME}"[: len(WEATHER) + 3 + cut]
        for pieces in ([text], [*text]):
            # Whatever the template writes, a forced answer is JSON alone.
            parser = ToolCallParser("hermes", NAMES, is_forced=True)
            ended = [part for piece in pieces for part in parser.push(piece)] + parser.end()
            assert [(part.name, json.loads(part.arguments)) for part in ended if isinstance(part, Call)] == found
            assert len(ended) == len(found)
        assert parse("json", [text]) == (text, [])
    parser = ToolCallParser("json", NAMES, most_calls=1, is_forced=True)
    assert len([*parser.push(f"[{WEATHER}, {TIME},"), *parser.end()]) == 1
    parser = ToolCallParser("json", NAMES, is_forced=True)
    assert [*parser.push(f"[{WEATHER[:-1]}"), *parser.end()] == [f"[{WEATHER[:-1]}"]


def tool(name: str, **parameters: object) -> Function:
    return Function.model_validate({"name": name, "parameters": parameters})


def test_a_function_without_parameters_takes_no_arguments() -> None:
    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    for function in ({"name": "ping"}, {"name": "ping", "parameters": None}):
        assert (
            json.loads(forced_calls([Function.model_validate(function)], None, True).text)["items"]["properties"][
                "arguments"
            ]
            == closed
        )


def test_forced_calls_are_a_schema_of_the_functions() -> None:
    city = {"type": "string"}
    tools = [
        tool("a", type="object", properties={"x": {"$ref": "#/$defs/City"}}, **{"$defs": {"City": city}}),
        tool("b"),
    ]
    both = json.loads(forced_calls(tools, None, True).text)
    assert both["$defs"] == {"City": city} and "maxItems" not in both
    assert [item["properties"]["name"]["const"] for item in both["items"]["anyOf"]] == ["a", "b"]
    assert "$defs" not in both["items"]["anyOf"][0]["properties"]["arguments"]
    assert list(both["items"]["anyOf"][0]["properties"]) == ["name", "arguments"]
    named = json.loads(forced_calls(tools, "b", True).text)
    assert (named["maxItems"], named["items"]["properties"]["name"]["const"]) == (1, "b")
    assert json.loads(forced_calls(tools, None, False).text)["maxItems"] == 1
    other = tool("c", **{"$defs": {"City": {"type": "integer"}}})
    with pytest.raises(InvalidRequest, match="City"):
        forced_calls([*tools, other], None, True)


def test_strict_calls_are_a_schema_of_one_call() -> None:
    city = {"$defs": {"City": {"type": "string"}}}
    loose, strict = tool("a", type="object", required=["x"], **city), tool("b", type="object", required=["y"], **city)
    strict = strict.model_copy(update={"strict": True})
    spec = strict_calls([loose, strict])
    schema = json.loads(spec.text)
    assert (spec.kind, schema["$defs"]) == ("tool_calls", city["$defs"])
    arguments = [item["properties"]["arguments"] for item in schema["anyOf"]]
    assert arguments == [{"type": "object"}, {"type": "object", "required": ["y"]}]
    assert json.loads(strict_calls([strict]).text)["properties"]["name"] == {"const": "b"}
