"""The adapters of the forward pass under way: set once a step, read by every serving layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sera_kernels import AdapterBatch, AdapterTables


class AdapterContext:
    """Device pool, tables and the current batch, shared by the serving layers of one model.

    One model object runs one forward pass at a time; a second engine over the same weights has its own model object
    and its own context.

    Attributes:
        pool: (elements,) factors of all resident adapters.
        tables: Where each adapter's factors lie.
        batch: The pass under way, or None between passes and for a batch of the bare base alone.
    """

    def __init__(self, pool: Tensor, tables: AdapterTables) -> None:
        self.pool = pool
        self.tables = tables
        self.batch: AdapterBatch | None = None

    @contextmanager
    def run(self, batch: AdapterBatch | None) -> Iterator[None]:
        """Make `batch` the current one inside the block.

        Raises:
            RuntimeError: Another batch is current: passes of one model must not overlap.
        """
        self.enter(batch)
        try:
            yield
        finally:
            self.exit()

    def enter(self, batch: AdapterBatch | None) -> None:
        """Begin a pass; for callers that see its two ends in different functions (forward hooks)."""
        if self.batch is not None:
            raise RuntimeError("a forward pass with adapters is already running on this model")
        self.batch = batch

    def exit(self) -> None:
        """End the pass."""
        self.batch = None
