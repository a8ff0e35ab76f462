"""The names by which requests name the adapters that are in memory: what a router of requests wants to know."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

# References that are remembered beside two for each adapter that may be resident.
_LEAST = 1024
# A tenant may give one adapter any number of aliases; they must not crowd out the names of others.
_NAMES_EACH = 4


@dataclass(frozen=True)
class AdapterActivity:
    """Which adapters serve and which wait, by the references that requests used.

    Attributes:
        running: On the device and ready to serve, most recently used first.
        waiting: Wanted by a request, and not on the device yet. None of `running`.
        limit: The most adapters on the device at once.
    """

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    limit: int


class AdapterNames:
    """Remembers what each reference last resolved to. Thread-safe.

    The references least recently used are forgotten: clients choose how many there are.
    """

    def __init__(self, max_resident: int) -> None:
        """Begin with none. `max_resident` is the most adapters on the device."""
        self._limit = max_resident
        self._most = max(_LEAST, 2 * max_resident)
        self._lock = threading.Lock()
        self._digests: dict[str, str] = {}

    def add(self, reference: str, digest: str) -> None:
        """Note that a reference, as a request wrote it, resolved to a digest."""
        with self._lock:
            # At the end: the first is forgotten first.
            self._digests.pop(reference, None)
            self._digests[reference] = digest
            if len(self._digests) > self._most:
                del self._digests[next(iter(self._digests))]

    def activity(self, running: Iterable[str], waiting: Iterable[str]) -> AdapterActivity:
        """Name adapters: up to four references each. An adapter that was only a part of sums has no name.

        Args:
            running: Digests on the device, in the order wanted.
            waiting: Digests that requests wait for.
        """
        with self._lock:
            known = list(self._digests.items())
        names: dict[str, list[str]] = {}
        for reference, digest in reversed(known):
            own = names.setdefault(digest, [])
            if len(own) < _NAMES_EACH:
                own.append(reference)
        named = [tuple(name for digest in digests for name in names.get(digest, ())) for digests in (running, waiting)]
        return AdapterActivity(named[0], named[1], self._limit)
