"""Reads and checks the responses of a server."""

from __future__ import annotations

import json
from typing import Any

import httpx

FAMILIES = {
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Return the error of a refusal, and check the shape of the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    family = FAMILIES.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert (error["code"], error["type"]) == (code, family)
    assert 10 < len(error["message"]) <= 600
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert response.headers["x-request-id"].startswith("req-")
    return error


def events(text: str) -> list[Any]:
    """Return the data of server-sent events: parsed JSON, or the text `[DONE]`."""
    assert text.endswith("\n\n")
    found = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
