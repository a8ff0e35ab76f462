"""The principal of each request: HTTP decides the principal, and the engine gets it with the request."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from sera_serve.engine import BASE_PRINCIPAL, Principal
from support.answers import refused
from support.stub_engine import StubEngine

GENERATE, CLASSIFY = "/v1/generate", "/v1/classify"


@pytest.mark.parametrize(
    ("path", "body", "principal"),
    [
        (GENERATE, {"adapter": "acme/writer", "prompt": "a"}, Principal("acme")),
        (GENERATE, {"adapter": "acme/writer@v3", "prompt": "a", "stream": True}, Principal("acme")),
        (GENERATE, {"prompt": "a"}, BASE_PRINCIPAL),
        (GENERATE, {"adapter": None, "prompt": "a", "stream": True}, BASE_PRINCIPAL),
        (CLASSIFY, {"adapter": "zoo/sorter@stable", "inputs": ["a"]}, Principal("zoo")),
    ],
)
def test_the_principal_has_the_tenant_of_the_adapter(
    client: httpx.Client, engine: StubEngine, path: str, body: dict[str, Any], principal: Principal
) -> None:
    assert client.post(path, json=body).status_code == 200
    assert engine.principals == [principal]


@pytest.mark.parametrize("adapter", ["acme", "acme/../x", "_base/x", "Acme/x", "acme/x@"])
@pytest.mark.parametrize(
    ("path", "body"),
    [(GENERATE, {"prompt": "a"}), (GENERATE, {"prompt": "a", "stream": True}), (CLASSIFY, {"inputs": ["a"]})],
)
def test_an_unreadable_reference_never_reaches_the_engine(
    client: httpx.Client, engine: StubEngine, path: str, body: dict[str, Any], adapter: str
) -> None:
    refused(client.post(path, json={"adapter": adapter} | body), 422, "invalid_adapter_name")
    assert engine.principals == []
