"""What the Python clients are made with: what is refused at once, and how many connections they open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from sera_serve.client import AsyncSeraClient, RetryPolicy, SeraClient, SeraTimeoutError

KINDS = [SeraClient, AsyncSeraClient]
NO_RETRY = RetryPolicy(max_retries=0)
Kind = type[SeraClient | AsyncSeraClient]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout", [None, "5", httpx.Timeout(5), True, [5]])
def test_a_timeout_that_is_no_number_is_named(kind: Kind, timeout: Any) -> None:
    with pytest.raises(TypeError, match=r"timeout is .*; give a number of seconds"):
        kind(timeout=timeout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout", [0, 0.0, -1, float("nan"), float("inf"), 1e7, 10**400])
def test_a_timeout_that_no_system_keeps_is_named(kind: Kind, timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout is .* not above 0 and up to 1,000,000; give a number of seconds"):
        kind(timeout=timeout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number", "error"), [(None, TypeError), (1.5, TypeError), (True, TypeError), (0, ValueError)])
def test_a_wrong_number_of_connections_is_named(kind: Kind, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"max_connections is .*; give"):
        kind(max_connections=number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["secret\n", "secret\r\nX-B: 1", " secret", "secret ", "sécret", "secret\0", 5, None])
def test_a_header_that_cannot_be_sent_is_refused_without_showing_it(kind: Kind, value: Any) -> None:
    with pytest.raises(ValueError, match="the value of 'X-A'") as caught:
        kind(headers={"X-A": value})
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "X A", "X-A:", "X\n", "ä", 5])
def test_what_is_no_name_of_a_header_is_refused(kind: Kind, name: Any) -> None:
    with pytest.raises(ValueError, match="is no name of a header"):
        kind(headers={name: "1"})


def sent(url: str, **arguments: Any) -> httpx.Headers:
    """The headers of a request that a client makes."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"status": "ok"})

    with SeraClient(url, transport=httpx.MockTransport(answer), **arguments) as client:
        client.health()
    return seen[0].headers


def test_headers_are_sent_as_they_are() -> None:
    headers = {"X-A": "", "x-b_1": "a \t~!", "X-C": "1"}
    assert (
        dict(sent("http://test", headers=headers)).items() >= {name.lower(): headers[name] for name in headers}.items()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", ["http://user:pass@test", "http://user@test", "http://:pass@test"])
@pytest.mark.parametrize(
    "key", [{"api_key": "sk-1"}, {"headers": {"authorization": "Bearer sk-1"}}], ids=["api_key", "headers"]
)
def test_a_key_and_a_user_of_the_address_are_refused(kind: Kind, url: str, key: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"in (api_key|headers) and in base_url; give one of them") as caught:
        kind(url, **key)
    assert "sk-1" not in str(caught.value) and "pass" not in str(caught.value).replace("password", "")


def test_a_user_of_the_address_takes_the_place_of_the_environments_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERA_API_KEY", "sk-1")
    assert sent("http://user:pass@test")["authorization"] == "Basic dXNlcjpwYXNz"
    assert sent("http://:@test")["authorization"] == "Bearer sk-1"


@asynccontextmanager
async def streaming_server() -> AsyncIterator[str]:
    """A server whose streams never end. It answers any other request."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await ended.wait()
        else:
            writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 15\r\n\r\n{"status":"ok"}')
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=200)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        ended.set()
        server.close()


def test_a_client_has_connections_for_more_than_a_hundred_streams() -> None:
    async def opened() -> None:
        async with (
            streaming_server() as url,
            AsyncSeraClient(url, timeout=5, retries=NO_RETRY) as client,
            AsyncExitStack() as streams,
        ):
            for _ in range(110):
                await streams.enter_async_context(client.stream("a"))
            assert (await client.health()).status == "ok"

    asyncio.run(opened())


def test_a_client_without_a_free_connection_says_so() -> None:
    async def opened() -> None:
        async with (
            streaming_server() as url,
            AsyncSeraClient(url, timeout=0.3, max_connections=2, retries=NO_RETRY) as client,
        ):
            async with client.stream("a"), client.stream("a"):
                with pytest.raises(SeraTimeoutError, match=r"in use.*/healthz.*max_connections") as caught:
                    await client.health()
                assert not caught.value.sent
            # The streams are closed.
            assert (await client.health()).status == "ok"

    asyncio.run(opened())
