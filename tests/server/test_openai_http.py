"""OpenAI's routes over a stub engine: what reaches the engine, what is refused, and how failures look."""

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
from sera_serve.config import ServeSettings
from sera_serve.engine import ConstraintSpec, GenerateParams, TokenLogprobs
from sera_serve.server import build_app
from sera_serve.server.openai.chat_schemas import ChatRequest
from sera_serve.server.openai.completion_schemas import CompletionRequest
from sera_serve.server.openai.tokens import DetokenizeRequest, TokenizeRequest
from support import stub_engine
from support.answers import events, refused
from support.factories import random_decoder
from support.live_server import live_server, wait_until
from support.stub_engine import (
    CRASHES,
    FAILS_LATER,
    FLOODING,
    LATE,
    OTHERS_SHED,
    OVERLOADED,
    SECRET,
    SLOW,
    TEXTS,
    TOO_LONG,
    StubEngine,
)

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ tools|length if tools else '' }}{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    base = random_decoder()
    base.tokenizer.chat_template = TEMPLATE
    return base


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "demo/writer"} | body)


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "demo/writer", "messages": CHAT} | body)


FIELDS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 3,
    "min_p": 0.125,
    "seed": 11,
    "stop_token_ids": [4, 5],
    "n": 2,
    "presence_penalty": 1,
    "frequency_penalty": -1.5,
    "repetition_penalty": 1.25,
    "ignore_eos": True,
    "min_tokens": 2,
    "priority": "high",
    "timeout_s": 30,
    "cache_salt": "s" * 64,
}
GIVEN = FIELDS | {"stop": "\n", "logit_bias": {"7": -100, "12": 2.5}, "user": "u", "metadata": {"a": "b"}}
REACHED = FIELDS | {"stop": ["\n"], "logit_bias": {7: -100.0, 12: 2.5}}
DEFAULTS = GenerateParams(temperature=1.0, max_new_tokens=None)


def test_every_field_of_a_completion_reaches_the_engine(client: httpx.Client, engine: StubEngine) -> None:
    response = complete(client, prompt="hello", max_tokens=9, logprobs=2, best_of=2, **GIVEN)
    assert response.status_code == 200, response.text
    expected = replace(DEFAULTS, adapter="demo/writer", prompt="hello", max_new_tokens=9, logprobs=2, **REACHED)
    assert engine.asked == [expected] * 2
    assert all(principal.tenant == "demo" for principal in engine.principals)


def test_every_field_of_a_chat_reaches_the_engine(client: httpx.Client, engine: StubEngine) -> None:
    fields = GIVEN | {"top_k": -1, "safety_identifier": "x", "chat_template_kwargs": {"a": [1]}}
    response = chat(client, max_completion_tokens=9, logprobs=True, top_logprobs=4, **fields)
    assert response.status_code == 200, response.text
    expected = replace(DEFAULTS, **(REACHED | {"top_k": 0}), max_new_tokens=9, logprobs=4)
    expected = replace(expected, adapter="demo/writer", prompt="[user:hi]", add_special_tokens=False)
    assert engine.asked == [expected] * 2


def test_nulls_and_values_that_ask_for_nothing_are_the_defaults(client: httpx.Client, engine: StubEngine) -> None:
    nulls = dict.fromkeys([*GIVEN, "stream", "stream_options", "max_tokens", "logprobs"])
    assert complete(client, prompt="hello", echo=False, suffix=None, **nulls).status_code == 200
    assert engine.asked.pop() == replace(DEFAULTS, adapter="demo/writer", prompt="hello")
    neutral = {"store": False, "modalities": ["text"], "service_tier": "auto", "audio": None, "tools": None}
    assert chat(client, **nulls, **neutral).status_code == 200
    chat_defaults = replace(DEFAULTS, prompt="[user:hi]", add_special_tokens=False)
    assert engine.asked.pop() == replace(chat_defaults, adapter="demo/writer")
    assert chat(client, logprobs=False, top_logprobs=0).status_code == 200
    assert engine.asked.pop() == replace(chat_defaults, adapter="demo/writer")
    assert chat(client, model="random-llama").status_code == 200
    assert engine.asked.pop() == chat_defaults
    assert chat(client, response_format={"type": "json_object"}).status_code == 200
    assert engine.asked.pop().constraint == ConstraintSpec("json_object")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]"),
        ({"prompt": [[1], [[2]]]}, "prompt[1][0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"echo": True, "stream": True, "logprobs": 1}, "echo"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"user": "u" * 513}, "user"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"regex": "a", "grammar": "b"}, "grammar"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": "1"}, "temperature"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name(client: httpx.Client, body: Any, param: str) -> None:
    error = refused(complete(client, **({"prompt": "a"} | body)), 400, error_code(param))
    assert error["param"] == param


MESSAGE = "messages[0]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, MESSAGE),
        ({"messages": [{"role": "owner", "content": "a"}]}, f"{MESSAGE}.role"),
        ({"messages": [{"role": "user", "content": 3}]}, f"{MESSAGE}.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, f"{MESSAGE}.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, f"{MESSAGE}.content"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]}, MESSAGE),
        ({"messages": [{"role": "user", "content": "a", "image": 1}]}, f"{MESSAGE}.image"),
        ({"messages": CHAT * 2049}, "messages"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a-b": 1}}, "chat_template_kwargs"),
        ({"chat_template": "x"}, "chat_template"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"prediction": {}}, "prediction"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prompt_cache_key": "a"}, "prompt_cache_key"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_name(client: httpx.Client, body: Any, param: str) -> None:
    error = refused(chat(client, **body), 400, error_code(param))
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": CHAT}, "prompt"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(client: httpx.Client, body: Any, param: str) -> None:
    assert refused(client.post("/tokenize", json=body), 400, "invalid_value")["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_tokens_of_no_model_are_none(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    for model, status in (("demo/writer", 200), ("demo/none", 404)):
        assert client.post(path, json=body | {"model": model}).status_code == status


def error_code(param: str) -> str:
    return "unknown_field" if param in ("nonsense", "stream_options.other", f"{MESSAGE}.image") else "invalid_value"


def test_an_unknown_field_is_named_by_its_place(client: httpx.Client) -> None:
    bodies: list[tuple[dict[str, Any], str, str]] = [
        ({"messages": [*CHAT, {"role": "user", "content": "x", "foo": 1}]}, "messages[1].foo", "of messages[1]"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
        ({"foo": 1}, "foo", "'foo' is not a field of this request"),
    ]
    for body, param, words in bodies:
        error = refused(chat(client, **body), 400, "unknown_field")
        assert error["param"] == param and words in error["message"]
    error = refused(chat(client, response_format={"type": "grammar", "grammar": "start: /a/"}), 400, "invalid_value")
    assert error["param"] == "response_format.type" and "send grammar as a field" in error["message"]


def test_parts_of_text_and_the_developer_reach_the_template(client: httpx.Client, engine: StubEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    past = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    past["tool_calls"] = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}]
    messages = [{"role": "developer", "content": parts}, past, {"role": "tool", "content": "t", "tool_call_id": "c"}]
    assert chat(client, messages=messages, tools=[TOOL]).status_code == 200
    assert engine.asked[0].prompt == "1[system:a\nb][assistant:][tool:t]"
    assert chat(client, tools=[TOOL], tool_choice="none").status_code == 200
    assert engine.asked[1].prompt == "[user:hi]"
    past["tool_calls"][0]["function"]["arguments"] = "[1]"
    error = refused(chat(client, messages=messages), 400, "invalid_value")
    assert error["param"] == "messages[1].tool_calls[0].function"


def test_the_answers_have_exactly_these_fields(client: httpx.Client) -> None:
    answer = complete(client, prompt="hello").json()
    assert abs(answer.pop("created") - time.time()) < 60 and answer.pop("id").startswith("cmpl-")
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    choice = {"index": 0, "text": "".join(TEXTS), "finish_reason": "stop", "logprobs": None}
    assert answer == {
        "object": "text_completion",
        "model": "demo/writer",
        "system_fingerprint": "demo/writer@v3",
        "choices": [choice],
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": 2}},
    }
    answer = chat(client, model="random-llama").json()
    assert abs(answer.pop("created") - time.time()) < 60 and answer.pop("id").startswith("chatcmpl-")
    message = {"role": "assistant", "content": "".join(TEXTS), "refusal": None}
    # Cached tokens of the base would tell one client about another.
    assert answer == {
        "object": "chat.completion",
        "model": "random-llama",
        "system_fingerprint": "random-llama",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": usage,
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_of_several_choices(client: httpx.Client, path: str) -> None:
    body = {"model": "demo/writer", "n": 3, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"prompt": "hello"} if path == "/v1/completions" else {"messages": CHAT}
    response = client.post(path, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, usage, done = events(response.text)
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9 and usage["usage"]["prompt_tokens"] == 5
    texts, ends = ["", "", ""], [None, None, None]
    for piece in pieces:
        (choice,) = piece["choices"]
        assert piece["usage"] is None and ends[choice["index"]] is None
        delta = choice.get("delta", {}).get("content")
        texts[choice["index"]] += choice["text"] if delta is None and "text" in choice else delta or ""
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == ["".join(TEXTS)] * 3 and ends == ["stop"] * 3
    assert len({piece["id"] for piece in [*pieces, usage]}) == 1


@pytest.fixture
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_refusals_are_the_exceptions_of_the_official_client(official: openai.OpenAI) -> None:
    def ask(prompt: str, **fields: Any) -> Any:
        return official.completions.create(model="demo/writer", prompt=prompt, **fields)

    with pytest.raises(openai.RateLimitError) as flooding:
        ask(FLOODING)
    assert flooding.value.response.headers["retry-after"] == "9" and flooding.value.code == "tenant_overloaded"
    with pytest.raises(openai.InternalServerError) as overloaded:
        ask(OVERLOADED, stream=True)
    assert (overloaded.value.status_code, overloaded.value.response.headers["retry-after"]) == (503, "7")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(TOO_LONG, stream=True)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.APIStatusError) as late:
        ask(LATE)
    assert late.value.status_code == 504
    with pytest.raises(openai.InternalServerError) as crash:
        ask(CRASHES)
    assert SECRET not in str(crash.value)
    with pytest.raises(openai.APIError, match="may be sent again"):
        list(ask(FAILS_LATER, stream=True))
    with pytest.raises(openai.BadRequestError) as suffix:
        ask("a", suffix="b")
    assert suffix.value.param == "suffix"


@pytest.mark.parametrize(("prompt", "times"), [(OVERLOADED, 2), (LATE, 1)])
def test_the_client_sends_a_refused_request_again_where_that_may_help(
    url: str, engine: StubEngine, prompt: str, times: int
) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=1) as client, pytest.raises(openai.APIError):
        client.with_options(timeout=2).completions.create(model="demo/writer", prompt=prompt)
    assert len(engine.asked) == times


def test_a_prompt_that_fails_closes_the_others(client: httpx.Client, engine: StubEngine) -> None:
    error = refused(complete(client, prompt=["a", TOO_LONG, "b"], n=2), 400, "context_length_exceeded")
    assert error["param"] == "prompt"
    wait_until(lambda: engine.open_streams == 0)
    *_, last = events(complete(client, prompt=["a", FAILS_LATER], stream=True).text)
    assert last["error"]["code"] == "engine_unavailable"


def test_a_refusal_in_mid_stream_has_the_names_of_this_interface(client: httpx.Client) -> None:
    first, *_, last = events(complete(client, prompt=OTHERS_SHED, n=2, stream=True).text)
    assert first["choices"][0]["text"] == TEXTS[0]
    assert (last["error"]["code"], last["error"]["param"]) == ("tenant_overloaded", "model")
    assert refused(complete(client, prompt=OTHERS_SHED, n=2), 429, "tenant_overloaded")["param"] == "model"


def test_a_client_that_leaves_ends_all_choices(client: httpx.Client, engine: StubEngine) -> None:
    body = {"model": "demo/writer", "prompt": [SLOW, SLOW], "n": 2, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        texts = response.iter_text()
        next(texts)
        assert engine.open_streams == 4
    wait_until(lambda: engine.open_streams == 0)
    assert engine.cancelled == 4


def test_tools_without_a_place_in_the_template(
    client: httpx.Client, base: FrozenBase, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ messages[0].content }}")
    assert refused(chat(client, tools=[TOOL]), 400, "invalid_request")["param"] == "tools"
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ raise_exception('no users') }}")
    assert "no users" in refused(chat(client), 400, "chat_template_failed")["message"]
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    refused(chat(client), 400, "chat_template_missing")
    # A template would not help.
    error = refused(chat(client, model="demo/sorter"), 400, "unsupported_task")
    assert (error["param"], "send it to /v1/classify" in error["message"]) == ("model", True)
    refused(chat(client, model="demo/none"), 404, "model_not_found")
    assert engine.asked == []


CALL = '{"name": "look", "arguments": {"at": "世界"}}'


@pytest.mark.parametrize("template", ["json", "hermes"])
def test_calls_of_tools_whole_and_in_a_stream(
    official: openai.OpenAI, base: FrozenBase, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    begin = ["See:\n<tool_", f"call>{CALL[:20]}", CALL[20:], "</tool_call>", f"<tool_call>{CALL}</tool_call>"]
    pieces, count = ([*CALL], 1) if template == "json" else ([*begin, "\n"], 2)
    monkeypatch.setattr("support.stub_engine.TEXTS", pieces)
    if template == "hermes":
        monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE + "{# <tool_call> #}")
    fields: dict[str, Any] = {"model": "demo/writer", "messages": CHAT, "tools": [TOOL]}
    choice = official.chat.completions.create(**fields).choices[0]
    content = None if template == "json" else "See:"
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", content)
    calls = [call.function for call in choice.message.tool_calls or ()]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("look", {"at": "世界"})] * count
    parts = [piece.choices[0] for piece in official.chat.completions.create(**fields, stream=True)]
    assert parts[-1].finish_reason == "tool_calls"
    assert "".join(part.delta.content or "" for part in parts) == (content or "")
    streamed = [call for part in parts for call in part.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in streamed] == [(place, "look") for place in range(count)]
    assert [json.loads(call.function.arguments) for call in streamed] == [{"at": "世界"}] * count


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "1e999"])
def test_a_call_that_no_json_can_hold_is_content(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    text = f'{{"name": "look", "arguments": {{"at": {value}}}}}'
    monkeypatch.setattr("support.stub_engine.TEXTS", [*text])
    answer = chat(client, tools=[TOOL])
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == text


def test_no_more_tokens_are_decoded_than_the_context_holds(client: httpx.Client, engine: StubEngine) -> None:
    most = engine.context_tokens
    assert client.post("/detokenize", json={"tokens": [1] * most}).status_code == 200
    answer = client.post("/detokenize", json={"tokens": [1] * (most + 1)})
    assert refused(answer, 400, "context_length_exceeded")["param"] == "tokens"
    answer = complete(client, prompt=[[1], [1] * (most + 1)], echo=True)
    assert refused(answer, 400, "context_length_exceeded")["param"] == "prompt[1]"
    assert engine.asked == []


def test_a_forced_call_is_a_constraint(client: httpx.Client, engine: StubEngine) -> None:
    assert chat(client, tools=[TOOL], tool_choice="required").status_code == 200
    named = {"type": "function", "function": {"name": "look"}}
    assert chat(client, tools=[TOOL], tool_choice=named).status_code == 200
    for params, most in zip(engine.asked, (None, 1), strict=True):
        assert params.constraint is not None and params.constraint.kind == "json_schema"
        assert json.loads(params.constraint.text).get("maxItems") == most


def test_a_forced_answer_that_is_cut_has_its_whole_calls(
    client: httpx.Client, base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.stub_engine.TEXTS", [*f"[{CALL}, {CALL[:20]}"])
    function = TOOL["function"]
    asked = {"model": "demo/writer", "input": "hi", "tools": [{"type": "function", **function}]}
    for template in (TEMPLATE, TEMPLATE + "{# <tool_call> #}"):
        monkeypatch.setattr(base.tokenizer, "chat_template", template)
        message = chat(client, tools=[TOOL], tool_choice="required").json()["choices"][0]["message"]
        assert message["content"] is None and [call["function"]["name"] for call in message["tool_calls"]] == ["look"]
        output = client.post("/v1/responses", json=asked | {"tool_choice": "required"}).json()["output"]
        assert [item["type"] for item in output] == ["function_call"]
    # A text that is not forced is content.
    monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE)
    assert chat(client, tools=[TOOL]).json()["choices"][0]["message"]["content"] == f"[{CALL}, {CALL[:20]}"


def test_a_tool_answers_a_call_before_it(client: httpx.Client) -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": "{}"}}]}
    seen = {"role": "tool", "content": "seen", "tool_call_id": "c1"}
    unnamed = {"role": "tool", "content": "seen"}
    for messages in ([called, seen], [called, unnamed], [called, seen, *CHAT, seen]):
        assert chat(client, messages=messages).status_code == 200
    for messages, param in (
        ([*CHAT, seen], "messages[1].role"),
        ([unnamed, called], "messages[0].role"),
        ([called, seen | {"tool_call_id": "c2"}], "messages[1].tool_call_id"),
    ):
        assert refused(chat(client, messages=messages), 400, "invalid_value")["param"] == param


def test_strict_functions_are_a_constraint_where_the_template_marks_calls(
    client: httpx.Client, base: FrozenBase, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = TOOL["function"] | {"strict": True}
    strict = {"tools": [TOOL | {"function": function}]}
    asked = {"model": "demo/writer", "input": "hi", "tools": [{"type": "function", **function}]}
    # Without the mark, calls are JSON alone, and cannot be told from other text that begins so.
    assert chat(client, **strict).status_code == client.post("/v1/responses", json=asked).status_code == 200
    monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE + "{# <tool_call> #}")
    assert chat(client, tools=[TOOL]).status_code == chat(client, **strict, tool_choice="none").status_code == 200
    assert [params.constraint for params in engine.asked] == [None] * 4
    assert chat(client, **strict).status_code == client.post("/v1/responses", json=asked).status_code == 200
    for params in engine.asked[4:]:
        assert params.constraint is not None and params.constraint.kind == "tool_calls"
        assert json.loads(params.constraint.text)["properties"]["name"] == {"const": "look"}


@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_function_may_be_called_as_a_mode_of_tool_choice(client: httpx.Client, engine: StubEngine, name: str) -> None:
    function = {"name": name, "parameters": {"type": "object"}}
    other = {"name": "other", "parameters": {"type": "object"}}
    chosen: dict[str, Any] = {"type": "function", "function": {"name": name}}
    tools: list[dict[str, Any]] = [{"type": "function", "function": each} for each in (function, other)]
    assert chat(client, tools=tools, tool_choice=chosen).status_code == 200
    body = {
        "model": "demo/writer",
        "input": "hi",
        "tools": [{"type": "function", **each} for each in (function, other)],
    }
    answer = client.post("/v1/responses", json=body | {"tool_choice": {"type": "function", "name": name}})
    assert answer.json()["tool_choice"] == {"type": "function", "name": name}
    for params in engine.asked:
        assert params.constraint is not None
        schema = json.loads(params.constraint.text)
        assert (schema["maxItems"], schema["items"]["properties"]["name"]) == (1, {"const": name})


def test_pages_may_ask_only_from_allowed_origins(stub: StubEngine, store: Any) -> None:
    ask = {"Origin": "https://console.example.com", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    settings = ServeSettings(store=store.root, allowed_origins=["https://console.example.com"])
    with live_server(build_app(stub, store, settings)) as url, httpx.Client(base_url=url) as client:
        answer = client.options("/v1/chat/completions", headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://console.example.com"
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        headers = {"Origin": "https://console.example.com", "Authorization": "Bearer any"}
        body = {"model": "demo/writer", "messages": CHAT}
        answer = client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://console.example.com"
        other = client.options("/v1/chat/completions", headers=ask | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_no_page_may_ask_by_default(client: httpx.Client, engine: StubEngine) -> None:
    ask = {"Origin": "https://console.example.com", "Access-Control-Request-Method": "POST"}
    answer = client.options("/v1/chat/completions", headers=ask)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    answer = client.post("/v1/chat/completions", json={}, headers={"Origin": "https://console.example.com"})
    refused(answer, 403, "cross_site_request")


def test_log_probabilities_name_parts_of_characters_by_their_bytes(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, base: FrozenBase
) -> None:
    tokens = base.tokenizer("é")["input_ids"]
    assert len(tokens) == 2
    first, second = tokens
    rows = (TokenLogprobs(first, -0.5, ((first, -0.5), (second, float("-inf")))), TokenLogprobs(second, -1.0, ()))

    monkeypatch.setattr(stub_engine, "TEXTS", ["", "é"])
    original = stub_engine.TokenDelta

    def with_logprobs(text: str, token_ids: list[int], *_: Any) -> Any:
        return original(text, token_ids, (rows[token_ids[0]],))

    monkeypatch.setattr(stub_engine, "TokenDelta", with_logprobs)
    found = complete(client, prompt="a", logprobs=2).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found["token_logprobs"] == [-0.5, -1.0]
    assert found["top_logprobs"] == [{"bytes:\\xc3": -0.5, "bytes:\\xa9": -9999.0}, {"bytes:\\xa9": -1.0}]
    assert found["text_offset"] == [0, 0]
    content = chat(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [row["bytes"] for row in content] == [[0xC3], [0xA9]]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    choices = [one["choices"][0] for one in events(chat(client, logprobs=True, stream=True).text)[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "é"
    rows = [row for choice in choices if choice["logprobs"] for row in choice["logprobs"]["content"]]
    assert [row["bytes"] for row in rows] == [[0xC3], [0xA9]]


STRANGE: list[Any] = [True, -1, 0, 2**70, 1.5, "", "x", "\0☠", [], [[]], ["x"], {}, {"type": "text"}, {"x": {"y": [0]}}]


@pytest.mark.parametrize(
    ("path", "model", "least"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": "a"}),
        ("/v1/chat/completions", ChatRequest, {"messages": CHAT}),
        ("/tokenize", TokenizeRequest, {"prompt": "a"}),
        ("/tokenize", TokenizeRequest, {"messages": CHAT}),
        ("/detokenize", DetokenizeRequest, {"tokens": [1]}),
    ],
)
def test_a_strange_value_of_any_field_is_served_or_refused(
    client: httpx.Client, path: str, model: Any, least: dict[str, Any]
) -> None:
    if path.startswith("/v1/"):
        least = {"model": "demo/writer"} | least
    assert client.post(path, json=least).status_code == 200
    for field in model.model_fields:
        for value in STRANGE:
            response = client.post(path, json=least | {field: value})
            assert response.status_code in (200, 400, 404), (field, value, response.text)
    for value in STRANGE:
        for part in ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "annotations"):
            if "messages" in least:
                message = {"role": "assistant", "content": "a"} | {part: value}
                response = client.post(path, json=least | {"messages": [message]})
                assert response.status_code in (200, 400), (part, value, response.text)
