"""Bounds the memory of all responses that lie unread: beyond the bound, connections of slow readers end.

A response is in memory until its client has read all but what the network's buffers take. Some responses have ten
thousand times the bytes of their request. A client may leave one unread for `write_timeout_s` on each connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from sera_serve.server.connections import client_of

logger = logging.getLogger("sera_serve.server")

MAX_UNREAD_BYTES = 512 << 20
# A younger response does not tell yet how fast its client reads.
_LEAST_AGE_S = 1.0
_LOG_EVERY_S = 1.0


@dataclass(frozen=True)
class _Unread:
    """A response that waits for its client: its owner, since when it waits, and its bytes at that time."""

    owner: str
    since: float
    at_first: int


def reader_of(cycle: RequestResponseCycle | None, address: str) -> str:
    """Return who reads a response, for messages too: the tenant of the request's key, else the client's address."""
    caller = None if cycle is None else cycle.scope["state"].get("caller")
    tenant: str | None = None if caller is None else caller.tenant
    return f"client {client_of(address)}" if tenant is None else f"tenant {tenant!r}"


class UnreadResponses:
    """The connections whose clients have not read what was sent. Only the event loop's thread may use it."""

    def __init__(self, most: int = MAX_UNREAD_BYTES) -> None:
        """Let unread responses have `most` bytes together."""
        self._most = most
        self._unread: dict[asyncio.Transport, _Unread] = {}
        # The sum of their `at_first`.
        self._at_first = 0
        self._logged_at = -_LOG_EVERY_S

    def add(self, connection: asyncio.Transport, owner: str) -> None:
        """Count a connection whose client has a response to read.

        Where all responses exceed the bound, connections end: of the owner with the most bytes, slow readers first.
        """
        self.remove(connection)
        size = connection.get_write_buffer_size()
        self._unread[connection] = _Unread(owner, time.monotonic(), size)
        self._at_first += size
        # What was read since is looked up only where it matters.
        if self._at_first > self._most:
            self._make_room()

    def remove(self, connection: asyncio.Transport) -> None:
        """Stop counting a connection. Idempotent."""
        each = self._unread.pop(connection, None)
        if each is not None:
            self._at_first -= each.at_first

    def _make_room(self) -> None:
        now = time.monotonic()
        sizes = {connection: connection.get_write_buffer_size() for connection in self._unread}
        held: Counter[str] = Counter()
        for connection, size in sizes.items():
            held[self._unread[connection].owner] += size

        def haste(connection: asyncio.Transport) -> tuple[bool, float, float]:
            """Young responses come last, then those whose clients read faster, then those that came later."""
            each = self._unread[connection]
            age = now - each.since
            return age < _LEAST_AGE_S, (each.at_first - sizes[connection]) / max(age, _LEAST_AGE_S), each.since

        while held.total() > self._most:
            owner, _ = held.most_common(1)[0]
            slowest = min((each for each in self._unread if self._unread[each].owner == owner), key=haste)
            held[owner] -= sizes[slowest]
            self.remove(slowest)
            # This may be called from the transport's own `write`.
            asyncio.get_running_loop().call_soon(slowest.abort)
            if now - self._logged_at >= _LOG_EVERY_S:
                self._logged_at = now
                logger.warning(
                    "unread responses have over %d MiB; a connection of %s was ended, which reads slowest",
                    self._most >> 20,
                    owner,
                )
