"""Unguessable names and seeds, without a system call for each.

To ask the system for random bytes gives up the interpreter's lock. Where another thread computes, the lock comes back
up to 5 ms later. Each request takes several names, and 256 requests that came at once kept the event loop for 0.3 s, of
which it worked for 0.07. Keys and other secrets that last come from `secrets`.
"""

from __future__ import annotations

import os
from collections import deque

_PIECE = 8
_PIECES = 1024
# Operations of a deque are atomic, so that all threads may take from it.
_stock: deque[bytes] = deque()
# Two processes must not give the same names.
os.register_at_fork(after_in_child=_stock.clear)


def random_hex(nbytes: int) -> str:
    """Return the hexadecimal digits, two a byte, of so many random bytes. Any thread."""
    return random_bytes(nbytes).hex()


def random_seed() -> int:
    """Return a random number of 31 bits. Any thread."""
    return int.from_bytes(random_bytes(4), "little") & 0x7FFFFFFF


def random_bytes(nbytes: int) -> bytes:
    """Return so many bytes of the system's generator, which nobody else gets. Any thread."""
    found = b""
    while len(found) < nbytes:
        try:
            found += _stock.pop()
        except IndexError:
            drawn = os.urandom(_PIECE * _PIECES)
            _stock.extend(drawn[start : start + _PIECE] for start in range(0, len(drawn), _PIECE))
    return found[:nbytes]
