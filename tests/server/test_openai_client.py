"""The official client against a real server with the embedded base and a small adapter."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.factories import random_adapter
from support.live_server import live_server, wait_until

PROMPT = "The weather today is"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
MODELS = ["embedded", "tale/one"]
TEMPLATES = {
    "tale/chat": "{{ bos_token }}Q: {{ messages[0].content }}\nA:",
    "tale/tools": "{{ bos_token }}{{ tools|tojson }}{{ messages[0].content }}",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def embedded() -> FrozenBase:
    return load_base("embedded")


@pytest.fixture(scope="module")
def whole_engine(embedded: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> ServingEngine:
    store = AdapterStore(tmp_path_factory.mktemp("openai") / "store")
    shape = SeraConfig(4, 2, 8, ("q_proj", "v_proj", "down_proj"))
    store.publish(random_adapter(embedded, shape, 1, strength=0.3), "tale/one")
    for name, template in TEMPLATES.items():
        store.publish(random_adapter(embedded, shape, 3, strength=0.3, chat_template=template), name)
    store.publish(random_adapter(embedded, shape, 2, labels=["good", "bad"]), "tale/labels")
    return ServingEngine(embedded, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=8192))


@pytest.fixture(scope="module")
def address(whole_engine: ServingEngine) -> Iterator[str]:
    with live_server(build_app(whole_engine, whole_engine.store, whole_engine.settings)) as url:
        yield url


@pytest.fixture(autouse=True)
def _nothing_left(whole_engine: ServingEngine) -> Iterator[None]:
    yield
    wait_until(lambda: whole_engine.in_flight() == 0 and whole_engine.residency.leases() == 0)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def native(address: str, model: str, **body: object) -> dict[str, object]:
    adapter = None if model == "embedded" else model
    response = httpx.post(f"{address}/v1/generate", json={"adapter": adapter, **body}, timeout=30)
    response.raise_for_status()
    answer: dict[str, object] = response.json()
    return answer


@pytest.mark.parametrize("model", MODELS)
def test_a_completion_is_what_generate_gives(client: openai.OpenAI, address: str, model: str) -> None:
    expected = native(address, model, prompt=PROMPT, max_new_tokens=12)
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", model)
    assert answer.choices[0].text == expected["text"]
    assert answer.choices[0].finish_reason == expected["finish_reason"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected["token_ids"])
    pieces = list(
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected["text"]
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == expected["finish_reason"]
    assert pieces[-1].choices == [] and pieces[-1].usage == answer.usage
    assert all(piece.usage is None for piece in pieces[:-1])


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_is_what_generate_gives_for_the_rendered_prompt(
    client: openai.OpenAI, address: str, embedded: FrozenBase, model: str
) -> None:
    tokens = embedded.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    expected = native(address, model, token_ids=tokens, max_new_tokens=12)
    answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected["text"]
    assert answer.usage is not None and answer.usage.prompt_tokens == len(tokens)
    # Cached tokens of the base would tell one client about another.
    assert (answer.usage.prompt_tokens_details is None) == (model == "embedded")
    pieces = list(client.chat.completions.create(model=model, messages=CHAT, max_tokens=12, temperature=0, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected["text"]
    assert pieces[-1].choices[0].finish_reason == expected["finish_reason"]


def test_the_async_client_streams(address: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tale/one", messages=CHAT, max_tokens=8, temperature=0, stream=True
            )
            return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    text = asyncio.run(ask())
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model="tale/one", messages=CHAT, max_tokens=8, temperature=0)
    assert whole.choices[0].message.content == text


def test_lists_of_prompts_and_several_choices(client: openai.OpenAI, embedded: FrozenBase) -> None:
    prompts = [PROMPT, "Once upon a time"]
    single = [
        client.completions.create(model="tale/one", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in prompts
    ]
    tokens = [embedded.tokenizer(prompt)["input_ids"] for prompt in prompts]
    for form in (prompts, tokens):
        answer = client.completions.create(model="tale/one", prompt=form, n=2, max_tokens=6, temperature=0)
        assert [choice.text for choice in answer.choices] == [single[0]] * 2 + [single[1]] * 2
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, tokens))
    texts = ["", "", "", ""]
    for piece in client.completions.create(
        model="tale/one", prompt=prompts, n=2, max_tokens=6, temperature=0, stream=True
    ):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [single[0]] * 2 + [single[1]] * 2


def test_log_probabilities_of_completions_and_an_echo(client: openai.OpenAI, embedded: FrozenBase) -> None:
    answer = client.completions.create(
        model="tale/one", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT) and choice.logprobs is not None
    tokens = embedded.tokenizer(PROMPT)["input_ids"]
    rows = choice.logprobs
    assert len(rows.tokens) == len(tokens) + 5 == len(rows.token_logprobs) == len(rows.text_offset)
    assert rows.token_logprobs[0] is None and rows.top_logprobs[0] is None
    for place, (name, offset) in enumerate(zip(rows.tokens, rows.text_offset, strict=True)):
        if place:
            assert choice.text[offset : offset + len(name)] == name
            assert rows.top_logprobs[place][name] == rows.token_logprobs[place] <= 0
            assert len(rows.top_logprobs[place]) in (3, 4)
    bare = client.completions.create(model="tale/one", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert bare.choices[0].text == PROMPT and bare.usage.completion_tokens == 0
    assert bare.choices[0].logprobs.token_logprobs == rows.token_logprobs[: len(tokens)]


def test_log_probabilities_of_a_chat_also_in_a_stream(client: openai.OpenAI) -> None:
    fields = {"model": "tale/one", "messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**fields, top_logprobs=2).choices[0]
    rows = whole.logprobs.content
    assert len(rows) == 6
    assert all(bytes(row.bytes).decode("utf-8", "replace") and len(row.top_logprobs) == 2 for row in rows)
    assert all(row.top_logprobs[0].token == row.token for row in rows)
    pieces = list(client.chat.completions.create(**fields, top_logprobs=2, stream=True))
    streamed = [row for piece in pieces if piece.choices[0].logprobs for row in piece.choices[0].logprobs.content]
    assert streamed == rows


def test_the_models_and_one_of_them(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["embedded", "tale/chat", "tale/labels", "tale/one", "tale/tools"]
    assert (found["tale/one"].root, found["tale/one"].parent) == ("tale/one@v1", "embedded")
    assert client.models.retrieve("tale/one") == found["tale/one"]
    assert client.models.retrieve("tale/one@v1").id == "tale/one@v1"
    assert client.models.retrieve("embedded").parent is None
    for name in ("tale/two", "gpt-4", "tale/one@v9"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    for name in ("tale/none", "gpt-4"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model=name, messages=CHAT)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong_task:
        client.chat.completions.create(model="tale/labels", messages=CHAT, max_tokens=4)
    assert (wrong_task.value.code, wrong_task.value.param) == ("unsupported_task", "model")
    with pytest.raises(openai.BadRequestError) as too_hot:
        client.chat.completions.create(model="embedded", messages=CHAT, temperature=3)
    assert (too_hot.value.code, too_hot.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="embedded", prompt=PROMPT, max_tokens=100_000)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as later:
        client.completions.create(model="embedded", prompt=PROMPT, max_tokens=100_000, stream=True)
    assert later.value.code == "context_length_exceeded"


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"echo": True}])
@pytest.mark.parametrize(
    ("prompt", "code", "param"),
    [
        ([PROMPT, "a " * 2000], "context_length_exceeded", "prompt[1]"),
        ([[1], [2] * 2000], "context_length_exceeded", "prompt[1]"),
        ([[1], [2], [1_000_000]], "invalid_request", "prompt[2]"),
        ([1, 1_000_000], "invalid_request", "prompt"),
        ([2] * 2000, "context_length_exceeded", "prompt"),
    ],
)
def test_an_error_of_one_of_several_prompts_names_its_place(
    client: openai.OpenAI, prompt: Any, code: str, param: str, options: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="embedded", prompt=prompt, max_tokens=1, **options)
    assert (refusal.value.code, refusal.value.param) == (code, param), refusal.value.message


@pytest.mark.parametrize(("timeout_s", "asked"), [(0.001, 1), (None, 2)])
def test_what_repeating_does_not_help_is_asked_once(address: str, timeout_s: float | None, asked: int) -> None:
    requests: list[httpx.Request] = []

    def fails(response: httpx.Response) -> None:
        requests.append(response.request)
        # Another answer of that status would be asked for again.
        if timeout_s is None:
            response.status_code = 504

    counting = httpx.Client(event_hooks={"response": [fails]})
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1, http_client=counting) as client:
        body = {} if timeout_s is None else {"timeout_s": timeout_s}
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="embedded", prompt=PROMPT, max_tokens=100, extra_body=body)
    assert len(requests) == asked


def test_tokens_of_texts_and_back(address: str, embedded: FrozenBase) -> None:
    with httpx.Client(base_url=address) as http:
        answer = http.post("/tokenize", json={"model": "tale/one", "prompt": "Grüße, 世界", "return_token_strs": True})
        tokens = answer.json()["tokens"]
        assert tokens == embedded.tokenizer("Grüße, 世界")["input_ids"]
        assert answer.json()["count"] == len(tokens) == len(answer.json()["token_strs"])
        chat = http.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
        assert chat == embedded.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        back = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert back == "<|bos|>Grüße, 世界"
        assert http.post("/detokenize", json={"tokens": [4096]}).status_code == 400
        assert http.post("/tokenize", json={"model": "tale/none", "prompt": "a"}).status_code == 404


class Colour(BaseModel):
    name: Literal["red", "blue"]
    bright: bool


def test_an_answer_is_parsed_by_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tale/one", messages=CHAT, response_format=Colour, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)
    text = client.completions.create(
        model="embedded", prompt=PROMPT, max_tokens=20, temperature=1, extra_body={"regex": "[ab]{3,5}"}
    )
    assert re.fullmatch("[ab]{3,5}", text.choices[0].text)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="embedded", prompt=PROMPT, extra_body={"regex": "(["})
    assert wrong.value.param == "regex"


# The client's own types do not know their `parsed` when they are sent.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_the_client_parsed_may_be_sent_back(client: openai.OpenAI) -> None:
    again: Any = {"role": "user", "content": "Another one?"}
    message = (
        client.chat.completions.parse(
            model="tale/one", messages=CHAT, response_format=Colour, max_tokens=60, temperature=0
        )
        .choices[0]
        .message
    )
    bare: Any = {"role": "assistant", "content": message.content}
    fields: dict[str, Any] = {"model": "tale/one", "max_tokens": 4, "temperature": 0}
    whole, plain = (
        client.chat.completions.create(messages=[*CHAT, turn, again], **fields).choices[0].message.content
        for turn in (message, bare)
    )
    assert whole == plain
    asked: dict[str, Any] = {"model": "tale/one", "max_output_tokens": 60, "temperature": 0}
    answer = client.responses.parse(input=CHAT, text_format=Colour, **asked)
    bare = {"role": "assistant", "content": answer.output_text}
    with_items, with_text = (
        client.responses.create(input=[*CHAT, *turns, again], **asked).output_text for turns in (answer.output, [bare])
    )
    assert with_items == with_text
    tool = openai.pydantic_function_tool(Colour, name="paint")
    turns: Any = {"model": "tale/tools", "messages": CHAT[1:], "max_tokens": 250, "temperature": 0, "tools": [tool]}
    called = (
        client.chat.completions.parse(**turns, tool_choice="required", parallel_tool_calls=False).choices[0].message
    )
    assert called.tool_calls is not None and isinstance(called.tool_calls[0].function.parsed_arguments, Colour)
    # The client marks the function as strict.
    assert client.chat.completions.create(**turns | {"max_tokens": 4}).choices
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "done"}
    turns |= {"messages": [*CHAT[1:], called, result], "tool_choice": "none", "max_tokens": 4}
    assert client.chat.completions.create(**turns).choices[0].finish_reason in ("stop", "length")


def test_an_adapter_brings_its_chat_template(client: openai.OpenAI, address: str, embedded: FrozenBase) -> None:
    expected = native(
        address, "tale/chat", token_ids=embedded.tokenizer("Q: Name a colour.\nA:")["input_ids"], max_new_tokens=6
    )
    fields = {"model": "tale/chat", "messages": CHAT[1:], "max_tokens": 6, "temperature": 0}
    assert client.chat.completions.create(**fields).choices[0].message.content == expected["text"]
    with pytest.raises(openai.BadRequestError, match="no place for tools") as tools:
        client.chat.completions.create(**fields, tools=[TOOL])
    assert tools.value.param == "tools"


def test_a_call_is_forced(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tale/tools",
        messages=CHAT[1:],
        max_tokens=250,
        temperature=0,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")


def test_without_a_limit_the_context_ends_the_text(client: openai.OpenAI, embedded: FrozenBase) -> None:
    prompt = (embedded.tokenizer(PROMPT)["input_ids"] * 200)[: embedded.max_length - 20]
    answer = client.completions.create(
        model="embedded", prompt=prompt, temperature=0, extra_body={"ignore_eos": True}, logit_bias={"1": -100}
    )
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (20, embedded.max_length)


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    fields = {"model": "tale/one", "prompt": PROMPT, "n": 4, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    first, second = (client.completions.create(**fields) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("model", MODELS)
def test_a_response_is_what_generate_gives(
    client: openai.OpenAI, address: str, embedded: FrozenBase, model: str
) -> None:
    tokens = embedded.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    expected = native(address, model, token_ids=tokens, max_new_tokens=12, logprobs=2)
    fields = {"model": model, "instructions": CHAT[0]["content"], "input": CHAT[1]["content"]}
    fields |= {"max_output_tokens": 12, "temperature": 0, "include": ["message.output_text.logprobs"]}
    answer = client.responses.create(**fields, top_logprobs=2)
    assert answer.output_text == expected["text"]
    status = {"stop": "completed", "length": "incomplete"}[str(expected["finish_reason"])]
    assert (answer.status, answer.output[0].status) == (status, status)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(tokens), len(expected["token_ids"]))
    rows = answer.output[0].content[0].logprobs
    assert [row.logprob for row in rows] == [row["logprob"] for row in expected["logprobs"]]
    events = list(client.responses.create(**fields, top_logprobs=2, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert events[-1].type == f"response.{status}"
    assert events[-1].response.output[0].content == answer.output[0].content
    # The same conversation as items, and then one more turn with the answer as it came.
    items = client.responses.create(**fields | {"instructions": None, "input": CHAT})
    assert items.output_text == expected["text"]
    turns = [*CHAT, *(item.to_dict() for item in answer.output), {"role": "user", "content": "Why?"}]
    chat = [*CHAT, {"role": "assistant", "content": answer.output_text}, {"role": "user", "content": "Why?"}]
    longer = client.responses.create(model=model, input=turns, max_output_tokens=8, temperature=0)
    same = client.chat.completions.create(model=model, messages=chat, max_tokens=8, temperature=0)
    assert longer.output_text == same.choices[0].message.content


def test_the_async_client_streams_a_response(address: str, client: openai.OpenAI) -> None:
    fields = {"model": "tale/one", "input": "Name a colour.", "max_output_tokens": 300, "temperature": 0}

    async def ask() -> tuple[str, str]:
        async with (
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as other,
            other.responses.stream(**fields, text_format=Colour) as stream,
        ):
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            final = await stream.get_final_response()
            assert isinstance(final.output_parsed, Colour)
            return text, final.output_text

    text, final = asyncio.run(ask())
    parsed = client.responses.parse(**fields, text_format=Colour)
    assert text == final == parsed.output_text and isinstance(parsed.output_parsed, Colour)


def test_a_response_is_a_forced_call(client: openai.OpenAI) -> None:
    fields = {"model": "tale/tools", "input": "Name a colour.", "max_output_tokens": 250, "temperature": 0}
    fields |= {"tools": [{"type": "function"} | TOOL["function"]], "parallel_tool_calls": False}
    answer = client.responses.create(**fields, tool_choice="required")
    (call,) = answer.output
    assert (answer.status, call.type, call.name) == ("completed", "function_call", "paint")
    assert json.loads(call.arguments)["colour"] in ("red", "blue")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turn = [{"role": "user", "content": "Name a colour."}, call.to_dict(), output]
    assert client.responses.create(**fields | {"input": turn}, tool_choice="none").output[0].type == "message"
    with pytest.raises(openai.BadRequestError, match="no place for tools") as tools:
        client.responses.create(**fields | {"model": "embedded"})
    assert tools.value.param == "tools"


def test_a_response_has_a_schema_that_can_be_enforced(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"not": {"type": "string"}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as wrong:
            client.responses.create(model="embedded", input="hi", text={"format": schema}, stream=stream)
        assert wrong.value.param == "text.format.schema"
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="tale/none", input="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.responses.create(model="embedded", input="hi", max_output_tokens=100_000)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "input")
