"""A live server that gets any bytes: it answers or closes, goes on, and keeps nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools
import pytest
from hypothesis import strategies as st

from adapters_store import AdapterStore
from fuzz.mutation import Input, corpus, fuzz, mutated, seconds_for
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_decoder
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine

# A request that is not answered by then is half a request: the client says that no more comes.
PATIENCE_S = 0.1
# Of the documented failures of a server, those that a client can cause.
ALLOWED_5XX = (503, 507)
HTTP_TOKENS = (
    b"GET /healthz HTTP/1.1\r\n",
    b"\r\n\r\n",
    b"Host: localhost\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"Origin: https://x\r\nHost: evil.example\r\n",
    b"0\r\n\r\n",
    b"ffffffff\r\n",
    b"/v1/adapters?limit=%00",
    b"%ff%fe",
    b"\t",
    b"\0",
)
FORM_TOKENS = (
    b"--b\r\n",
    b"--b--",
    b"Content-Disposition: form-data; ",
    b'name="bundle"',
    b'filename="x"',
    b"; charset=",
    b"boundary=",
    b"\\",
    b"utf-16",
)


class Responses:
    """Reads the responses of one connection."""

    def __init__(self) -> None:
        self.read: list[Response] = []
        self._begin()

    def feed(self, data: bytes) -> None:
        """Take what came; raises httptools.HttpParserError where it is no HTTP."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        # "100 Continue" comes before the response.
        if status >= 200:
            self.read.append(Response(status, self._headers, self._body))
        self._begin()

    def _begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)


class Unread(Responses):
    """Takes what came without reading it."""

    def feed(self, data: bytes) -> None:
        """Take what came."""


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    def check(self) -> None:
        """Check that this is no failure of the server, and that an error has its form."""
        assert self.status < 500 or self.status in ALLOWED_5XX, (self.status, self.body)
        if self.status >= 400 and self.headers.get(b"content-type", b"").startswith(b"application/json"):
            content = json.loads(self.body)
            assert set(content) == {"error"}
            assert set(content["error"]) == {"message", "type", "param", "code"}
            assert self.headers[b"x-request-id"].startswith(b"req-")


class Server:
    """The server under test, as its clients and its operator see it."""

    def __init__(self, url: str, engine: StubEngine, store: AdapterStore) -> None:
        self.host, self.port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)
        self._engine, self._store = engine, store
        self._health = http.client.HTTPConnection(self.host, self.port, timeout=10)

    def take(self, batch: list[bytes]) -> None:
        """Send each of some inputs on a connection of its own, all at once, and check what became of the server."""
        begun = time.process_time()
        asyncio.run(self._send_all(batch))
        self._health.request("GET", "/healthz")
        assert self._health.getresponse().read() == b'{"status":"alive"}'
        # Of the processor, which the server's thread shares with this one: other programs do not count.
        assert time.process_time() - begun < 1 + 0.1 * len(batch), "the server works too long"
        wait_until(lambda: self._engine.open_streams == 0)

    def check_nothing_kept(self) -> None:
        """Check the store: it holds what it held, and nothing unfinished."""
        self._health.close()
        assert not list((self._store.root / "tmp").iterdir())
        self._store.check_integrity()

    async def _send_all(self, batch: list[bytes]) -> None:
        async with asyncio.timeout(10):
            for responses in await asyncio.gather(*map(self._send, batch)):
                for response in responses.read:
                    response.check()

    async def _send(self, data: bytes) -> Responses:
        """Send one input, and half-close the connection after the first response, or when none comes for a while."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        # The response to HEAD has a length and no body, and the parser cannot know which response that is.
        responses = Unread() if b"HEAD" in data else Responses()
        try:
            writer.write(data)
            await writer.drain()
            while not responses.read:
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        answer = await reader.read(1 << 16)
                except TimeoutError:
                    break
                if not answer:
                    return responses
                responses.feed(answer)
            writer.write_eof()
            while answer := await reader.read(1 << 16):
                responses.feed(answer)
        except ConnectionError:
            # A server may close at once what it does not want to read.
            pass
        finally:
            writer.close()
        return responses


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def server(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = AdapterStore(tmp_path_factory.mktemp("fuzz") / "store")
    engine = StubEngine(base)
    settings = ServeSettings(store=store.root, max_upload_mib=1, header_timeout_s=5, body_timeout_s=5)
    with live_server(build_app(engine, store, settings)) as url:
        server = Server(url, engine, store)
        yield server
        server.check_nothing_kept()


def form_request(data: bytes) -> bytes:
    """An upload whose Content-Type is the input's first line, and whose body is the rest."""
    kind, _, body = data.partition(b"\r\n\r\n")
    head = b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return Input(head % (kind.replace(b"\n", b" ").replace(b"\r", b" "), len(body)) + body)


def batches(inputs: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    return st.lists(inputs, min_size=1, max_size=6)


def test_every_request_of_the_corpus(server: Server) -> None:
    for data in corpus("http").values():
        server.take([data])


def test_every_form_of_the_corpus(server: Server) -> None:
    for data in corpus("multipart").values():
        server.take([form_request(data)])


def test_mutated_requests(server: Server) -> None:
    inputs = mutated(list(corpus("http").values()), HTTP_TOKENS)
    fuzz(server.take, batches(inputs), seconds_for(0.3))


def test_mutated_forms(server: Server) -> None:
    inputs = mutated(list(corpus("multipart").values()), FORM_TOKENS).map(form_request)
    fuzz(server.take, batches(inputs), seconds_for(0.2))
