"""Keys of the Python clients: where they come from, where they go, and what a refusal is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from sera_serve.client import (
    AsyncSeraClient,
    AuthenticationError,
    PermissionDeniedError,
    RetryPolicy,
    SeraAPIError,
    SeraClient,
)

NO_RETRY = RetryPolicy(max_retries=0)


def refusing(status: int, kind: str, code: str, seen: list[str | None]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        error = {"message": "no", "type": kind, "param": "Authorization", "code": code}
        return httpx.Response(status, json={"error": error})

    return answer


@pytest.mark.parametrize(
    ("status", "kind", "code", "error"),
    [
        (401, "authentication_error", "invalid_api_key", AuthenticationError),
        (403, "permission_error", "insufficient_scope", PermissionDeniedError),
        (403, "permission_error", "not_your_tenant", PermissionDeniedError),
    ],
)
def test_refusals_of_keys_are_typed_and_not_sent_again(
    status: int, kind: str, code: str, error: type[SeraAPIError]
) -> None:
    seen: list[str | None] = []
    transport = httpx.MockTransport(refusing(status, kind, code, seen))
    with SeraClient(api_key="sk-sera-1", transport=transport) as client, pytest.raises(error) as caught:
        client.generate("a")
    assert (caught.value.code, caught.value.status) == (code, status)

    async def asynchronous() -> None:
        async with AsyncSeraClient(api_key="sk-sera-2", transport=transport) as client:
            await client.adapters.list()

    with pytest.raises(error):
        asyncio.run(asynchronous())
    assert seen == ["Bearer sk-sera-1", "Bearer sk-sera-2"]


@pytest.mark.parametrize(
    ("key", "variable", "headers", "sent"),
    [
        (None, None, None, None),
        (None, "sk-1\n", None, "Bearer sk-1"),
        (None, "", None, None),
        ("sk-2", "sk-1", None, "Bearer sk-2"),
        (None, "sk-1", {"authorization": "Basic YTpi"}, "Basic YTpi"),
        ("sk-2", None, {"X-Trace": "1"}, "Bearer sk-2"),
    ],
)
def test_where_the_key_comes_from(
    key: str | None,
    variable: str | None,
    headers: dict[str, str] | None,
    sent: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SERA_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("SERA_API_KEY", variable)
    seen: list[str | None] = []
    transport = httpx.MockTransport(refusing(401, "authentication_error", "invalid_api_key", seen))
    client = SeraClient(api_key=key, headers=headers, transport=transport, retries=NO_RETRY)
    with client, pytest.raises(AuthenticationError):
        client.generate("a")
    assert seen == [sent]


@pytest.mark.parametrize("key", ["sk 1", "sk\n1", "schlüssel"])
def test_what_is_no_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="keys create") as caught:
        SeraClient(api_key=key)
    assert key not in str(caught.value)


def test_two_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="one of them"):
        SeraClient(api_key="sk-1", headers={"Authorization": "Bearer sk-2"})
