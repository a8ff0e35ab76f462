"""Clients that stream generations over HTTP, open loop or closed loop, and when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import httptools

from benchmarks.workload import TimedRequest


@dataclass(eq=False)
class Answer:
    """What came of one request; times are of `time.perf_counter`.

    Attributes:
        due: When it was to be sent. Waiting is counted from here, also where the client was late.
        sent: When it was sent.
        status: HTTP status; 0 where the connection ended before there was one.
        times: When each event with tokens came, and `counts` how many it had.
        error: Code of the refusal, or of the failure in mid-stream.
        complete: The stream came to its regular end.
    """

    request: TimedRequest
    adapter: str
    due: float
    sent: float = 0.0
    status: int = 0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    answered_by: str | None = None
    version: int | None = None
    retry_after: str | None = None
    error: str | None = None
    complete: bool = False
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.due

    @property
    def right_length(self) -> bool:
        """Whether it is whole, of the adapter asked for, and as long as asked for."""
        return self.complete and self.answered_by == self.adapter and len(self.tokens) == self.request.new_tokens


class StreamedAnswer(Protocol):
    """What is noted of any streamed answer."""

    status: int
    error: str | None
    complete: bool


class Exchange(asyncio.Protocol):
    """One request on a connection of its own, and its stream, until `done`.

    The client shares the machine with the server that it measures: parsing with httptools costs a tenth of what a
    general client does for each token.
    """

    def __init__(self, host: str, body: dict[str, Any], answer: StreamedAnswer, done: asyncio.Future[None]) -> None:
        self._host = host
        self._body = body
        self._noted = answer
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        body = json.dumps(self._body).encode()
        head = (
            f"POST /v1/generate HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        # uvloop's transports are not of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        """End, if the response has not ended before."""
        self._finish()

    def on_headers_complete(self) -> None:
        """Note the status; as below, the parser calls it."""
        self._noted.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Take the whole events out of what came so far."""
        self._buffer += body
        if self._noted.status == 200:
            *events, self._buffer = self._buffer.split(b"\n\n")
            for event in events:
                self._take(event.removeprefix(b"data: "))

    def on_message_complete(self) -> None:
        """End, with the code of a refusal."""
        if self._noted.status != 200:
            self._noted.error = json.loads(self._buffer)["error"]["code"]
        self._transport.close()
        self._finish()

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._noted.complete = True
        elif "error" in (event := json.loads(data)):
            self._noted.error = event["error"]["code"]
        else:
            self._keep(event)

    def _keep(self, event: dict[str, Any]) -> None:
        """Note an event with tokens."""
        raise NotImplementedError

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


class _Timed(Exchange):
    """Notes when its tokens came."""

    def __init__(self, host: str, answer: Answer, done: asyncio.Future[None]) -> None:
        request = answer.request
        body = {"adapter": answer.adapter, "token_ids": request.prompt, "max_new_tokens": request.new_tokens}
        super().__init__(host, body | {"stream": True}, answer, done)
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._answer.sent = time.perf_counter()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._answer.retry_after = value.decode()

    def _keep(self, event: dict[str, Any]) -> None:
        self._answer.answered_by, self._answer.version = event["adapter"], event["version"]
        if event["token_ids"]:
            self._answer.times.append(time.perf_counter())
            self._answer.counts.append(len(event["token_ids"]))
            self._answer.tokens += event["token_ids"]

    def _finish(self) -> None:
        if not self._done.done():
            self._answer.ended = time.perf_counter()
        super()._finish()


class LoadClient:
    """Sends requests to one server."""

    def __init__(self, host: str, port: int, name: Callable[[int], str]) -> None:
        """Prepare; `name` gives the adapter's name from its index."""
        self._address = (host, port)
        self._name = name

    async def ask(
        self,
        request: TimedRequest,
        due: float | None = None,
        answers: list[Answer] | None = None,
        name: str | None = None,
    ) -> Answer:
        """Send one request and wait for its end; cancelling this closes its connection.

        Args:
            request: What to send, at once.
            due: When it should have been sent, where not now.
            answers: Gets the answer when it is begun, so that one cut short is there too.
            name: The adapter, where it is not that of `request`.
        """
        answer = Answer(request, name or self._name(request.adapter), time.perf_counter() if due is None else due)
        if answers is not None:
            answers.append(answer)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            transport, _ = await loop.create_connection(lambda: _Timed(self._address[0], answer, done), *self._address)
        except OSError as error:
            answer.error, answer.ended = f"connection: {error.strerror or error}", time.perf_counter()
            return answer
        try:
            await done
        finally:
            transport.close()
        return answer

    async def open_loop(self, trace: Iterable[TimedRequest]) -> list[Answer]:
        """Send each request when it is due, whatever became of the others; returns when all have ended."""
        start = time.perf_counter()

        async def send(request: TimedRequest) -> Answer:
            await asyncio.sleep(start + request.due - time.perf_counter())
            return await self.ask(request, start + request.due)

        return list(await asyncio.gather(*map(send, trace)))

    async def closed_loop(self, trace: Iterable[TimedRequest], clients: int, seconds: float) -> list[Answer]:
        """Keep `clients` requests under way, taking them in order; those unfinished at the end are cut short."""
        answers: list[Answer] = []
        requests = iter(trace)

        async def client() -> None:
            for request in requests:
                answer = await self.ask(request, answers=answers)
                if answer.status != 200:
                    await asyncio.sleep(0.05)

        tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(client()) for _ in range(clients)]
        done, pending = await asyncio.wait(tasks, timeout=seconds)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        return answers
