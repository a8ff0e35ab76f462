"""The OpenAPI document is valid, complete, and says what the server does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from sera_serve.server.openapi import DocumentedApp
from sera_serve.server.scopes import needed_scope
from sera_serve.server.strict import RequestModel
from support.answers import openapi_document
from support.live_server import live_server
from support.stub_engine import StubEngine

PATHS = {
    "/v1/generate": {"post"},
    "/v1/classify": {"post"},
    "/v1/adapters": {"get", "post"},
    "/v1/adapters/{tenant}/{name}": {"get", "delete"},
    "/v1/adapters/{tenant}/{name}/versions": {"get"},
    "/v1/adapters/{tenant}/{name}/aliases/{alias}": {"put", "delete"},
    "/v1/adapters/{tenant}/{name}/shares": {"get"},
    "/v1/me": {"get"},
    "/v1/keys": {"get", "post"},
    "/v1/keys/{id}": {"delete"},
    "/v1/quotas": {"get"},
    "/v1/quotas/{tenant}": {"get", "put", "delete"},
    "/v1/load_lora_adapter": {"post"},
    "/v1/unload_lora_adapter": {"post"},
    "/v1/adapters/{tenant}/{name}/pin": {"put", "delete"},
    "/v1/adapters/{tenant}/{name}/shares/{with}": {"put", "delete"},
    "/v1/completions": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/embeddings": {"post"},
    "/v1/files": {"get", "post"},
    "/v1/files/{file_id}": {"get", "delete"},
    "/v1/files/{file_id}/content": {"get"},
    "/v1/fine_tuning/jobs": {"get", "post"},
    "/v1/fine_tuning/jobs/{job_id}": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/cancel": {"post"},
    "/v1/fine_tuning/jobs/{job_id}/events": {"get"},
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get", "delete"},
    "/v1/responses": {"post"},
    "/tokenize": {"post"},
    "/detokenize": {"post"},
    "/v1/stats": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


def references(value: Any) -> set[str]:
    """Every `$ref` within a JSON value."""
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"]} if "$ref" in value else set()
    return own.union(*map(references, value.values()))


def test_the_server_gives_the_document(client: httpx.Client) -> None:
    assert client.get("/openapi.json").json() == openapi_document()
    assert {path: set(methods) for path, methods in openapi_document()["paths"].items()} == PATHS


def test_the_document_is_rendered_once_however_many_ask(
    base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may ask, without a key too: 180 KB of JSON for each request took the server from everybody else."""
    made: list[DocumentedApp] = []
    original = DocumentedApp.openapi

    def openapi(app: DocumentedApp) -> dict[str, Any]:
        made.append(app)
        return original(app)

    monkeypatch.setattr(DocumentedApp, "openapi", openapi)
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    with live_server(app) as url, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: httpx.get(f"{url}/openapi.json", timeout=30).content, range(8)))
    assert len(made) == 1
    assert len(set(answers)) == 1


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(openapi_document()).validate()


def test_every_reference_leads_somewhere() -> None:
    # The validator follows a reference only where it validates, and "#/$defs/..." within a schema is not followed.
    found = references(openapi_document())
    assert "#/components/schemas/Usage" in found
    for reference in found:
        place = openapi_document()
        assert reference.startswith("#/components/"), reference
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_every_error_has_the_servers_own_shape() -> None:
    document = openapi_document()
    assert "ValidationError" not in str(document)
    for operations in document["paths"].values():
        for operation in operations.values():
            errors = {int(status): answer for status, answer in operation["responses"].items() if int(status) >= 400}
            assert {400, 401, 403, 408, 413, 414, 415, 431, 500, 503} <= set(errors)
            assert (422 in errors) == ("openai" not in operation.get("tags", ()))
            for status, answer in errors.items():
                assert answer == {"$ref": f"#/components/responses/Error{status}"}
    for name, answer in document["components"]["responses"].items():
        schema = answer["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
        assert ("Retry-After" in answer["headers"]) == (name in ("Error429", "Error503"))
        assert ("x-should-retry" in answer["headers"]) == (name in ("Error409", "Error504", "Error507"))
    detail = document["components"]["schemas"]["ErrorDetail"]
    assert set(detail["required"]) == {"message", "type", "param", "code"}


def test_a_stream_has_the_schema_of_its_events() -> None:
    answer = openapi_document()["paths"]["/v1/generate"]["post"]["responses"]["200"]
    schema = answer["content"]["text/event-stream"]["schema"]
    assert re.search(r"usage", str(schema)) and "$defs" not in schema


def test_an_event_of_every_stream_is_an_object_with_data() -> None:
    """Tools read the schema of a stream as that of one event."""
    document = openapi_document()
    found = 0
    for operations in document["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                if "text/event-stream" in answer.get("content", {}):
                    schema = answer["content"]["text/event-stream"]["schema"]
                    jsonschema.validate({"data": "[DONE]", "event": "message"}, schema)
                    with pytest.raises(jsonschema.ValidationError):
                        jsonschema.validate("data: [DONE]", schema)
                    found += 1
    assert found >= 5


def request_fields() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of each body, form and query, and each part of a path: what it is called, and its schema."""
    document = openapi_document()
    seen = set()

    def fields(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(schema, list):
            for each in schema:
                yield from fields(each, place)
        if not isinstance(schema, dict):
            return
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in seen:
                seen.add(name)
                yield from fields(document["components"]["schemas"][name], name)
        for name, field in schema.get("properties", {}).items():
            yield f"{place}.{name}", field
            yield from fields(field, f"{place}.{name}")
        for key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties"):
            yield from fields(schema.get(key), place)

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                yield f"{method} {path} {parameter['name']}", parameter
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from fields(content["schema"], f"{method} {path}")


def test_every_field_of_a_request_says_what_it_is() -> None:
    found = dict(request_fields())
    for expected in (
        "GenerateRequest.adapter.weight",
        "post /v1/files.purpose",
        "get /v1/models limit",
        "CalledFunction.name",
        "TextFormat.schema",
        "delete /v1/keys/{id} id",
    ):
        assert expected in found
    silent = [name for name, field in found.items() if len(field.get("description", "")) < 8]
    assert not silent


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("ChatRequest", {"model": "a", "messages": [{"role": "user", "content": "a"}], "stop": "."}),
        ("ChatRequest", {"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        ("CompletionRequest", {"model": "a", "prompt": "a", "stop": "."}),
        ("CompletionRequest", {"model": "a", "prompt": [[1], [2]], "stop": [".", "!"]}),
        ("ResponseRequest", {"model": "a", "input": "a", "stop": "."}),
        ("ResponseRequest", {"model": "a", "input": [{"role": "user", "content": "a"}]}),
        ("EmbeddingRequest", {"model": "a", "input": "a"}),
        ("EmbeddingRequest", {"model": "a", "input": [1, 2]}),
    ],
)
def test_what_a_field_takes_in_short_is_valid_in_the_document(model: str, body: dict[str, Any]) -> None:
    """Clients that are made of the document check a request before they send it."""
    schemas = openapi_document()["components"]
    jsonschema.validate(body, {"$ref": f"#/components/schemas/{model}", "components": schemas})


def test_the_bounds_of_a_list_are_in_the_document_too() -> None:
    properties = openapi_document()["components"]["schemas"]["ResponseRequest"]["properties"]
    bounds = {
        name: [(kind.get("minItems"), kind.get("maxItems")) for kind in properties[name]["anyOf"] if "items" in kind]
        for name in ("input", "stop")
    }
    assert bounds == {"input": [(1, 2048)], "stop": [(None, 16)]}


def subclasses(model: type[RequestModel]) -> Iterator[type[RequestModel]]:
    """Every model that reads a body, or a part of one."""
    for each in model.__subclasses__():
        yield each
        yield from subclasses(each)


def test_each_body_has_an_example_that_is_accepted() -> None:
    """The page at /docs fills its form with it. Made up of all fields, a body is refused."""
    document = openapi_document()
    found = 0
    for operations in document["paths"].values():
        for operation in operations.values():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if schema is None:
                continue
            name = schema["$ref"].rpartition("/")[2]
            (example,) = document["components"]["schemas"][name]["examples"]
            (model,) = (model for model in subclasses(RequestModel) if model.__name__ == name)
            model.model_validate(example)
            jsonschema.validate(example, {**schema, "components": document["components"]})
            found += 1
    assert found >= 13


def test_each_route_says_what_a_key_must_have() -> None:
    """Without it the page at /docs has no place for a key, and a client that is made of the document sends none."""
    document = openapi_document()
    ((scheme, meaning),) = document["components"]["securitySchemes"].items()
    assert (meaning["type"], meaning["scheme"]) == ("http", "bearer")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed = needed_scope(method.upper(), path.replace("{model}", "{model:path}"))
            if needed == "nothing":
                assert operation["security"] == []
                continue
            # A server may need no key.
            assert operation["security"] == [{scheme: [] if needed == "key" else [needed]}, {}]
            assert needed == "key" or f"`{needed}`" in operation["description"]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert document["paths"]["/v1/models/{model}"]["get"]["security"][0] == {scheme: []}
