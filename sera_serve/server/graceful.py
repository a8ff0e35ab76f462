"""The server process's end: requests finish within the grace time, and get their documented error after it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from sera_serve.server.protocol import BoundedHttpProtocol
from sera_serve.threads import in_background

logger = logging.getLogger("sera_serve.server")

# After the grace time: for the engine to end its requests, for their responses to leave, and for connections to close.
_ENGINE_S, _RESPONSES_S, _CLOSING_S = 4.0, 2.0, 2.0
# uvicorn cancels whatever is left after this. A cancelled request would get a response in plain text.
ENDING_S = int(_ENGINE_S + _RESPONSES_S + _CLOSING_S)


class GracefulServer(uvicorn.Server):
    """Stops on SIGTERM or SIGINT without an error: every request gets its response first, or a documented refusal.

    uvicorn ends the application after its requests. The engine would therefore end no request: each would be cancelled.

    Attributes:
        failed: Why the server has ended by itself; None where a signal has ended it.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        grace_s: float,
        stop_engine: Callable[[], None],
        announce: Callable[[], None] = lambda: None,
        *,
        drain_s: float = 0,
        begin_drain: Callable[[], None] = lambda: None,
        reload: Callable[[], None] | None = None,
        failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Make a server.

        Args:
            config: Its `timeout_graceful_shutdown` must be at least `grace_s + ENDING_S`.
            grace_s: Seconds for requests in flight to finish.
            stop_engine: Ends the engine's requests with their errors. May block. The application may call it again.
            announce: Called once the server accepts connections.
            drain_s: Seconds after the signal for which connections are still accepted and requests served.
            begin_drain: Called at the signal: from then on the server is not ready.
            reload: Called at SIGHUP, between two steps of any thread's work: it must return at once. None leaves the
                signal as it is.
            failure: Why the engine can never serve again, or None. The server then ends: whoever has started it starts
                it again, where it would refuse every request.
        """
        super().__init__(config)
        self._grace_s = grace_s
        self._stop_engine = stop_engine
        self._announce = announce
        self._drain_s = drain_s
        self._begin_drain = begin_drain
        self._reload = reload
        self._failure = failure
        self._drained_at: float | None = None
        self.failed: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down now: some time after the signal, so that a load balancer sees the server unready first.

        A server whose engine has failed shuts down as after a signal.

        uvicorn calls it ten times a second. A second interrupt ends the wait.
        """
        if not self.should_exit and (failure := self._failure()) is not None:
            logger.error("the server ends, to be started again: %s", failure)
            self.failed, self.should_exit = failure, True
        if not await super().on_tick(counter):
            return False
        if self._drained_at is None:
            self._drained_at = time.monotonic() + self._drain_s
            self._begin_drain()
            if self._drain_s:
                logger.info("no longer ready; connections are accepted for another %g s", self._drain_s)
        return self.force_exit or time.monotonic() >= self._drained_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections, and return when every request is answered."""
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal. uvicorn's own would raise the signal again at the end, and the exit status would be -15."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        if self._reload is not None:
            reload = self._reload
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda number, frame: reload())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _end_requests(self) -> None:
        """Answer everything that is not answered when the grace time is over."""
        await asyncio.sleep(self._grace_s)
        logger.warning(
            "the grace time of %g s is over; %d requests end unfinished", self._grace_s, len(self.server_state.tasks)
        )
        # A thread of its own: all others may be at work for the requests that are to end.
        stopping = asyncio.wrap_future(in_background(self._stop_engine, "stop-engine"))
        stopped, _ = await asyncio.wait([stopping], timeout=_ENGINE_S)
        if stopped and stopping.exception() is not None:
            logger.error("the engine did not stop", exc_info=stopping.exception())
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_RESPONSES_S)
        # What is left waits for something else than the engine, such as the store.
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedHttpProtocol):
                connection.end()
