"""The bounds of one connection: bytes, requests and time, and what a client learns that exceeds them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from sera_serve.config import ServeSettings
from sera_serve.server import protocol, refusals
from sera_serve.server.protocol import MAX_HEADERS, MAX_PIPELINED, MAX_URI_BYTES
from sera_serve.server.refusals import RefusalLog
from sera_serve.server.unread import UnreadResponses
from support.live_server import live_server, wait_until
from support.raw_http import RawClient, prompt_loop

KIB = 1 << 10
LARGE = 12 << 20
# Short, and far longer than a busy machine delays a healthy client.
TIMEOUT_S = 0.6
POST = b"POST /length HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Refusals:
    """Counts as the server's metrics do."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def count_refusal(self, code: str) -> None:
        self.codes.append(code)


class Script:
    """An app whose routes do what a test needs."""

    def __init__(self, **settings: Any) -> None:
        self.app = FastAPI(lifespan=self._lifespan)
        limits = {"header_timeout_s": TIMEOUT_S, "body_timeout_s": TIMEOUT_S, "write_timeout_s": TIMEOUT_S} | settings
        self.app.state.settings = ServeSettings(**limits)
        self.app.state.metrics = self.metrics = Refusals()
        self.proceed = threading.Event()
        self.states: list[dict[str, Any]] = []
        self.cut_off = 0
        for path, route in (
            ("/length", self.length),
            ("/v1/adapters", self.length),
            ("/held", self.held),
            ("/late", self.late),
            ("/early", self.early),
            ("/endless", self.endless),
            ("/pieces", self.pieces),
            ("/large", self.large),
        ):
            self.app.add_api_route(path, route, methods=["GET", "POST"], response_model=None)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.loop = asyncio.get_running_loop()
        yield

    async def length(self, request: Request) -> Response:
        """Answer how long the body is."""
        self.states.append(request.scope["state"])
        return Response(str(len(await request.body())))

    async def held(self, request: Request) -> Response:
        """Answer when the test says so."""
        try:
            while not self.proceed.is_set():
                if await request.is_disconnected():
                    self.cut_off += 1
                    break
                await asyncio.sleep(0.01)
            return Response("held")
        except asyncio.CancelledError:
            self.cut_off += 1
            raise

    async def late(self, request: Request) -> Response:
        """Read the body only after more time than a client may take to send it."""
        await asyncio.sleep(TIMEOUT_S * 2)
        return await self.length(request)

    async def early(self) -> Response:
        """Answer without reading the body."""
        return Response("early", 413)

    async def pieces(self) -> Response:
        """Send three pieces, one of them empty, without their length."""

        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b"one", b"", b"three"):
                yield piece
                await asyncio.sleep(0)

        return StreamingResponse(pieces(), headers={"X-Kind": "stream"})

    async def large(self, request: Request) -> Response:
        """Answer with more than the network's buffers take."""
        self.states.append(request.scope["state"])
        return Response(bytes(LARGE))

    async def endless(self) -> Response:
        """Send without an end."""

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                self.cut_off += 1

        return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def module_script() -> Iterator[Script]:
    script = Script()
    with live_server(script.app) as script.url:  # type: ignore[attr-defined]
        yield script


@pytest.fixture
def script(module_script: Script) -> Script:
    module_script.proceed.clear()
    module_script.metrics.codes.clear()
    module_script.states.clear()
    module_script.cut_off = 0
    return module_script


@pytest.fixture
def url(script: Script) -> str:
    return script.url  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def client(url: str) -> Iterator[RawClient]:
    with RawClient(url) as client:
        yield client


def get(path: str = "/length", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


# Bytes of line and headers.


@pytest.mark.parametrize(
    ("begin", "piece", "status", "code"),
    [
        (b"GET /length HTTP/1.1\r\nHost: x\r\nX: ", b"a", 431, "headers_too_large"),
        (b"GET /length HTTP/1.1\r\nHost: x\r\n", b"a", 431, "headers_too_large"),
        (b"GET /length HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n", 431, "headers_too_large"),
        (b"GET /length HTTP/1.1\r\nHost: x\r\nX:", b" ", 431, "headers_too_large"),
        (b"GET /", b"a", 414, "uri_too_long"),
        (b"GET /?", b"a&", 414, "uri_too_long"),
        (CHUNKED + b"1\r\na\r\n0\r\nX: ", b"a", 400, "bad_request"),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n", 400, "bad_request"),
        (CHUNKED + b"1;", b"a", 400, "bad_request"),
        (CHUNKED, b"0", 400, "bad_request"),
    ],
    ids=["value", "name", "headers", "blanks", "path", "query", "trailer", "trailers", "extension", "size"],
)
def test_what_has_no_end_is_refused(
    script: Script, client: RawClient, begin: bytes, piece: bytes, status: int, code: str
) -> None:
    with prompt_loop(script.loop):
        client.send(begin)
        # The server takes no more than the network's buffers and what it discards while the client reads.
        sender = threading.Thread(target=client.send_forever, args=(piece * (65536 // len(piece)), 256 << 20))
        sender.start()
        client.response().refused(status, code)
        client.socket.shutdown(2)
        sender.join()
    assert script.metrics.codes == [code]


def test_the_limits_of_line_and_headers_are_exact(url: str) -> None:
    most = 32 * KIB
    line, host = len("GET /length HTTP/1.1\r\n"), len("Host: x\r\n")
    fits = most - line - host - len("X: \r\n\r\n")
    for value, status in ((fits, 200), (most, 431)):
        with RawClient(url) as client:
            client.send(get("/length", "X: " + "a" * value))
            assert client.response().status == status
    for uri, status in ((MAX_URI_BYTES, 200), (MAX_URI_BYTES + 1, 414)):
        with RawClient(url) as client:
            client.send(get("/length?" + "a" * (uri - len("/length?"))))
            assert client.response().status == status
    for headers, status in ((MAX_HEADERS - 1, 200), (MAX_HEADERS, 431)):
        with RawClient(url) as client:
            client.send(get("/length", *[f"X-{n}: y" for n in range(headers)]))
            assert client.response().status == status


def test_a_head_in_many_pieces_counts_as_one(client: RawClient) -> None:
    for piece in (b"GET /length HTTP/1.1\r\nHost: x\r\n", *[b"X: " + b"a" * 1000 + b"\r\n"] * 40):
        client.send(piece)
        time.sleep(0.001)
    client.response().refused(431, "headers_too_large")


def test_a_large_head_behind_another_request_counts_whole(script: Script, client: RawClient) -> None:
    client.send(get() + get("/length", *["X: " + "a" * 1000] * 40))
    assert client.response().status == 200
    client.response().refused(431, "headers_too_large")


def test_bodies_arrive_whole(client: RawClient) -> None:
    body = bytes(3 << 20)
    client.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert client.response().body == b"%d" % len(body)
    client.send(CHUNKED + b"".join(b"%x;e=1\r\n%s\r\n" % (n % 7 + 1, b"abcdefg"[: n % 7 + 1]) for n in range(20_000)))
    client.send(b"0\r\n\r\n")
    assert client.response().body == b"%d" % sum(n % 7 + 1 for n in range(20_000))


# What HTTP forbids, or this server does not do.


@pytest.mark.parametrize(
    "head",
    [
        b"GET /length HTTP/1.1\r\n\r\n",
        b"GET /length HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"GET /length HTTP/1.0\r\nHost: x\r\nhost: y\r\n\r\n",
        b"GET /length HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /length\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"POST /length HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"x\r\n",
        CHUNKED + b"3\r\nabc\r\n0\r\nX: y\r\n\r\n",
        POST + b"X : y\r\n\r\n",
        POST + b"X: y\r\n z\r\n\r\n",
        b"GET /length HTTP/1.1\nHost: x\n\n",
    ],
)
def test_what_is_not_plain_http_is_refused(script: Script, client: RawClient, head: bytes) -> None:
    client.send(head)
    error = client.response().refused(400, "bad_request")
    assert len(error["message"]) > 20 and error["type"] == "invalid_request_error"
    assert client.ended()
    assert script.metrics.codes == ["bad_request"]


def test_old_clients_need_no_host(client: RawClient) -> None:
    client.send(b"GET /length HTTP/1.0\r\n\r\n")
    assert client.response().status == 200
    assert client.ended()


@pytest.mark.parametrize("wish", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_to_an_old_client_ends_with_the_connection(client: RawClient, wish: bytes) -> None:
    client.send(b"GET /pieces HTTP/1.0\r\n" + wish + b"\r\n")
    received = b""
    while data := client.socket.recv(1 << 16):
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert body == b"onethree"
    lines = head.lower().split(b"\r\n")
    assert b"connection: close" in lines and b"x-kind: stream" in lines
    assert not any(line.startswith((b"transfer-encoding", b"content-length")) for line in lines)


def test_requests_of_both_versions_on_one_connection(client: RawClient) -> None:
    # The second waits for the first, and is begun by its end.
    client.send(get() + b"GET /pieces HTTP/1.0\r\n\r\n" + get())
    assert client.response().body == b"0"
    assert b"chunked" not in client.response().headers.get("transfer-encoding", "").encode()
    received = client._buffer
    while data := client.socket.recv(1 << 16):
        received += data
    assert received == b"onethree"


def test_a_stream_to_a_new_client_comes_in_chunks(url: str) -> None:
    answer = httpx.get(f"{url}/pieces")
    assert answer.headers["transfer-encoding"] == "chunked" and answer.content == b"onethree"


def test_empty_lines_before_a_request_are_ignored(client: RawClient) -> None:
    for _ in range(2):
        client.send(b"\r\n\r\n" + get() + b"\r\n")
        assert client.response().status == 200


def test_a_wish_for_another_protocol_is_ignored(client: RawClient) -> None:
    # Java's client asks for HTTP/2 with its first request, whatever that is.
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
    client.send(POST + wish + b"Content-Length: 5\r\n\r\nhello" + get("/length", "Connection: Upgrade", "Upgrade: x"))
    assert [client.response().body, client.response().body] == [b"5", b"0"]
    client.send(CHUNKED.replace(b"\r\n\r\n", b"\r\n" + wish + b"\r\n"))
    client.send(b"3\r\nabc\r\n0\r\n\r\n")
    assert client.response().body == b"3"


@pytest.mark.parametrize("first_line", ["POST /length HTTP/1.1\r\nConnection: Upgrade, close", "POST /length HTTP/1.0"])
def test_the_last_request_of_a_connection_may_wish_for_another_protocol(client: RawClient, first_line: str) -> None:
    client.send(f"{first_line}\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\n".encode())
    client.send(b"hello")
    assert client.response().body == b"5"
    assert client.ended()


def test_a_refusal_waits_for_the_responses_before_it(script: Script, client: RawClient) -> None:
    client.send(get("/held") + get() + b"nonsense\r\n\r\n")
    wait_until(lambda: script.metrics.codes == ["bad_request"])
    script.proceed.set()
    assert [client.response().body, client.response().body] == [b"held", b"0"]
    client.response().refused(400, "bad_request")
    assert client.ended()


def test_a_refused_body_is_answered_in_the_place_of_the_application(script: Script, client: RawClient) -> None:
    client.send(get("/held") + CHUNKED + b"3\r\nabc\r\nnonsense\r\n")
    wait_until(lambda: script.metrics.codes == ["bad_request"])
    script.proceed.set()
    assert client.response().body == b"held"
    client.response().refused(400, "bad_request")
    assert client.ended()


def test_refusals_do_not_flood_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[str] = []
    log = RefusalLog(codes.append)
    for _ in range(50):
        log.note(refusals.trailers(), "req-1", "192.0.2.7")
        log.note(refusals.stopping(), "req-2", "192.0.2.7")
    assert len(codes) == 100
    assert len(caplog.records) == 2
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    log.note(refusals.trailers(), "req-3", "192.0.2.7")
    line = caplog.records[2].getMessage()
    assert "req-3 from 192.0.2.7" in line and "bad_request" in line and "49 more" in line


# Pipelining.


def test_pipelined_requests_are_answered_in_order(script: Script, client: RawClient) -> None:
    client.send(get("/held") + get() * MAX_PIPELINED)
    time.sleep(0.05)
    script.proceed.set()
    assert [client.response().body for _ in range(MAX_PIPELINED + 1)] == [b"held"] + [b"0"] * MAX_PIPELINED
    # The connection stays.
    client.send(get())
    assert client.response().status == 200


def test_a_flood_of_pipelined_requests_is_cut(script: Script, client: RawClient) -> None:
    with prompt_loop(script.loop):
        client.send(get("/held"))
        wait_until(lambda: client.send_forever(get() * 1000, 11 << 20) >= 0)
        script.proceed.set()
        assert client.response().body == b"held"
        for _ in range(MAX_PIPELINED):
            assert client.response().status == 200
        client.response().refused(503, "too_many_pipelined")
        assert client.ended()
    assert script.metrics.codes == ["too_many_pipelined"]


def test_a_disconnect_ends_the_request_in_progress_also_with_others_behind_it(script: Script, url: str) -> None:
    with RawClient(url) as client:
        client.send(get("/held") + get())
        time.sleep(0.05)
    wait_until(lambda: script.cut_off == 1)


# Time.


def test_a_connection_that_sends_nothing_is_closed_without_a_word(script: Script, client: RawClient) -> None:
    assert client.ended()
    assert script.metrics.codes == []


def test_empty_lines_keep_no_connection_open(client: RawClient) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        while time.monotonic() - started < 10:
            client.socket.sendall(b"\r\n")
            time.sleep(0.05)


@pytest.mark.parametrize(
    "part",
    [
        b"G",
        b"GET /length HTTP/1.1\r\nHost: x\r\n",
        POST + b"Content-Length: 10\r\n\r\n",
        POST + b"Content-Length: 10\r\n\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
    ],
)
def test_half_a_request_is_refused_in_time(script: Script, client: RawClient, part: bytes) -> None:
    started = time.monotonic()
    client.send(part)
    client.response().refused(408, "request_timeout")
    assert time.monotonic() - started > TIMEOUT_S * 0.9
    assert client.ended()
    assert script.metrics.codes == ["request_timeout"]


def test_half_a_request_behind_another_is_refused_in_time(client: RawClient) -> None:
    client.send(get() + b"GET /le")
    assert client.response().status == 200
    client.response().refused(408, "request_timeout")


def test_a_drip_of_headers_is_refused_in_time(client: RawClient) -> None:
    client.send(b"GET /length HTTP/1.1\r\n")
    started = time.monotonic()
    client.socket.setblocking(False)
    while time.monotonic() - started < TIMEOUT_S * 5:
        client.send(b"X: y\r\n")
        time.sleep(0.02)
        try:
            if client.socket.recv(1, 2):  # MSG_PEEK
                break
        except BlockingIOError:
            pass
    client.socket.settimeout(10)
    client.response().refused(408, "request_timeout")


def test_an_idle_connection_is_kept(script: Script, client: RawClient) -> None:
    for _ in range(2):
        client.send(get())
        assert client.response().status == 200
        time.sleep(TIMEOUT_S * 1.5)
    assert script.metrics.codes == []


def test_a_request_in_progress_may_take_longer_than_its_parts(script: Script, client: RawClient) -> None:
    # A part of the next request that comes meanwhile is not late before the server can read it.
    client.send(POST.replace(b"/length", b"/held") + b"Content-Length: 2\r\n\r\nab" + get()[:10])
    time.sleep(TIMEOUT_S * 2.5)
    script.proceed.set()
    assert client.response().body == b"held"
    client.send(get()[10:])
    assert client.response().status == 200


def test_a_body_that_comes_fast_enough_may_take_longer(client: RawClient) -> None:
    # 16 KiB a second earn a second more each.
    client.send(POST + b"Content-Length: %d\r\n\r\n" % (20 * 4 * KIB))
    for _ in range(20):
        client.send(bytes(4 * KIB))
        time.sleep(TIMEOUT_S / 8)
    assert client.response().status == 200


def test_time_in_which_the_server_does_not_read_does_not_count(script: Script, client: RawClient) -> None:
    body = bytes(1 << 20)
    client.send(POST.replace(b"/length", b"/late") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert client.response().body == b"%d" % len(body)
    client.send(POST.replace(b"/length", b"/late") + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert client.response().status == 100
    client.send(b"ab")
    assert client.response().body == b"2"
    assert script.metrics.codes == []


def test_an_upload_has_a_limit_of_its_own() -> None:
    script = Script(body_timeout_s=60, upload_timeout_s=TIMEOUT_S)
    with live_server(script.app) as url, RawClient(url) as client, RawClient(url) as other:
        client.send(b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n" + bytes(1 << 20))
        other.send(POST + b"Content-Length: 3\r\n\r\n")
        client.response().refused(408, "request_timeout")
        other.send(b"abc")
        assert other.response().body == b"3"


def test_a_client_that_does_not_read_is_disconnected(script: Script, client: RawClient) -> None:
    client.send(get("/endless"))
    wait_until(lambda: script.cut_off == 1)
    # A client that reads slowly is not.
    with RawClient(script.url) as slow:  # type: ignore[attr-defined]
        slow.send(get("/endless"))
        started = time.monotonic()
        while time.monotonic() - started < TIMEOUT_S * 2.5:
            assert slow.socket.recv(1 << 20)
            time.sleep(0.01)
        assert script.cut_off == 1


@pytest.mark.parametrize("pieces", [(3,), (1, 2), (2, 1)])
def test_the_next_request_waits_until_the_response_is_read(
    pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = UnreadResponses()
    monkeypatch.setattr(protocol, "UnreadResponses", lambda: unread)
    script = Script(write_timeout_s=60)
    with live_server(script.app) as url, RawClient(url) as client:
        for count in pieces:
            client.send(get("/large") * count)
            wait_until(lambda: len(script.states) == 1)
            time.sleep(TIMEOUT_S / 4)
        assert len(script.states) == 1 and len(unread._unread) == 1
        for _ in range(3):
            assert len(client.response().body) == LARGE
        client.send(get())
        assert client.response().body == b"0"
        assert len(script.states) == 4 and not unread._unread


def test_a_response_that_lies_unread_ends_for_others_that_would_lie_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UnreadResponses", partial(UnreadResponses, 4 * LARGE))
    script = Script(write_timeout_s=60)
    with live_server(script.app) as url, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(url)) for _ in range(8)]
        for number, client in enumerate(clients):
            client.send(get("/large"))
            wait_until(lambda number=number: len(script.states) == number + 1)
            time.sleep(0.05)
        answered = []
        for client in clients:
            with suppress(ConnectionError):
                answered.append(len(client.response().body) == LARGE)
        # A part of each is in the network's buffers.
        assert 4 <= len(answered) < 8 and all(answered)
        with RawClient(url) as other:
            other.send(get("/large"))
            assert len(other.response().body) == LARGE


def test_a_request_knows_when_its_first_byte_came(script: Script, client: RawClient) -> None:
    before = time.monotonic()
    client.send(get()[:5])
    time.sleep(0.2)
    between = time.monotonic()
    client.send(get()[5:] + get())
    assert [client.response().status for _ in range(2)] == [200, 200]
    first, second = (state["received_at"] for state in script.states)
    assert before <= first < between <= second <= time.monotonic()


# Responses that overtake their request.


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_an_early_response_arrives_although_the_body_still_comes(url: str, connection: str) -> None:
    for _ in range(3):
        with RawClient(url) as client:
            length = 16 << 20
            client.send(f"POST /early HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n".encode())
            client.send(b"Content-Length: %d\r\n\r\n" % length)
            client.send(bytes(length // 2))
            response = client.response()
            assert (response.status, response.headers["connection"]) == (413, "close")
            assert client.ended()


def test_clients_read_an_early_response(url: str) -> None:
    assert httpx.post(f"{url}/early", content=bytes(16 << 20)).text == "early"
    curl = shutil.which("curl")
    if curl is not None:
        command = [curl, "-s", "--data-binary", "@-", f"{url}/early"]
        done = subprocess.run(command, input=bytes(16 << 20), capture_output=True, check=True, timeout=20)
        assert done.stdout == b"early"


def test_the_rest_of_a_body_is_not_read_for_ever(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_DISCARD_BODY_S", TIMEOUT_S)
    client.send(CHUNKED.replace(b"/length", b"/early"))
    assert client.response().status == 413
    started = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - started < 10:
            client.socket.sendall(b"1\r\na\r\n")
            time.sleep(0.02)
    assert time.monotonic() - started > TIMEOUT_S * 0.9
