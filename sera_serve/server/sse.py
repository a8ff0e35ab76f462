"""Server-sent events: responses of them, and the one that streams the deltas of generations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from typing import Any

import pydantic_core
from fastapi import Response
from starlette.types import Receive, Scope, Send

from sera_serve.engine import GenerationResult, GenerationStream, TokenDelta
from sera_serve.errors import EngineUnavailable
from sera_serve.server.accounting import Account
from sera_serve.server.disconnect import ClientDisconnected, cancel_on_disconnect
from sera_serve.server.errors import CLIENT_CLOSED_CODE, COUNTED_STATUSES, describe, forget_frames, note_code
from sera_serve.server.loop_watch import measured_with_request
from sera_serve.server.methods import HEADERS_ONLY

logger = logging.getLogger("sera_serve.server")
DONE = b"data: [DONE]\n\n"

Submitted = Callable[[Sequence[GenerationStream]], None]
"""Called with the streams of a request before any of them runs."""

Admit = Callable[[Submitted], Awaitable[Sequence[GenerationStream]]]
"""Sends a request to the engine, and returns its streams once the first of them runs. Called once."""

Translation = Callable[[], AbstractContextManager[None]]
"""Turns the errors of a block into those of an interface."""


def encode_event(content: dict[str, Any]) -> bytes:
    """Encode one event. Its JSON has no line breaks, so the event is one `data:` line."""
    return b"data: " + pydantic_core.to_json(content) + b"\n\n"


class EventWriter:
    """Writes the events of one response. Each method returns encoded events, maybe none.

    The streams of a response have an index each. The calls are `begin`, then `delta` and at last `final` for each
    stream, then `end`. After a failure `failed` is the last call.
    """

    def begin(self, streams: Sequence[GenerationStream]) -> bytes:
        """The events before the first delta."""
        return b""

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """The events that add text or tokens."""
        raise NotImplementedError

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """The events at the end of one stream."""
        raise NotImplementedError

    def end(self, streams: Sequence[GenerationStream]) -> bytes:
        """The events after the last stream has ended."""
        return DONE

    def failed(self, content: dict[str, Any]) -> bytes:
        """The event of a failure. `content` is the JSON of an error response."""
        return encode_event(content)


class EventResponse(Response):
    """Sends the events that a subclass makes. A disconnect of the client cancels the subclass's work."""

    media_type = "text/event-stream"

    def __init__(self) -> None:
        """Prepare the headers. The length is not known."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._started = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            await cancel_on_disconnect(receive, self._send_events(scope, send))
        except ClientDisconnected:
            if not self._started:
                raise
            # A server reports a disconnect after a whole response, too.
            if not self._ended:
                note_code(scope, CLIENT_CLOSED_CODE)

    def events(self, scope: Scope) -> AsyncGenerator[bytes]:
        """Yield encoded events, or nothing (b""). What it raises before the first yield is an ordinary error.

        It sets `_ended` before the last event: a client may leave as soon as it has that one.
        """
        raise NotImplementedError

    async def _send_events(self, scope: Scope, send: Send) -> None:
        async with aclosing(self.events(scope)) as events:
            async for event in events:
                if not self._started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    self._started = True
                if scope.get(HEADERS_ONLY):
                    self._ended = True
                    break
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream(EventResponse):
    """Streams generations as server-sent events, by default `data: [DONE]` last.

    The response admits the request when the response is sent. A refusal is therefore an ordinary error with its own
    status, until a generation runs. A later refusal or failure of one generation is the event `{"error": ...}`, and
    this event is the last.
    """

    def __init__(
        self, admit: Admit, writer: EventWriter, account: Account, translation: Translation = nullcontext
    ) -> None:
        """Prepare the response.

        Args:
            admit: Sends the request to the engine. Called once.
            writer: Writes the events.
            account: Counts the tokens at the end.
            translation: Turns refusals and failures of the generations into those of the interface.
        """
        super().__init__()
        self._admit = admit
        self._writer = writer
        self._account = account
        self._translation = translation

    async def events(self, scope: Scope) -> AsyncGenerator[bytes]:
        """Yield the events of the generations, from their admission on."""
        writer = self._writer
        async with admitted(self._admit, self._account, self._translation) as streams:
            # The status is sent now.
            yield b""
            try:
                yield writer.begin(streams)
                with self._translation():
                    async with aclosing(merged(streams)) as deltas:
                        async for index, delta in deltas:
                            stream = streams[index]
                            if delta is None:
                                result = result_of(stream)
                                self._account.count_generation(stream)
                                yield writer.final(index, stream, result)
                            elif delta.text or delta.token_ids:
                                yield writer.delta(index, stream, delta)
                last = writer.end(streams)
            except Exception as error:  # noqa: BLE001 - the status 200 is sent already: the error becomes an event and a log line
                error_status, content, _ = describe(error, scope["state"]["request_id"])
                forget_frames(error, error_status)
                code = content["error"]["code"]
                note_code(scope, code)
                if error_status in COUNTED_STATUSES:
                    self._account.count_refusal(code)
                last = writer.failed(content)
            self._ended = True
            yield last


@asynccontextmanager
async def admitted(
    admit: Admit, account: Account, translation: Translation = nullcontext
) -> AsyncIterator[Sequence[GenerationStream]]:
    """Admit a request, and close its streams at the end of the block. `translation` applies to the block too.

    What the streams used is counted and charged then, also where the call fails after it was submitted.
    """
    streams: Sequence[GenerationStream] = ()
    try:
        with translation(), account.computing():
            streams = await admit(account.submitted)
            yield streams
    finally:
        # Shielded: a client that leaves once it has the last event cancels this block.
        await asyncio.shield(asyncio.ensure_future(measured_with_request(_close_all(streams))))


async def collect(
    admit: Admit, account: Account, take: Callable[[int, TokenDelta], None] | None = None
) -> tuple[Sequence[GenerationStream], list[GenerationResult]]:
    """Admit a request, and read all of its streams to their ends.

    Args:
        admit: Sends the request to the engine.
        account: Counts.
        take: Called with each delta and the index of its stream.
    """
    async with admitted(admit, account) as streams, aclosing(merged(streams)) as deltas:
        async for index, delta in deltas:
            if take is not None and delta is not None:
                take(index, delta)
    return streams, [result_of(stream) for stream in streams]


async def merged(streams: Sequence[GenerationStream]) -> AsyncGenerator[tuple[int, TokenDelta | None]]:
    """Yield the deltas of several streams as they come, each with its stream's index. None is the end of a stream.

    Raises what a stream raises. The other streams stay open.
    """
    if len(streams) == 1:
        async for only in streams[0]:
            yield 0, only
        yield 0, None
        return
    # A slow reader holds each stream at its next delta.
    queue: asyncio.Queue[tuple[int, TokenDelta | None, Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int) -> None:
        try:
            async for delta in streams[index]:
                await queue.put((index, delta, None))
            await queue.put((index, None, None))
        except Exception as error:  # noqa: BLE001 - it is raised where the deltas are read
            await queue.put((index, None, error))

    tasks = [asyncio.ensure_future(measured_with_request(pump(index))) for index in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            index, delta, error = await queue.get()
            if error is not None:
                raise error
            left -= delta is None
            yield index, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def result_of(stream: GenerationStream) -> GenerationResult:
    """Return the result of an exhausted stream. Raises EngineUnavailable if the stream was closed before its end."""
    if stream.result is None:
        raise EngineUnavailable("the generation was closed before it finished; send the request again")
    return stream.result


async def _close_all(streams: Sequence[GenerationStream]) -> None:
    for stream in streams:
        await stream.aclose()
