"""`response_format`, `regex` and `grammar` over HTTP, on the native route and on OpenAI's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine, constraint
from sera_serve.engine.tenant_memory import TenantMemory
from sera_serve.server import build_app
from support.factories import random_decoder
from support.live_server import live_server

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def decoder() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def client(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    store = AdapterStore(tmp_path_factory.mktemp("forms") / "store")
    settings = ServeSettings(store=store.root, pool_mib=1, kv_cache_tokens=2048)
    engine = ServingEngine(decoder, store, settings)
    with live_server(build_app(engine, store, settings)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def generated(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 200, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_native_route_keeps_each_form(client: httpx.Client) -> None:
    answer = generated(client, response_format=FORMAT)
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    assert re.fullmatch(r"\d{3}-[ab]", generated(client, regex=r"\d{3}-[ab]", temperature=1.0)["text"])
    assert generated(client, grammar='start: "yes" | "no"')["text"] in ("yes", "no")
    assert generated(client, response_format={"type": "json_object"}, max_new_tokens=9)["text"].startswith("{")


def test_text_is_any_text(client: httpx.Client) -> None:
    free = generated(client, max_new_tokens=8)
    assert generated(client, max_new_tokens=8, response_format={"type": "text"})["text"] == free["text"]
    assert generated(client, max_new_tokens=8, response_format=None, regex=None)["text"] == free["text"]


def test_a_stream_adds_up_to_the_same_text(client: httpx.Client) -> None:
    whole = generated(client, response_format=FORMAT)
    body = {"prompt": "x", "max_new_tokens": 200, "response_format": FORMAT, "stream": True}
    lines = client.post("/v1/generate", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == whole["text"]
    assert events[-1]["finish_reason"] == "stop"


def test_completions_keep_a_form(client: httpx.Client, decoder: FrozenBase) -> None:
    body = {"model": decoder.name, "prompt": "x", "max_tokens": 200, "response_format": FORMAT, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


SCHEMA_FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"regex": "a", "grammar": "start: A"}, "grammar", "send one of them"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "send one of them"),
        ({"regex": ""}, "regex", "it should have at least 1 character"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {}}, "response_format.type", "missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format.json_schema", "not read"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "not a field"),
        (_schema([]), SCHEMA_FIELD, "a list of 0 items"),
        (_schema({"title": "x" * 70_000}), SCHEMA_FIELD, "send at most 65536"),
        (_schema({"uniqueItems": True}), SCHEMA_FIELD, "'uniqueItems'"),
        ({"regex": "("}, "regex", "unclosed group"),
        ({"grammar": "start: foo"}, "grammar", "foo"),
    ],
)
def test_what_is_refused_names_the_field_and_the_remedy(
    client: httpx.Client, decoder: FrozenBase, body: dict[str, Any], param: str, reason: str
) -> None:
    answer = client.post("/v1/generate", json={"prompt": "x", **body})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
    assert reason in answer.json()["error"]["message"]
    theirs = client.post("/v1/completions", json={"model": decoder.name, "prompt": "x", **body})
    assert theirs.status_code == 400
    assert theirs.json()["error"]["param"] == param


def test_a_chat_with_tools_takes_no_form(client: httpx.Client, decoder: FrozenBase) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "x"}]
    body = {"model": decoder.name, "messages": messages, "tools": [tool], "response_format": FORMAT}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def test_the_document_names_the_bounds_that_the_code_has() -> None:

    text = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
    section = text.split("### The form of a text\n")[1].split("\n## ")[0]
    for bound in (constraint.MAX_SCHEMA_CHARACTERS, constraint.MAX_REGEX_CHARACTERS, constraint.MAX_GRAMMAR_CHARACTERS):
        assert f"{bound:,} characters" in section


def test_a_tenant_that_compiles_too_much_at_a_time_is_told_to_send_less(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", 0)
    response = client.post("/v1/generate", json={"prompt": "x", "regex": "[a-z]{77}"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("tenant_overloaded", "regex")
    monkeypatch.undo()
    assert len(generated(client, regex="[a-z]{77}")["text"]) == 77
