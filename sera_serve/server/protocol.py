"""The HTTP/1.1 protocol of a connection: uvicorn's, with a bound on every byte, request and second of a client.

uvicorn's own protocol, and the parser under it, accept a header line, a URI or a trailer of any length, any number of
pipelined requests, and a client that sends or reads nothing for ever. Each of them costs the other clients memory or
time. docs/http.md, "Connections and time limits", has the limits as clients see them.
"""

from __future__ import annotations

import asyncio
import time
from asyncio.events import TimerHandle
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sera_serve.config import ServeSettings
from sera_serve.server.connections import ConnectionCounts
from sera_serve.server.middleware import UPLOAD_PATHS
from sera_serve.server.refusals import (
    Refusal,
    RefusalLog,
    bad_request,
    headers_too_large,
    late,
    malformed,
    new_request_id,
    stopping,
    too_many_connections,
    too_many_headers,
    too_many_pipelined,
    trailers,
    uri_too_long,
)
from sera_serve.server.unread import UnreadResponses, reader_of
from sera_serve.server.uvicorn_wrappers import Closer, TimedFlow, UntilClose

MAX_URI_BYTES = 8 << 10
MAX_HEADERS = 100
# Requests behind the one in progress.
MAX_PIPELINED = 16
# The parser gathers an unfinished header without a limit, so it is fed in slices, and checked after each of them.
_SLICE = 16 << 10
# The rest of a request that was answered already is discarded for this long, so that its client can read the answer.
_DISCARD_BODY_S = 5.0
_DISCARD_S = 1.0
# A server that stops waits this long for the rest of a body.
_BODY_AT_SHUTDOWN_S = 3.0
# A timer that comes later than this finds a loop that was late itself: what the client sent may lie unread.
_LATE_S = 0.25
# Refused connections that may wait for their clients to read the answer. More of them are closed at once.
_MAX_TURNED_AWAY = 128
# Connections to the operators' address; they do not count as clients' connections.
_OPERATORS_CONNECTIONS = 64


class _Input(Enum):
    """What the next byte of a connection belongs to."""

    NOTHING = "nothing: the next byte begins a request"
    HEAD = "a request's line or headers"
    BODY = "a request's body"
    DISCARDED = "nothing that the server reads"


NOTHING, HEAD, BODY, DISCARDED = _Input


class ConnectionGuard:
    """What the connections of one server share."""

    def __init__(
        self, settings: ServeSettings, count_refusal: Callable[[str], None], operators_port: int | None
    ) -> None:
        """Share limits and counts.

        Args:
            settings: The limits of each connection, and of all.
            count_refusal: Called with the code of each refusal.
            operators_port: The port for metrics and health alone, or None.
        """
        self.settings = settings
        self.max_header_bytes = settings.max_header_kib << 10
        self.log = RefusalLog(count_refusal)
        self.turned_away = 0
        self.unread = UnreadResponses()
        self._operators_port = operators_port
        self._clients = ConnectionCounts(settings.max_connections, settings.max_connections_per_address)
        self._operators = ConnectionCounts(_OPERATORS_CONNECTIONS, _OPERATORS_CONNECTIONS)

    def counts(self, port: int | None) -> ConnectionCounts:
        """Return the counts that a connection to a port of the server belongs to."""
        operators = port is not None and port == self._operators_port
        return self._operators if operators else self._clients


def bounded_protocol(
    settings: ServeSettings, count_refusal: Callable[[str], None], operators_port: int | None = None
) -> type[BoundedHttpProtocol]:
    """Return the protocol class of one server, for `uvicorn.Config(http=...)`, with `ConnectionGuard`'s arguments."""

    class ServersProtocol(BoundedHttpProtocol):
        guard = ConnectionGuard(settings, count_refusal, operators_port)

    return ServersProtocol


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Everything that a client may make it hold or wait for has a bound.

    A refused request gets an error response after the responses of the requests before it, and the connection ends.
    A connection has one timer. It is set for what is awaited next, and a request that comes in one piece sets none.
    """

    guard: ClassVar[ConnectionGuard]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Make the protocol of a connection; uvicorn gives the arguments."""
        super().__init__(*arguments, **named)
        self.settings = self.guard.settings
        self._connection: asyncio.Transport = None  # type: ignore[assignment]
        self._counts: ConnectionCounts | None = None
        self._turned_away = False
        self._closing = False
        self._input = NOTHING
        # When the last bytes came. When the head or the body under way began; before the first byte, the connection.
        self._now = self._began = 0.0
        self._silent_connection = True
        # Bytes given to the parser since the head began, or since it last gave a part of the body.
        self._fed = 0
        self._received = 0
        self._header_count = 0
        self._paused_before = 0.0
        self._upgrading = self._waits_for_reader = False
        # Of the two cycles: `cycle` is the newest, `_active` the one that may send its response now.
        self._active: RequestResponseCycle | None = None
        self._keep_alive = False
        self._last_words: bytes | None = None
        self._body_due_at_shutdown: float | None = None
        self._discard_until: float | None = None
        self._unread_since: float | None = None
        self._timer: TimerHandle | None = None
        self._timer_at = 0.0

    # asyncio's side: the transport calls these.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        self._connection = transport
        self.transport = cast(asyncio.Transport, Closer(transport, self))
        self.flow = self._flow = TimedFlow(transport)
        self._began = time.monotonic()
        counts = self.guard.counts(self.server[1] if self.server else None)
        reason = counts.add(self._address())
        if reason is None:
            self._counts = counts
            self._look_in(self.settings.header_timeout_s)
            return
        if self.guard.turned_away < _MAX_TURNED_AWAY:
            self._turned_away = True
            self.guard.turned_away += 1
        self._refuse(too_many_connections(reason))
        if not self._turned_away:
            self._close_now()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection holds, and tell its requests that the client is gone."""
        self._input, self._closing = DISCARDED, True
        self.guard.unread.remove(self._connection)
        if self._counts is not None:
            self._counts.remove(self._address())
        self.guard.turned_away -= self._turned_away
        if self._timer is not None:
            self._timer.cancel()
        self._stop_keep_alive_timer()
        # uvicorn tells the newest request alone.
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        # Objects that refer to each other would stay until the next garbage collection.
        cast(Closer, self.transport).protocol = None

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        if self._input is DISCARDED:
            if not self._closing:
                # Responses before the refusal are still to be sent. What comes now is left to the network's buffers.
                self.flow.pause_reading()
            return
        if self._input is NOTHING and data[0] in b"\r\n":
            # Empty lines before a request are ignored (RFC 9112, 2.2), and do not keep an idle connection open.
            data = data.lstrip(b"\r\n")
            if not data:
                return
        self._stop_keep_alive_timer()
        self._now = time.monotonic()
        self._silent_connection = False
        if len(data) <= _SLICE:
            self._feed(data)
        else:
            rest = memoryview(data)
            while rest and self._input is not DISCARDED:
                self._feed(rest[:_SLICE])
                rest = rest[_SLICE:]
        if self._input is HEAD:
            self._look_in(self.settings.header_timeout_s)
        elif self._input is BODY:
            self._look_in(self.settings.body_timeout_s)

    def eof_received(self) -> None:
        """The client sends no more. The transport closes after this, once the client has read what was sent."""
        self._input, self._closing = DISCARDED, True
        self._expect_end()

    def pause_writing(self) -> None:
        """The client leaves a response unread."""
        super().pause_writing()
        self._expect_end()
        self.guard.unread.add(self._connection, reader_of(self._active, self._address()))

    def resume_writing(self) -> None:
        """The client reads again."""
        self._unread_since = time.monotonic() if self._closing else None
        self.guard.unread.remove(self._connection)
        super().resume_writing()
        if self._waits_for_reader:
            self._waits_for_reader = False
            self.on_response_complete()

    def shutdown(self) -> None:
        """Finish requests whose bodies come soon, close everything else; the server calls this when it stops."""
        if self._input is DISCARDED:
            return
        super().shutdown()
        if self._input is BODY and not self._closing:
            self._body_due_at_shutdown = time.monotonic() + _BODY_AT_SHUTDOWN_S
            self._look_in(_BODY_AT_SHUTDOWN_S)

    def end(self) -> None:
        """End the connection now, with an error where a response is owed; the server calls this when time is up."""
        if self._closing:
            return
        active = self._active
        self.pipeline.clear()
        if active is None or active.response_complete:
            self.transport.close()
        elif active.response_started:
            self._connection.abort()
        else:
            self._input = DISCARDED
            self._interrupt(active, self._answer(stopping(), active), _DISCARD_S)

    # The parser's side: it calls these. An exception in one of them ends `feed_data` with an HttpParserError.

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise too_many_pipelined(MAX_PIPELINED)
        super().on_message_begin()
        if self._input is NOTHING:
            self._input, self._began = HEAD, self._now
        self.scope["state"]["received_at"] = self._began

    def on_headers_complete(self) -> None:
        """Line and headers are complete: check them, and start the request."""
        self._check_head()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise bad_request("CONNECT is not supported; this server is no proxy")
            self.scope["method"] = self.parser.get_method().decode()
            self.scope["http_version"] = self.parser.get_http_version()
            self._upgrading = True
            return
        self._start_request()
        self._input, self._began = BODY, self._now
        self._fed = self._received = 0
        self._header_count = len(self.headers)
        self._paused_before = self._flow.paused_s
        if not self.pipeline:
            self._active = self.cycle
        # A response that overtakes its own request's body ends the connection, and says so.
        self._keep_alive = self.cycle.keep_alive
        self.cycle.keep_alive = False

    def _start_request(self) -> None:
        if self.parser.get_http_version() != "1.0":
            super().on_headers_complete()
            return
        app, until_close = self.app, UntilClose(self.app)
        self.app = until_close
        super().on_headers_complete()
        self.app, until_close.cycle = app, self.cycle

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        self._fed = 0
        self._received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._upgrading:
            return
        if len(self.headers) != self._header_count:
            raise trailers()
        self._input, self._fed = NOTHING, 0
        self.cycle.keep_alive = self._keep_alive and self._body_due_at_shutdown is None
        super().on_message_complete()

    # uvicorn's side: a response was sent.

    def on_response_complete(self) -> None:
        """Go on with the next request, or with the refusal that waited, once the client reads this response."""
        if self.flow.write_paused and not self.transport.is_closing():
            self._waits_for_reader = True
            self.flow.pause_reading()
            return
        if self.pipeline:
            self._active = self.pipeline[-1][0]
            super().on_response_complete()
            return
        super().on_response_complete()
        if self._last_words is not None and not self._closing:
            self._say(self._last_words, _DISCARD_S)

    # Reading within limits.

    def _feed(self, data: bytes | memoryview) -> None:
        self._fed += len(data)
        upgraded_at: int | None = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            upgraded_at = upgrade.args[0]
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, Refusal) else malformed(error))
            return
        if upgraded_at is not None:
            self._ignore_upgrade(memoryview(data)[upgraded_at:])
            return
        refusal = self._check_unfinished()
        if refusal is not None:
            self._refuse(refusal)

    def _ignore_upgrade(self, rest: memoryview) -> None:
        """Serve a request that asks for another protocol as if it had not asked (RFC 9110, 7.8).

        Clients ask for HTTP/2 this way by default, also with a POST. The parser takes such a request's body for the
        other protocol, so a parser gets the line and headers again, without the header that asks, and then `rest`. It
        is a new parser: after `Connection: close` and in HTTP/1.0, the old one takes all further bytes and reads none.
        """
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn makes it: what follows a last request is no fault.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        lines = [self.scope["method"].encode() + b" " + self.url + b" HTTP/" + self.scope["http_version"].encode()]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n")
        if rest and self._input is not DISCARDED:
            self._feed(rest)

    def _check_head(self) -> None:
        """Raise Refusal if the request's line and headers, now complete, exceed a limit or contradict each other."""
        if len(self.url) > MAX_URI_BYTES:
            raise uri_too_long(MAX_URI_BYTES)
        if len(self.headers) > MAX_HEADERS:
            raise too_many_headers(MAX_HEADERS)
        # What was fed may lack the slice in which the head began.
        if self._fed + _SLICE > self.guard.max_header_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.guard.max_header_bytes:
                raise headers_too_large(self.guard.max_header_bytes)
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise bad_request(f"HTTP/{version} is not supported here; speak HTTP/1.1")
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts != 1 and (hosts or version == "1.1"):
            raise bad_request(f"the request has {hosts} Host headers; send exactly one")
        if b"transfer-encoding" in names:
            encoding = self.headers[names.index(b"transfer-encoding")][1]
            if version == "1.0" or encoding.lower() != b"chunked":
                raise bad_request("the only Transfer-Encoding supported is chunked, with HTTP/1.1")

    def _check_unfinished(self) -> Refusal | None:
        """Return why the head, or what is between two parts of a body, is too long already."""
        most = self.guard.max_header_bytes
        if self._input is HEAD:
            if len(self.url) > MAX_URI_BYTES:
                return uri_too_long(MAX_URI_BYTES)
            if len(self.headers) > MAX_HEADERS:
                return too_many_headers(MAX_HEADERS)
            if self._fed > most:
                return headers_too_large(most)
        elif self._input is BODY:
            if len(self.headers) != self._header_count:
                return trailers()
            if self._fed > most:
                return bad_request(f"a chunk of the body has over {most} bytes beside its data; send less")
        return None

    # Refusing, and closing.

    def _refuse(self, refusal: Refusal) -> None:
        """Read no more, and answer with an error once the responses before it are sent."""
        refused = self.cycle if self._input is BODY else None
        answer = self._answer(refusal, refused)
        self._input = DISCARDED
        if refused is not None and refused is not self._active:
            self.pipeline.popleft()
        if self._owes_response() and self._active is not refused:
            self._last_words = answer
        elif refused is None:
            self._say(answer, _DISCARD_S)
        else:
            self._interrupt(refused, answer, self._discard_body_s())

    def _interrupt(self, cycle: RequestResponseCycle, answer: bytes, discard_s: float) -> None:
        """Answer in the place of the application, which is told that its client is gone."""
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started:
            # An error cannot follow a part of another response.
            self._connection.abort()
        else:
            self._say(answer, discard_s)

    def _answer(self, refusal: Refusal, cycle: RequestResponseCycle | None) -> bytes:
        """Return the response of a refusal, under the id of its request if it has one; count and log it."""
        request_id = cycle.scope["state"].get("request_id") if cycle is not None else None
        request_id = request_id or new_request_id()
        self.guard.log.note(refusal, request_id, self._address() or "a local client")
        return refusal.response(request_id, self.server_state.default_headers)

    def _say(self, answer: bytes, discard_s: float) -> None:
        if not self._connection.is_closing():
            self._connection.write(answer)
            self._close_after(discard_s)

    def close(self) -> None:
        """Close the connection once everything is sent. Input that is still to come is discarded for a while first."""
        if self._closing:
            return
        if self._input in (BODY, DISCARDED):
            self._close_after(self._discard_body_s())
        else:
            self._close_now()

    def _discard_body_s(self) -> float:
        return _DISCARD_BODY_S if self._body_due_at_shutdown is None else _DISCARD_S

    def _close_now(self) -> None:
        self._input, self._closing, self._discard_until = DISCARDED, True, None
        self._stop_keep_alive_timer()
        self._connection.close()
        self._expect_end()

    def is_closing(self) -> bool:
        """Whether nothing more may be sent."""
        return self._closing or self._connection.is_closing()

    def _close_after(self, seconds: float) -> None:
        """Close for writing now, and for reading later.

        A connection that is closed while input lies unread is reset, and the client may lose the response.
        """
        self._input, self._closing = DISCARDED, True
        self._stop_keep_alive_timer()
        self._connection.write_eof()
        self.flow.resume_reading()
        self._discard_until = time.monotonic() + seconds
        self._look_in(seconds)

    def _expect_end(self) -> None:
        """Abort the connection if the client has not read what was sent within `write_timeout_s`."""
        if self._unread_since is None:
            self._unread_since = time.monotonic()
        self._look_in(self.settings.write_timeout_s)

    def _stop_keep_alive_timer(self) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _owes_response(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _address(self) -> str:
        return self.client[0] if self.client else ""

    # Time.

    def _look_in(self, seconds: float) -> None:
        """Set the timer; an earlier one stays, and sets itself again."""
        at = time.monotonic() + seconds
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """End what is overdue, and come again while anything is awaited."""
        self._timer = None
        now = time.monotonic()
        if now - self._timer_at > _LATE_S:
            self._look_in(_LATE_S)
            return
        if self._unread_since is not None:
            unread_until = self._unread_since + self.settings.write_timeout_s
            if unread_until <= now:
                self._connection.abort()
                return
            self._look_in(unread_until - now)
        due = self._input_due(now)
        if due is not None and due <= now:
            self._overdue()
        elif due is not None:
            self._look_in(due - now)

    def _input_due(self, now: float) -> float | None:
        """Return until when the client must have sent what is awaited; None if nothing is."""
        settings = self.settings
        if self._input is HEAD and (self._owes_response() or self.flow.read_paused):
            # The server serves the requests before this one first.
            self._began = now
        if self._input is HEAD or (self._input is NOTHING and self._silent_connection):
            return self._began + settings.header_timeout_s
        if self._input is BODY:
            due = self._body_due(now)
            return due if self._body_due_at_shutdown is None else min(due, self._body_due_at_shutdown)
        return self._discard_until if self._input is DISCARDED else None

    def _body_due(self, now: float) -> float:
        settings, cycle = self.settings, self.cycle
        if cycle is not self._active or cycle.waiting_for_100_continue:
            # The server has not asked for this body yet.
            self._began, self._paused_before = now, self._flow.paused_s
        elif self.flow.read_paused:
            return now + settings.body_timeout_s
        allowed = settings.body_timeout_s + self._received / (settings.min_body_kib_s * 1024)
        if cycle.scope["path"] in UPLOAD_PATHS:
            allowed = min(allowed, settings.upload_timeout_s)
        return self._began + self._flow.paused_s - self._paused_before + allowed

    def _overdue(self) -> None:
        """Refuse what did not come in time. A client that sent nothing, or was told why already, is only closed."""
        if self._input is HEAD:
            self._refuse(late(f"line and headers did not arrive within {self.settings.header_timeout_s:g} s"))
        elif self._input is not BODY:
            self._close_now()
        elif self._body_due_at_shutdown is not None:
            self._refuse(stopping())
        else:
            self._refuse(late(f"the body did not arrive in time; {self._received} bytes of it did"))
