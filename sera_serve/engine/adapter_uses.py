"""Which adapters have used and pinned which content. All adapters with one content share its memory, in any tenant."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from sera_serve.residency import Presence

# Pairs of an adapter and a content that are remembered: some hundred bytes each.
_MOST = 65_536
ANYONE = ""
"""In place of an adapter: a pin that no adapter asked for by its name."""


class AdapterUses:
    """Remembers which adapter has used, and which has pinned, which content. Thread-safe.

    Without it, a tenant would see another tenant's content on the device, and would end another tenant's pin, by an
    adapter of its own with the same content.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._used: dict[tuple[str, str], None] = {}
        self._pinned: dict[str, set[str]] = {}
        # Calls that have not ended.
        self._pinning: Counter[str] = Counter()

    def note(self, adapter: str, digest: str) -> None:
        """Note that a request has used a content by the name of an adapter. The oldest notes are forgotten."""
        with self._lock:
            self._used.pop((adapter, digest), None)
            self._used[adapter, digest] = None
            if len(self._used) > _MOST:
                del self._used[next(iter(self._used))]

    def begin_pin(self, adapter: str, digest: str) -> None:
        """Note that a call is to pin a content for an adapter, before the content is pinned."""
        self.note(adapter, digest)
        with self._lock:
            self._pinning[digest] += 1

    def end_pin(self, adapter: str, digest: str, *, has_pinned: bool) -> bool:
        """Note how a call of `begin_pin` has ended. Returns whether nobody pins the content, or is about to."""
        with self._lock:
            self._pinning[digest] -= 1
            if not self._pinning[digest]:
                del self._pinning[digest]
            if has_pinned:
                self._pinned.setdefault(digest, set()).add(adapter)
            return self._is_free(digest)

    def unpin(self, adapter: str, digest: str) -> bool:
        """Forget a pin. Returns whether nobody pins the content any more, or is about to. Idempotent."""
        with self._lock:
            holders = self._pinned.get(digest, set())
            holders.discard(adapter)
            if not holders:
                self._pinned.pop(digest, None)
            return self._is_free(digest)

    def forget_pins(self, digest: str) -> None:
        """Forget all pins of a content, which is gone."""
        with self._lock:
            self._pinned.pop(digest, None)

    def holders(self, digest: str) -> list[str]:
        """The adapters that pin a content."""
        with self._lock:
            return sorted(self._pinned.get(digest, ()))

    def visible(self, adapters: Iterable[tuple[str, str]], places: Iterable[Presence]) -> list[Presence]:
        """Where the contents of adapters are, as far as these adapters have used or pinned them.

        Args:
            adapters: Pairs of an adapter and its content.
            places: Where each content is.
        """
        with self._lock:
            return [
                Presence(
                    place.tier if (adapter, digest) in self._used else "store",
                    place.is_pinned and adapter in self._pinned.get(digest, ()),
                )
                for (adapter, digest), place in zip(adapters, places, strict=True)
            ]

    def _is_free(self, digest: str) -> bool:
        return digest not in self._pinned and digest not in self._pinning
