"""The route of responses over a stub engine: what reaches the engine, what is refused, the objects and the events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from sera_serve.base import FrozenBase
from sera_serve.engine import ConstraintSpec, GenerateParams
from sera_serve.server.openai.response_schemas import ResponseRequest
from support import stub_engine
from support.answers import refused
from support.factories import random_decoder
from support.live_server import wait_until
from support.stub_engine import (
    CRASHES,
    CRASHES_LATER,
    FAILS_LATER,
    FLOODING,
    GONE_LATER,
    LATE,
    SECRET,
    SLOW,
    TEXTS,
    TOO_LONG,
)
from support.stub_engine import StubEngine as Stub

# A message that is a behaviour's name alone selects the behaviour.
TEMPLATE = (
    "{{ tools|length if tools else '' }}{% if messages|length == 1 %}{{ messages[0].content }}{% else %}"
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.id }}={{ c.function.name }}{{ c.function.arguments|tojson }}){% endfor %}{{ m.tool_call_id or '' }}]"
    "{% endfor %}{% endif %}"
)
TOOL: dict[str, Any] = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": None}
LOGPROBS = ["message.output_text.logprobs"]
DEFAULTS = GenerateParams(temperature=1.0, max_new_tokens=None, add_special_tokens=False, adapter="demo/writer")


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    base = random_decoder()
    base.tokenizer.chat_template = TEMPLATE
    return base


@pytest.fixture
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"model": "demo/writer", "input": "hi"} | body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream. Names, numbers and the end of the stream are checked."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        found.append(event)
    return found


def test_every_field_reaches_the_engine(client: httpx.Client, engine: Stub) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 11,
        "stop_token_ids": [4, 5],
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "ignore_eos": True,
        "min_tokens": 2,
        "priority": "high",
        "timeout_s": 30,
        "cache_salt": "salt",
    }
    given = fields | {"stop": "\n", "logit_bias": {"7": -100}, "user": "u", "safety_identifier": "s"}
    given |= {"metadata": {"a": "b"}, "chat_template_kwargs": {"a": 1}, "max_output_tokens": 9}
    given |= {"include": LOGPROBS, "top_logprobs": 4, "store": False, "truncation": "disabled", "n": 1}
    given |= {"instructions": "Be brief.", "text": {"format": {"type": "text"}, "verbosity": "medium"}}
    answer = ask(client, **given)
    assert answer.status_code == 200, answer.text
    expected = replace(DEFAULTS, **fields, stop=["\n"], logit_bias={7: -100.0}, max_new_tokens=9, logprobs=4)
    assert engine.asked == [replace(expected, prompt="[system:Be brief.][user:hi]")]
    assert [principal.tenant for principal in engine.principals] == ["demo"]
    assert answer.json()["metadata"] == {"a": "b"} and answer.json()["max_output_tokens"] == 9
    nulls = dict.fromkeys([*given, "tools", "tool_choice", "stream", "stream_options", "previous_response_id"])
    assert ask(client, **nulls).status_code == 200
    assert engine.asked[1] == replace(DEFAULTS, prompt="hi")


def test_a_conversation_reaches_the_template(client: httpx.Client, engine: Stub) -> None:
    first = ask(client).json()["output"]
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "user", "content": "look", "status": "completed", "id": "msg_1"},
        # What was answered before is sent back as it came.
        *first,
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"x": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "☠"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "seen", "name": "look"},
    ]
    assert ask(client, input=items, instructions="i", tools=[TOOL]).status_code == 200
    text = "".join(TEXTS)
    calls = '(c1=look{"x": 1})(c2=look{})'
    assert engine.asked[1].prompt == (
        f"1[system:i][system:a\nb][user:look][assistant:{text}{calls}][tool:☠c2][tool:seenc1]"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"nonsense": 1}, "nonsense"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": "a"}] * 2049}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a", "name": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a", "image": "x"}]}, "input[0].image"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]}, "input[0]"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"include": LOGPROBS * 17}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": LOGPROBS, "top_logprobs": -1}, "top_logprobs"),
        ({"include": LOGPROBS, "tools": [TOOL]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "regex": "a"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "name": "a"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_object", "strict": True}}}, "text.format.strict"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_it_cannot_have_is_refused_by_name(
    client: httpx.Client, engine: Stub, body: dict[str, Any], param: str
) -> None:
    error = refused(
        ask(client, **body), 400, "unknown_field" if param in ("nonsense", "input[0].image") else "invalid_value"
    )
    assert error["param"] == param
    assert engine.asked == []


def test_refusals_are_the_exceptions_of_the_official_client(official: openai.OpenAI) -> None:
    def create(text: str, **fields: Any) -> Any:
        return official.responses.create(model="demo/writer", input=text, **fields)

    with pytest.raises(openai.RateLimitError) as flooding:
        create(FLOODING)
    assert flooding.value.response.headers["retry-after"] == "9"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as too_long:
            create(TOO_LONG, stream=stream)
        assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.APIStatusError) as late:
        create(LATE)
    assert late.value.status_code == 504
    with pytest.raises(openai.InternalServerError) as crash:
        create(CRASHES)
    assert SECRET not in str(crash.value)
    # No answer is kept.
    with pytest.raises(openai.NotFoundError):
        official.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        official.responses.delete("resp_1")


def test_the_answer_has_exactly_these_fields(client: httpx.Client) -> None:
    answer = ask(client, model="random-llama", temperature=0).json()
    assert abs(answer.pop("created_at") - time.time()) < 60 and abs(answer.pop("completed_at") - time.time()) < 60
    assert answer.pop("id").startswith("resp_")
    (message,) = answer.pop("output")
    assert message.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "".join(TEXTS), "annotations": [], "logprobs": []}
    assert message == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    # Cached tokens of the base would tell one client about another.
    usage = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    assert answer == {
        "object": "response",
        "status": "completed",
        "model": "random-llama",
        "system_fingerprint": "random-llama",
        "error": None,
        "incomplete_details": None,
        "usage": usage,
        "instructions": None,
        "max_output_tokens": None,
        "temperature": 0,
        "top_p": 1.0,
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {},
        "user": None,
        "store": False,
        "background": False,
        "truncation": "disabled",
        "previous_response_id": None,
        "reasoning": None,
    }
    assert ask(client).json()["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert ask(client).json()["system_fingerprint"] == "demo/writer@v3"


def test_the_events_of_a_text(client: httpx.Client) -> None:
    whole = ask(client, include=LOGPROBS, top_logprobs=2).json()
    found = events(ask(client, include=LOGPROBS, top_logprobs=2, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in found]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == begin + ["output_text.delta"] * 3 + end
    deltas = found[4:7]
    assert [event["delta"] for event in deltas] == TEXTS
    assert found[7]["text"] == found[8]["part"]["text"] == "".join(TEXTS)
    last = found[-1]["response"]
    (item,) = last["output"]
    assert {event["item_id"] for event in found[3:9]} == {item["id"]} == {found[9]["item"]["id"]}
    assert item["content"] == whole["output"][0]["content"]
    rows = [row for event in deltas for row in event["logprobs"]]
    assert rows == item["content"][0]["logprobs"] and len(rows) == 3 and len(rows[0]["top_logprobs"]) == 2
    own = {"id", "created_at", "completed_at", "output"}
    assert {key: last[key] for key in last if key not in own} == {key: whole[key] for key in whole if key not in own}
    first = found[0]["response"]
    assert (first["status"], first["output"], first["usage"], first["id"]) == ("in_progress", [], None, last["id"])


def test_an_answer_that_is_cut_is_incomplete(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stub_engine.GenerationResult

    def cut(*fields: Any) -> Any:
        return replace(original(*fields), finish_reason="length")

    monkeypatch.setattr(stub_engine, "GenerationResult", cut)
    answer = ask(client).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete" and answer["completed_at"] is None
    *_, done, last = events(ask(client, stream=True))
    assert done["item"]["status"] == "incomplete" and last["type"] == "response.incomplete"


@pytest.mark.parametrize(
    ("text", "code"),
    [(FAILS_LATER, "engine_unavailable"), (CRASHES_LATER, "internal_error"), (GONE_LATER, "model_not_found")],
)
def test_a_failure_is_the_last_event(client: httpx.Client, text: str, code: str) -> None:
    *_, delta, last = events(ask(client, input=text, stream=True))
    assert (delta["type"], last["type"]) == ("response.output_text.delta", "response.failed")
    assert last["response"]["status"] == "failed" and last["response"]["error"]["code"] == code
    assert SECRET not in json.dumps(last)


def test_an_answer_without_text_is_an_empty_message(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub_engine, "TEXTS", [""])
    assert ask(client).json()["output"][0]["content"][0]["text"] == ""
    kinds = [event["type"] for event in events(ask(client, stream=True))]
    assert kinds[2] == "response.output_item.added" and "response.output_text.delta" not in kinds


@pytest.mark.parametrize("template", ["json", "hermes"])
def test_calls_whole_and_in_a_stream(
    official: openai.OpenAI, base: FrozenBase, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    call = '{"name": "look", "arguments": {"at": "世界"}}'
    pieces = [*call] if template == "json" else ["See:\n<tool_", f"call>{call[:20]}", call[20:], "</tool_call>", "Yes"]
    monkeypatch.setattr(stub_engine, "TEXTS", pieces)
    if template == "hermes":
        monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE + "{# <tool_call> #}")
    fields: dict[str, Any] = {"model": "demo/writer", "input": "hi", "tools": [TOOL]}
    whole = official.responses.create(**fields)
    kinds = ["function_call"] if template == "json" else ["message", "function_call", "message"]
    assert [item.type for item in whole.output] == kinds
    assert whole.output_text == ("" if template == "json" else "See:Yes")
    with official.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == kinds
    assert final.output_text == whole.output_text
    for response in (whole, final):
        (found,) = [item for item in response.output if item.type == "function_call"]
        assert (found.name, json.loads(found.arguments), len(found.call_id)) == ("look", {"at": "世界"}, 9)
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"at": "世界"} and kinds[done.output_index] == "function_call"
    added = [event.output_index for event in events if event.type == "response.output_item.added"]
    assert added == list(range(len(kinds)))


def test_forms_and_forced_calls_are_constraints(client: httpx.Client, engine: Stub) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    text_format = {"type": "json_schema", "name": "x", "schema": schema, "strict": True, "description": "d"}
    answer = ask(client, text={"format": text_format})
    assert answer.json()["text"]["format"] == text_format
    assert ask(client, text={"format": {"type": "json_object"}}).status_code == 200
    assert ask(client, tools=[TOOL], tool_choice="required").status_code == 200
    named = {"type": "function", "name": "look"}
    assert ask(client, tools=[TOOL], tool_choice=named).json()["tool_choice"] == named
    text = json.dumps(schema, separators=(",", ":"))
    assert [params.constraint for params in engine.asked[:2]] == [
        ConstraintSpec("json_schema", text),
        ConstraintSpec("json_object"),
    ]
    for params, most in zip(engine.asked[2:], (None, 1), strict=True):
        assert params.constraint is not None and json.loads(params.constraint.text).get("maxItems") == most


def test_a_client_that_leaves_ends_the_request(client: httpx.Client, engine: Stub) -> None:
    body = {"model": "demo/writer", "input": SLOW, "stream": True}
    with client.stream("POST", "/v1/responses", json=body) as response:
        texts = response.iter_text()
        next(texts)
        assert engine.open_streams == 1
    wait_until(lambda: engine.open_streams == 0)
    assert engine.cancelled == 1


STRANGE: list[Any] = [True, -1, 0, 2**70, 1.5, "", "x", "\0☠", [], [[]], ["x"], {}, {"type": "text"}, {"x": {"y": [0]}}]


def test_a_strange_value_of_any_field_is_served_or_refused(client: httpx.Client) -> None:
    for field in {*ResponseRequest.model_fields, *ResponseRequest.unsupported}:
        for value in STRANGE:
            answer = ask(client, **{field: value})
            assert answer.status_code in (200, 400, 404), (field, value, answer.text)
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "a"}
    for value in STRANGE:
        for item in ({"role": "user", "content": "a"}, call, output):
            for part in ("type", "role", "content", "call_id", "name", "arguments", "output", "id", "status", "phase"):
                answer = ask(client, input=[call, item | {part: value}])
                assert answer.status_code in (200, 400), (item, part, value, answer.text)
        for part in ("type", "name", "parameters", "strict", "description"):
            answer = ask(client, tools=[TOOL | {part: value}], tool_choice="required")
            assert answer.status_code in (200, 400), (part, value, answer.text)
        for part in ("type", "name", "schema", "strict", "description"):
            form = {"type": "json_schema", "name": "a", "schema": {}} | {part: value}
            answer = ask(client, text={"format": form})
            assert answer.status_code in (200, 400), (part, value, answer.text)


def test_half_of_a_surrogate_pair_is_no_text(client: httpx.Client) -> None:
    body = b'{"model": "demo/writer", "input": "hi", "metadata": {"a": "\\ud800"}}'
    answer = client.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, "invalid_json")
