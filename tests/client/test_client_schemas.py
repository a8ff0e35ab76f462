"""The clients' types are those of the server."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from pydantic import BaseModel

from sera_serve.client import SeraAPIError, ServerError, answers, calls
from sera_serve.client.errors import _BY_CODE, InvalidRequestError, api_error
from sera_serve.server import health
from sera_serve.server.native import sampling, schemas
from sera_serve.server.openai import embeddings, models

HTTP = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (answers.Usage, schemas.Usage),
        (answers.LikelyToken, sampling.LikelyToken),
        (answers.ScoredToken, sampling.ScoredToken),
        (answers.Choice, schemas.Choice),
        (answers.Generation, schemas.ChoicesResponse),
        (answers.GenerateEvent, schemas.GenerateEvent),
        (answers.Classification, schemas.Classification),
        (answers.LabelSet, schemas.LabelSetResult),
        (answers.Score, schemas.ScoreResult),
        (answers.Span, schemas.FoundSpan),
        (answers.Spans, schemas.SpansResult),
        (answers.Classified, schemas.ClassifyResponse),
        (answers.ClassifiedEach, schemas.ClassifyEachResponse),
        (answers.Embedding, embeddings.Embedding),
        (answers.Embeddings, embeddings.EmbeddingResponse),
        (answers.EmbeddingUsage, embeddings.EmbeddingUsage),
        (answers.PublishedAdapter, schemas.PublishedAdapter),
        (answers.AdapterSummary, schemas.AdapterSummary),
        (answers.AdapterDetail, schemas.AdapterDetail),
        (answers.AdapterPage, schemas.AdapterList),
        (answers.DeletedAdapter, schemas.DeletedAdapter),
        (answers.PinnedAdapter, schemas.PinnedAdapter),
        (answers.Model, models.Model),
        (answers.ModelPage, models.ModelList),
        (answers.Health, health.Health),
        (answers.Readiness, health.Readiness),
    ],
)
def test_every_answer_has_the_servers_fields(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    # `object` is the same for every answer of its kind.
    assert set(ours.model_fields) == set(theirs.model_fields) - {"object"}


def test_a_single_answer_has_the_fields_of_a_choice() -> None:
    single = set(schemas.GenerateResponse.model_fields)
    assert single == (set(answers.Generation.model_fields) | set(answers.Choice.model_fields)) - {"choices", "index"}


REQUESTS: list[tuple[type, type[BaseModel]]] = [
    (calls.GenerateOptions, schemas.GenerateRequest),
    (calls.ClassifyOptions, schemas.ClassifyRequest),
    (calls.EmbedOptions, embeddings.EmbeddingRequest),
]


@pytest.mark.parametrize(("options", "request_model"), REQUESTS)
def test_an_option_may_be_none_where_the_servers_field_may_be_null(
    options: type, request_model: type[BaseModel]
) -> None:
    for name, hint in get_type_hints(options).items():
        theirs = request_model.model_fields[name].annotation
        assert (NoneType in get_args(hint)) == (NoneType in get_args(theirs)), name


@pytest.mark.parametrize("stop", ["a longer one", ["a longer one"], ("a longer one",)])
def test_one_text_may_be_the_stop(stop: str | Sequence[str]) -> None:
    assert str in get_args(get_type_hints(calls.GenerateOptions)["stop"])
    for call in (calls.generate("a", None, {"stop": stop}), calls.stream("a", None, {"stop": stop})):
        assert call.json is not None and list(call.json["stop"]) == ["a longer one"]
        schemas.GenerateRequest.model_validate_json(json.dumps(call.json))


@pytest.mark.parametrize(
    ("options", "request_model", "named"),
    [
        (calls.GenerateOptions, schemas.GenerateRequest, {"adapter", "prompt", "token_ids", "stream"}),
        (calls.ClassifyOptions, schemas.ClassifyRequest, {"adapter", "adapters", "inputs"}),
        (
            calls.EmbedOptions,
            embeddings.EmbeddingRequest,
            # The vectors are always those of the base's size, sent as base64.
            {"model", "input", "encoding_format", "dimensions", "user"},
        ),
    ],
)
def test_every_field_of_a_request_is_an_option(options: type, request_model: type[BaseModel], named: set[str]) -> None:
    assert set(options.__annotations__) == set(request_model.model_fields) - named


def test_every_documented_error_has_a_class() -> None:
    rows = re.findall(r"^\| (\d+).*? \| `(\w+)` \| (.*) \|$", HTTP.split("\n## Errors\n")[1], re.MULTILINE)
    seen = set()
    for status, kind, codes in rows:
        for code in re.findall(r"`(\w+)`", codes):
            seen.add(code)
            body = {"error": {"message": "m", "type": kind, "param": None, "code": code}}
            error = api_error(int(status), ErrorBody(**body).model_dump_json().encode())
            assert type(error) is not SeraAPIError
            assert isinstance(error, ServerError) == (int(status) in (500, 507))
            if kind == "invalid_request_error" and status != "409":
                assert isinstance(error, InvalidRequestError)
    assert set(_BY_CODE) <= seen


class ErrorBody(BaseModel):
    error: dict[str, str | None]
