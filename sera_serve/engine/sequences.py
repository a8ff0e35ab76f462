"""A sequence in the continuous batch, as its callers see it: what it asks for, and what they hear of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sera_kernels import NO_ADAPTER


@dataclass(frozen=True)
class SequenceOptions:
    """What one sequence needs in every step: its adapter and its sampling.

    Attributes:
        prefix_key: Sequences of one key, made of tenant and adapter, share the cache of prompts that begin alike;
            with None a sequence shares with no other, whose waiting time would tell what others have asked.
    """

    adapter_slot: int = NO_ADAPTER
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    prefix_key: str | None = None

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves out any token."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True)
class SequenceUpdate:
    """News of one sequence, from the engine's thread.

    Attributes:
        tokens: All tokens generated so far.
        ended: No forward pass will use the sequence, or its adapter slot, any more.
        error: Why it failed, or None.
    """

    request_id: str
    tokens: list[int]
    ended: bool
    error: str | None = None


class SequenceListener(Protocol):
    """Receives updates on the engine's thread; must return quickly and not raise."""

    def on_update(self, update: SequenceUpdate) -> None:
        """Take note of `update`."""

    def on_prefix(self, request_id: str, cached_tokens: int) -> None:
        """Take note that so many tokens of a sequence's prompt were found in the cache."""
