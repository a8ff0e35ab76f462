"""What the clients send again, by scripted answers. Both clients take the same steps."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from sera_serve.client import (
    AsyncSeraClient,
    InvalidAdapterError,
    InvalidAnswerError,
    RateLimitError,
    RetryPolicy,
    SeraAPIError,
    SeraClient,
    SeraConnectionError,
    SeraTimeoutError,
    UnavailableError,
    async_client,
    calls,
    exchange,
    sync_client,
)
from sera_serve.client.errors import api_error

QUICK = RetryPolicy(max_retries=3, max_total_s=100, first_delay_s=0.001)
GENERATION = {
    "id": "gen-1",
    "adapter": None,
    "version": None,
    "text": "a",
    "token_ids": [1],
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
PUBLISHED = {"adapter": "acme/one", "version": 1, "digest": "00", "warnings": []}
DELETED = {"adapter": "acme/one", "deleted": True}
Reply = httpx.Response | Exception


def refusal(status: int, code: str | None, retry_after: str | None = None) -> httpx.Response:
    headers = {"x-request-id": "req-1"} | ({} if retry_after is None else {"Retry-After": retry_after})
    if code is None:
        return httpx.Response(status, headers=headers, text="<html>bad gateway</html>")
    error = {"message": "later", "type": "some_error", "param": "adapter", "code": code}
    return httpx.Response(status, headers=headers, json={"error": error})


class Script:
    """Gives its replies one after the other, and records the requests and the waits."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = iter(replies)
        self.bodies: list[bytes] = []
        self.waits: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.read())
        return self._next(request)

    async def asynchronous(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(await request.aread())
        return self._next(request)

    def _next(self, request: httpx.Request) -> httpx.Response:
        reply = next(self._replies)
        if isinstance(reply, Exception):
            raise reply
        reply.request = request
        return reply

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def wait_async(self, seconds: float) -> None:
        self.waits.append(seconds)


CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda client: client.generate("a"),
    "list": lambda client: client.adapters.list(),
    "upload": lambda client: client.adapters.upload("acme/one", b"bundle"),
    "delete": lambda client: client.adapters.delete("acme/one"),
    "pin": lambda client: client.adapters.pin("acme/one"),
    "unpin": lambda client: client.adapters.unpin("acme/one"),
    "ready": lambda client: client.ready(),
}
CHANGES = ["upload", "delete", "pin", "unpin"]
ANSWERS = {
    "generate": GENERATION,
    "list": {"adapters": [], "next": None},
    "upload": PUBLISHED,
    "delete": DELETED,
    "pin": {"adapter": "acme/one", "version": 1, "pinned": True},
    "unpin": {"adapter": "acme/one", "version": 1, "pinned": False},
    "ready": {"status": "ready", "store": "writable"},
}
Run = Callable[[str, Script, RetryPolicy], Any]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Make one call with a client of either kind, by a script and without real waits."""

    def sync(name: str, script: Script, policy: RetryPolicy) -> Any:
        monkeypatch.setattr(sync_client.time, "sleep", script.wait)
        with SeraClient("http://test", retries=policy, transport=httpx.MockTransport(script)) as client:
            return CALLS[name](client)

    async def awaited(name: str, script: Script, policy: RetryPolicy) -> Any:
        monkeypatch.setattr(async_client.anyio, "sleep", script.wait_async)
        transport = httpx.MockTransport(script.asynchronous)
        async with AsyncSeraClient("http://test", retries=policy, transport=transport) as client:
            return await CALLS[name](client)

    if request.param == "sync":
        return sync
    return lambda name, script, policy: asyncio.run(awaited(name, script, policy))


def done(name: str) -> httpx.Response:
    return httpx.Response(201 if name == "upload" else 200, json=ANSWERS[name])


@pytest.mark.parametrize("name", [name for name in CALLS if name != "ready"])
def test_refusals_are_sent_again_after_the_named_time(run: Run, name: str) -> None:
    script = Script(
        refusal(429, "tenant_overloaded", "7"), refusal(503, "overloaded", "2"), refusal(503, "overloaded"), done(name)
    )
    assert run(name, script, QUICK) is not None
    # Never earlier than the server asked for; where it named no time, soon.
    assert len(script.waits) == 3
    assert 7 <= script.waits[0] < 7.1 and 2 <= script.waits[1] < 2.1 and 0 < script.waits[2] < 0.1
    # Each time the whole request.
    assert len(script.bodies) == 4
    assert all(b"bundle" in body for body in script.bodies) or name != "upload"


def test_retries_are_bounded_in_number(run: Run) -> None:
    script = Script(*(refusal(503, "overloaded", "1") for _ in range(9)))
    with pytest.raises(UnavailableError) as caught:
        run("generate", script, QUICK)
    assert len(script.bodies) == 4
    error = caught.value
    assert (error.message, error.type, error.param, error.code) == ("later", "some_error", "adapter", "overloaded")
    assert (error.status, error.request_id, error.retry_after) == (503, "req-1", 1)


def test_retries_are_bounded_in_time(run: Run) -> None:
    # The time that the server names is past the end: the caller learns it at once.
    script = Script(refusal(429, "tenant_overloaded", "101"), done("generate"))
    with pytest.raises(RateLimitError) as caught:
        run("generate", script, QUICK)
    assert caught.value.retry_after == 101
    assert (len(script.bodies), script.waits) == (1, [])


def test_no_retries_where_they_are_off(run: Run) -> None:
    script = Script(refusal(429, "tenant_overloaded", "0"), done("generate"))
    with pytest.raises(RateLimitError):
        run("generate", script, RetryPolicy(max_retries=0))
    assert len(script.bodies) == 1


@pytest.mark.parametrize("name", [*CHANGES, "generate", "list"])
def test_a_request_that_was_not_sent_is_sent_again(run: Run, name: str) -> None:
    script = Script(httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), done(name))
    run(name, script, QUICK)
    assert len(script.bodies) == 3
    script = Script(*(httpx.ConnectError("refused") for _ in range(9)))
    with pytest.raises(SeraConnectionError, match=r"the server at http://.* cannot be reached") as caught:
        run(name, script, QUICK)
    assert not caught.value.sent
    assert len(script.bodies) == 4


BROKEN = [httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError]


@pytest.mark.parametrize(
    ("name", "fault"),
    [*itertools.product([*CHANGES, "generate"], [*BROKEN, httpx.ReadTimeout]), ("list", httpx.ReadTimeout)],
)
def test_a_request_whose_answer_was_lost_is_not(run: Run, name: str, fault: type[httpx.TransportError]) -> None:
    script = Script(fault("lost"), done(name))
    with pytest.raises(SeraConnectionError) as caught:
        run(name, script, QUICK)
    assert caught.value.sent
    assert isinstance(caught.value, SeraTimeoutError) == (fault is httpx.ReadTimeout)
    assert len(script.bodies) == 1
    assert ("may have done it" in caught.value.message) == (name in CHANGES)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_request_that_only_reads_is_sent_again_when_its_connection_broke(
    run: Run, fault: type[httpx.TransportError]
) -> None:
    script = Script(fault("lost"), fault("lost"), done("list"))
    assert run("list", script, QUICK).adapters == []
    assert len(script.bodies) == 3 and len(script.waits) == 2
    # As often as any other, and no probe is.
    for name, most in (("list", 4), ("ready", 1)):
        script = Script(*(fault("lost") for _ in range(9)))
        with pytest.raises(SeraConnectionError, match="was lost") as caught:
            run(name, script, QUICK)
        assert caught.value.sent and len(script.bodies) == most


@pytest.mark.parametrize("name", [*CHANGES, "generate", "list"])
@pytest.mark.parametrize("code", ["engine_unavailable", "store_unavailable", None])
def test_a_change_that_may_have_begun_is_not_sent_again(run: Run, name: str, code: str | None) -> None:
    script = Script(refusal(503, code, "1"), done(name))
    if name in CHANGES:
        with pytest.raises(UnavailableError):
            run(name, script, QUICK)
        assert len(script.bodies) == 1
    else:
        run(name, script, QUICK)
        assert len(script.bodies) == 2


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        *(("generate", status, "some_code") for status in (400, 403, 404, 408, 409, 422, 500, 502, 504, 507, 307)),
        ("generate", 503, "base_overflow"),
        ("ready", 503, "engine_unavailable"),
    ],
)
def test_other_refusals_are_not_sent_again(run: Run, name: str, status: int, code: str) -> None:
    script = Script(refusal(status, code, "0"), done(name))
    with pytest.raises(SeraAPIError) as caught:
        run(name, script, QUICK)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert len(script.bodies) == 1


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"error": "no"}', b"[1]", b"[" * 100_000, b"\xff", b"null"])
def test_a_refusal_of_another_form_has_no_code(run: Run, body: bytes) -> None:
    script = Script(httpx.Response(502, content=body))
    with pytest.raises(SeraAPIError, match="status 502") as caught:
        run("generate", script, QUICK)
    assert (caught.value.code, caught.value.request_id, caught.value.status) == (None, None, 502)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("name", ["generate", "list"])
def test_a_redirection_is_an_error_that_names_its_target(run: Run, status: int, name: str) -> None:
    script = Script(httpx.Response(status, headers={"Location": "https://other/x"}, text="Moved"))
    with pytest.raises(SeraAPIError, match=rf"status {status}, .*'https://other/x'.*base_url"):
        run(name, script, QUICK)
    far = Script(httpx.Response(status, headers={"Location": "https://other/" + "x" * 5000}))
    with pytest.raises(SeraAPIError) as caught:
        run(name, far, QUICK)
    assert len(caught.value.message) < 500
    # Without a target, or with an error of the server's own, there is none to name.
    for reply in (httpx.Response(status), refusal(status, "moved")):
        with pytest.raises(SeraAPIError) as caught:
            run(name, Script(reply), QUICK)
        assert "base_url" not in caught.value.message


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", json.dumps({**GENERATION, "text": 3}).encode()])
def test_an_answer_of_another_form_is_an_error(run: Run, body: bytes) -> None:
    with pytest.raises(InvalidAnswerError, match="/v1/generate"):
        run("generate", Script(httpx.Response(200, content=body)), QUICK)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 201 Created\r\nContent-Length: 90\r\n\r\n{"])
def test_an_upload_that_a_real_server_swallowed_is_not_sent_again(kind: str, begin: bytes) -> None:
    received: list[int] = []

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    count = 0
                    while count < 1 << 20:
                        count += len(connection.recv(1 << 16))
                    # What is left of the body.
                    connection.settimeout(0.05)
                    with suppress(TimeoutError):
                        while connection.recv(1 << 16):
                            pass
                    connection.sendall(begin)
                    received.append(count)

    async def upload(address: str) -> None:
        async with AsyncSeraClient(address, retries=QUICK) as client:
            await client.adapters.upload("acme/one", bytes(1 << 20))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with pytest.raises(SeraConnectionError, match="may have done it"):
                if kind == "async":
                    asyncio.run(upload(address))
                else:
                    with SeraClient(address, retries=QUICK) as client:
                        client.adapters.upload("acme/one", bytes(1 << 20))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
    assert len(received) == 1 and not thread.is_alive()


def waits(policy: RetryPolicy, retry_after: str | None) -> Iterator[float]:
    """The waits of a call that is always refused."""
    call = calls.health() if retry_after == "probe" else calls.list_models(1, None)
    tries = exchange.Tries(call, policy)
    with suppress(SeraAPIError):
        while True:
            yield tries.delay_s(exchange.refusal(refusal(503, "overloaded", retry_after)))


def test_delays_double_up_to_their_limit_and_vary() -> None:
    policy = RetryPolicy(max_retries=200, max_total_s=1e9)
    found = list(waits(policy, None))
    for seconds, longest in zip(found, itertools.chain([0.5, 1, 2, 4], itertools.repeat(8.0)), strict=False):
        assert longest / 2 <= seconds <= longest
    assert len(found) == 200
    assert len(set(found)) > 100


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("30", 30, 31),
        ("Fri, 02 Jan 2026 00:00:00 GMT", 0, 1),
        *((value, 0, 1) for value in ("", "-5", "1e9", "inf", "nan", "soon", "1.5", "1" * 400, "Mon, 99 Jan 2026")),
        ("Fri, 02 Jan 2026 00:00:00 +" + "9" * 20, 0, 1),
    ],
)
def test_times_that_the_server_names(value: str, least: float, most: float) -> None:
    policy = RetryPolicy(max_retries=1, max_total_s=100, first_delay_s=1)
    (seconds,) = waits(policy, value)
    assert least <= seconds <= most


def test_a_date_that_the_server_names() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    (seconds,) = waits(RetryPolicy(max_retries=1, max_total_s=100, first_delay_s=1), date)
    assert 30 <= seconds <= 41


@pytest.mark.parametrize("value", ["999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_time_far_off_is_not_waited_for(value: str) -> None:
    assert list(waits(QUICK, value)) == []


ADDRESSES = [
    "localhost:8000",
    "http://[::1",
    "http://",
    "ftp://localhost",
    "",
    "/v1",
    "http://localhost:port",
    "http://\x00",
    "http://localhost:8000?key=1",
    "http://localhost:8000/#v1",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("kind", [SeraClient, AsyncSeraClient])
def test_what_is_no_address_is_refused_at_once(kind: type[SeraClient | AsyncSeraClient], address: str) -> None:
    with pytest.raises(ValueError, match=r"base_url .* http://HOST:PORT"):
        kind(address)


@pytest.mark.parametrize("name", [*CHANGES, "generate", "list"])
def test_a_request_to_no_protocol_was_not_sent(run: Run, name: str) -> None:
    with pytest.raises(SeraConnectionError, match=r"the server at http://.* cannot be reached") as caught:
        run(name, Script(httpx.UnsupportedProtocol("no protocol")), RetryPolicy(max_retries=0))
    assert not caught.value.sent


@pytest.mark.parametrize("code", ["wrong_base", "wrong_task", "wrong_shape", "adapter_overflow", "adapter_too_large"])
def test_a_refused_bundle_is_an_invalid_adapter(code: str) -> None:
    body = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": code}}
    assert isinstance(api_error(422, json.dumps(body).encode()), InvalidAdapterError)
