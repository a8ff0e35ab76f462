"""Reads and checks the responses of a server."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx

from adapters_store import AdapterStore, BaseInfo
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.stub_engine import StubEngine

FAMILIES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Return the error of a refusal. Its shape is checked, and that the OpenAPI document has its status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    family = FAMILIES.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert (error["code"], error["type"]) == (code, family)
    assert 10 < len(error["message"]) <= 600
    # OpenAI's clients would repeat these by themselves.
    assert response.headers.get("x-should-retry") == ("false" if status in (409, 504, 507) else None)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert response.headers["x-request-id"].startswith("req-")
    check_declared(response)
    return error


# An app needs one; the document has nothing of it.
BASE = BaseInfo(name="base", architecture="A", config_digest="0" * 64, weights_digest="0" * 64, hidden_size=1)


@functools.cache
def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the server."""
    app = build_app(
        StubEngine(cast(FrozenBase, SimpleNamespace(image_tower=None, info=BASE))),
        cast(AdapterStore, SimpleNamespace(root=Path(os.devnull), check=None)),
        ServeSettings(),
    )
    return app.openapi()


def check_declared(response: httpx.Response) -> None:
    """Check that the OpenAPI document has the status of a response for its path and method."""
    method = response.request.method.lower().replace("head", "get")
    for template, operations in openapi_document()["paths"].items():
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), response.request.url.path):
            if method in operations:
                declared = operations[method]["responses"]
                assert str(response.status_code) in declared, f"{method} {template}: {response.status_code}"
            else:
                assert response.status_code in (204, 400, 403, 405, 413), f"{method} {template}"


def events(text: str) -> list[Any]:
    """Return the data of server-sent events: parsed JSON, or the text `[DONE]`."""
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
