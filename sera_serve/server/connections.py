"""Limits of connections: how many are open, in all and by client, and how many file descriptors there are."""

from __future__ import annotations

import ipaddress
import logging
import resource
from collections import Counter

from sera_serve.config import ServeSettings
from sera_serve.errors import counted

logger = logging.getLogger("sera_serve.server")

# Descriptors for everything that is no client's connection: the store, temporary files, libraries, refused clients.
RESERVED_DESCRIPTORS = 256


class ConnectionCounts:
    """Counts open connections, in all and by client. Only the event loop's thread may use it."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._open = 0
        self._by_client: Counter[str] = Counter()

    def add(self, address: str) -> str | None:
        """Count a connection. Returns why there may be no more of them, or None if the connection was counted."""
        client = client_of(address)
        if self._open >= self._most:
            return f"the server has {counted(self._open, 'open connection')}; try again later, or raise max_connections"
        if self._by_client[client] >= self._most_per_address:
            return (
                f"{client} has {counted(self._by_client[client], 'open connection')}; use what is open for further "
                "requests, or raise max_connections_per_address"
            )
        self._open += 1
        self._by_client[client] += 1
        return None

    def remove(self, address: str) -> None:
        """Count a connection no more."""
        client = client_of(address)
        self._open -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def client_of(address: str) -> str:
    """Return the client that an address belongs to: the address, or for IPv6 its network of 64 bits.

    One IPv6 client has a whole network, and could use a new address for each connection.
    """
    if ":" not in address:
        return address
    # A link-local address names its interface after "%".
    full = ipaddress.IPv6Address(address.partition("%")[0])
    mapped = full.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.IPv6Network((full, 64), strict=False))


def within_descriptors(settings: ServeSettings) -> ServeSettings:
    """Raise the process's soft limit of open files to what `max_connections` needs.

    Returns:
        The settings; with a smaller `max_connections` where the hard limit is too low.
    """
    needed = settings.max_connections + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return settings
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return settings
    connections = max(1, allowed - RESERVED_DESCRIPTORS)
    logger.warning(
        "max_connections is %d, but the process may open only %d files: at most %d connections are accepted; "
        "raise the limit of open files (ulimit -Hn), or lower max_connections",
        settings.max_connections,
        allowed,
        connections,
    )
    return settings.model_copy(update={"max_connections": connections})
