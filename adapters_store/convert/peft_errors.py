"""Refusals of checkpoints of other libraries; a bundle cannot meet them, so that FORMAT.md does not list them."""

from __future__ import annotations

from adapters_store.errors import InvalidBundle


class UnsupportedAdapter(InvalidBundle):
    """A checkpoint of another library asks for something that a bundle cannot hold; `param` names what."""

    code = "unsupported_adapter"


class RankTooLarge(InvalidBundle):
    """A layer's rank is higher than `rank_fault` allows. The code is that of a bundle with such a rank."""

    code = "adapter_too_large"


class PickledCheckpoint(InvalidBundle):
    """The weights are pickled: reading them could run any program. They are never read."""

    code = "pickled_checkpoint"
