"""Pages of the key-value pool: who uses each page, and full pages found again by a keyed chain hash."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

PAGE_SIZE = 32
"""Tokens of a page."""

SCRATCH = 0
"""Page of no request: padding of static steps writes to it, and the passes that probe a model do."""


class PagePool:
    """Numbers of the pages 1 to `count`, and their users. Pure bookkeeping; one thread uses it.

    A page is free; or in use by one or more requests; or idle: full, keyed, and without a user. An idle page is found
    again by its key until its memory is needed; the page that has been idle for longest is taken first. A page with a
    key is full and computed, and nothing writes to it again.
    """

    def __init__(self, count: int) -> None:
        """All pages free."""
        self.count = count
        self._free = deque(range(1, count + 1))
        self._users = [0] * (count + 1)
        self._key_of: list[bytes | None] = [None] * (count + 1)
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def available(self) -> int:
        """Pages that `take` can give: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Give pages to one request; the caller has asked `available`."""
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                key, self._key_of[page] = self._key_of[page], None
                if key is not None:
                    del self._page_of[key]
            self._users[page] = 1
            pages.append(page)
        return pages

    def find(self, key: bytes) -> int | None:
        """The page with this key, with one user more; None if there is none."""
        page = self._page_of.get(key)
        if page is not None:
            if not self._users[page]:
                del self._idle[page]
            self._users[page] += 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Let others find a page that is full and computed; the first page of a key keeps the key."""
        if key not in self._page_of and self._key_of[page] is None:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: list[int]) -> None:
        """One user less for each page. Of a request's pages the last become idle first, and are taken again first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                if self._key_of[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def freed(self, requests: Iterable[list[int]]) -> int:
        """How many pages these requests alone use; each request is given by its pages."""
        users = Counter(page for pages in requests for page in pages)
        return sum(self._users[page] == count for page, count in users.items())

    def check_invariants(self, in_use: Iterable[list[int]]) -> None:
        """Raise RuntimeError unless the users of the pages are these requests, and each page is in one state."""
        users = Counter(page for pages in in_use for page in pages)
        for page in range(1, self.count + 1):
            if self._users[page] != users[page]:
                raise RuntimeError(f"page {page} counts {self._users[page]} users and has {users[page]}")
        unused = [page for page in range(1, self.count + 1) if not users[page]]
        if sorted([*self._free, *self._idle]) != unused:
            raise RuntimeError("a page is lost, or in two states")
        for key, page in self._page_of.items():
            if self._key_of[page] != key:
                raise RuntimeError(f"page {page} is found by a key that it does not have")
        if sum(key is not None for key in self._key_of) != len(self._page_of):
            raise RuntimeError("a page has a key that does not find it")


def root_key(prefix_key: str, secret: bytes, side: int = 0, adapter_from: int = 0) -> bytes:
    """Where the chain of one tenant and adapter begins.

    Keys and values differ on the other side of a rotary threshold, and where the adapter acts from another position on.
    """
    start = f"{side} {adapter_from} {prefix_key}".encode()
    return hashlib.blake2b(start, digest_size=16, key=secret, person=b"root").digest()


def chain_key(parent: bytes, tokens: Sequence[int], secret: bytes) -> bytes:
    """Key of a full page, from the key of the page before: 128 bits, keyed, so that nobody can find collisions."""
    return hashlib.blake2b(parent + np.array(tokens, np.int32).tobytes(), digest_size=16, key=secret).digest()
