"""POST /v1/classify over a stub engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from support.answers import refused
from support.stub_engine import CRASHES, OVERLOADED, StubEngine


def test_results_come_in_the_order_of_the_inputs(client: httpx.Client) -> None:
    response = client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["b", "a", "☠"]})
    assert response.status_code == 200
    assert response.json() == {
        "adapter": "demo/sorter",
        "version": 2,
        "results": [{"label": text, "probabilities": {text: 0.75, "other": 0.25}} for text in ("b", "a", "☠")],
    }


@pytest.mark.parametrize(
    ("adapter", "results"),
    [
        ("demo/number", [{"score": 0.5}, {"score": 5.5}]),
        (
            "demo/labels",
            [{"labels": [text], "probabilities": {text: 0.75, "other": 0.125}} for text in ("b", "a long text")],
        ),
        (
            "demo/spans",
            [
                {"spans": [{"start": 0, "end": 1, "label": "first", "score": 0.5, "text": "b"}], "truncated": False},
                {"spans": [], "truncated": True},
            ],
        ),
    ],
)
def test_results_have_the_form_of_the_adapters_task(
    client: httpx.Client, adapter: str, results: list[dict[str, Any]]
) -> None:
    body = {"adapter": adapter, "inputs": ["b", "a long text"]}
    assert client.post("/v1/classify", json=body).json() == {"adapter": adapter, "version": 2, "results": results}


def test_adapters_of_different_tasks_answer_one_call(client: httpx.Client) -> None:
    names = ["demo/number", "demo/sorter", "demo/spans"]
    answers = client.post("/v1/classify", json={"adapters": names, "inputs": ["b"]}).json()["adapters"]
    assert [set(answer["results"][0]) for answer in answers] == [
        {"score"},
        {"label", "probabilities"},
        {"spans", "truncated"},
    ]


def test_a_pair_reaches_the_engine_as_a_pair(client: httpx.Client) -> None:
    inputs = ["a", {"text": "b", "text_pair": "c"}, {"text_pair": "e", "text": "d"}]
    response = client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": inputs})
    assert [row["label"] for row in response.json()["results"]] == ["a", "b | c", "d | e"]


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        ("", "", "a text that is not empty"),
        (None, "", "a text that is not empty"),
        (["a", "b"], "", "a text that is not empty"),
        ({}, "", '{"text", "text_pair"} for a sentence pair'),
        ({"text": "a"}, "", '{"text", "text_pair"} for a sentence pair'),
        ({"text": "a", "text_pair": "b", "more": "c"}, "", '{"text", "text_pair"} for a sentence pair'),
        ({"text": "a", "text_pair": ""}, ".text_pair", "must be a text, and not empty"),
        ({"text": 5, "text_pair": "b"}, ".text", "must be a text, and not empty"),
    ],
)
def test_another_input_is_refused_by_its_place(client: httpx.Client, wrong: Any, field: str, words: str) -> None:
    response = client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["a", wrong]})
    error = refused(response, 422, "invalid_value")
    assert error["param"] == f"inputs[1]{field}"
    assert words in error["message"]


def test_several_adapters_give_an_answer_each(client: httpx.Client, engine: StubEngine) -> None:
    body = {"adapters": ["demo/sorter", "demo/other"], "inputs": ["b", "a"], "priority": "low"}
    response = client.post("/v1/classify", json=body)
    assert response.status_code == 200
    results = [{"label": text, "probabilities": {text: 0.75, "other": 0.25}} for text in ("b", "a")]
    assert response.json() == {
        "adapters": [{"adapter": name, "version": 2, "results": results} for name in ("demo/sorter", "demo/other")]
    }
    assert engine.classified == [("low", None)] * 2
    assert {principal.tenant for principal in engine.principals} == {"demo"}


def test_a_weighted_sum_has_no_version(client: httpx.Client) -> None:
    parts = [{"adapter": "demo/a", "weight": 1}, {"adapter": "demo/b@v2", "weight": -0.5}]
    answer = client.post("/v1/classify", json={"adapter": parts, "inputs": ["b"]}).json()
    assert (answer["adapter"], answer["version"]) == ("1*demo/a + -0.5*demo/b@v2", None)


def test_priority_and_timeout_reach_the_engine(client: httpx.Client, engine: StubEngine) -> None:
    body = {"adapter": "demo/sorter", "inputs": ["a"]}
    assert client.post("/v1/classify", json=body).status_code == 200
    assert client.post("/v1/classify", json=body | {"priority": "low", "timeout_s": 2.5}).status_code == 200
    assert engine.classified == [("normal", None), ("low", 2.5)]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"adapter": "a/b", "inputs": ["a"], "priority": "urgent"}, "invalid_value", "priority"),
        ({"adapter": "a/b", "inputs": ["a"], "timeout_s": -1}, "invalid_value", "timeout_s"),
        ({"inputs": ["a"]}, "missing_field", "adapter"),
        ({"adapter": "a/b"}, "missing_field", "inputs"),
        ({"adapter": None, "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": "a/b", "inputs": "a"}, "invalid_value", "inputs"),
        ({"adapter": "", "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": "a" * 257, "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": 5, "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": [], "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": [{"adapter": "a/b", "weight": 1}] * 9, "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": ["a/b"], "inputs": ["a"]}, "invalid_value", "adapter[0]"),
        ({"adapter": [{"adapter": "a/b"}], "inputs": ["a"]}, "invalid_value", "adapter[0]"),
        ({"adapter": [{"adapter": "a/b", "weight": "1"}], "inputs": ["a"]}, "invalid_value", "adapter[0].weight"),
        ({"adapter": [{"adapter": "a/b", "weight": True}], "inputs": ["a"]}, "invalid_value", "adapter[0].weight"),
        ({"adapter": [{"adapter": "a/b", "weight": 1e7}], "inputs": ["a"]}, "invalid_value", "adapter[0].weight"),
        ({"adapter": [{"adapter": 5, "weight": 1}], "inputs": ["a"]}, "invalid_value", "adapter[0].adapter"),
        ({"adapter": [{"adapter": "a/b", "weight": 1, "x": 1}], "inputs": ["a"]}, "invalid_value", "adapter[0]"),
        ({"adapter": "a/b", "adapters": ["a/b"], "inputs": ["a"]}, "invalid_value", "adapters"),
        ({"adapters": [], "inputs": ["a"]}, "invalid_value", "adapters"),
        ({"adapters": ["a/b"] * 129, "inputs": ["a"]}, "invalid_value", "adapters"),
        ({"adapters": ["a/b", ""], "inputs": ["a"]}, "invalid_value", "adapters[1]"),
        ({"adapters": ["a/b", "c/b"], "inputs": ["a"]}, "invalid_request", "adapters[1]"),
        ({"adapters": ["a/b", "x"], "inputs": ["a"]}, "invalid_adapter_name", "adapters[1]"),
        (
            {"adapter": [{"adapter": "a/b", "weight": 1}, {"adapter": "c/b", "weight": 1}], "inputs": ["a"]},
            "invalid_request",
            "adapter[1].adapter",
        ),
        ({"adapter": "a/b", "inputs": []}, "invalid_value", "inputs"),
        ({"adapter": "a/b", "inputs": ["a", ""]}, "invalid_value", "inputs[1]"),
        ({"adapter": "a/b", "inputs": ["a", 5]}, "invalid_value", "inputs[1]"),
        ({"adapter": "a/b", "inputs": ["a"] * 1025}, "invalid_value", "inputs"),
        ({"adapter": "a/b", "inputs": ["a"], "input": "b"}, "unknown_field", "input"),
    ],
)
def test_a_wrong_field_is_named(client: httpx.Client, body: dict[str, Any], code: str, param: str) -> None:
    assert refused(client.post("/v1/classify", json=body), 422, code)["param"] == param


@pytest.mark.parametrize(
    ("adapter", "text", "status", "code"),
    [
        ("demo/writer", "a", 422, "unsupported_task"),
        ("demo/sorter", OVERLOADED, 503, "overloaded"),
        ("demo/sorter", CRASHES, 500, "internal_error"),
    ],
)
def test_refusals_of_the_engine_keep_their_status(
    client: httpx.Client, adapter: str, text: str, status: int, code: str
) -> None:
    refused(client.post("/v1/classify", json={"adapter": adapter, "inputs": [text]}), status, code)
