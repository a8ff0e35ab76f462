"""POST /v1/classify over a stub engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from answers import refused
from stub_engine import CRASHES, OVERLOADED


def test_results_come_in_the_order_of_the_inputs(client: httpx.Client) -> None:
    response = client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["b", "a", "☠"]})
    assert response.status_code == 200
    assert response.json() == {
        "adapter": "demo/sorter",
        "version": 2,
        "results": [{"label": text, "probabilities": {text: 0.75, "other": 0.25}} for text in ("b", "a", "☠")],
    }


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"inputs": ["a"]}, "missing_field", "adapter"),
        ({"adapter": "a/b"}, "missing_field", "inputs"),
        ({"adapter": None, "inputs": ["a"]}, "invalid_value", "adapter"),
        ({"adapter": "a/b", "inputs": "a"}, "invalid_value", "inputs"),
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
