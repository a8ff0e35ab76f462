"""Salts for the hashes by which the paged cache finds prompts that begin alike."""

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache
from itertools import cycle

import numpy as np


class PrefixSalts:
    """Maps the tokens of a sequence to others, one way for each key, before the cache hashes them.

    Blocks of two keys are then as different as any two prompts. The mapping depends on a secret of this object:
    the cache's hash has 64 bits, for which somebody who could compute it might find two prompts that collide.
    """

    def __init__(self, page_size: int) -> None:
        """For a cache whose pages hold `page_size` tokens: each is hashed by itself, and by what comes before it."""
        self._page_size = page_size
        self._secret = secrets.token_bytes(32)
        self._mask = lru_cache(maxsize=4096)(self._make_mask)

    def salted(self, tokens: list[int], key: str) -> list[int]:
        """As many integers of 31 bits as there are tokens; alike for tokens and keys that are alike, and only then."""
        return [token ^ mask for token, mask in zip(tokens, cycle(self._mask(key)), strict=False)]

    def _make_mask(self, key: str) -> tuple[int, ...]:
        # One mask a place: a single one for all might be the difference between two prompts.
        stream = hashlib.shake_256(self._secret + key.encode()).digest(4 * self._page_size)
        return tuple((np.frombuffer(stream, np.uint32) >> 1).tolist())
