"""The adapter context: device pool, adapter tables, and the batch of the running forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sera_kernels import AdapterBatch, AdapterTables


class AdapterContext:
    """What the serving layers of one model read: pool, tables, and the batch of the running forward pass.

    One model object runs one forward pass at a time. A second engine on the same weights needs its own model object and
    its own context.

    Attributes:
        pool: (elements,) factors of all resident adapters.
        tables: Offset and shape of each adapter's factors.
        batch: The slot of each token of the running pass. None between passes, and in a pass of the base model alone.
    """

    def __init__(self, pool: Tensor, tables: AdapterTables) -> None:
        self.pool = pool
        self.tables = tables
        self.batch: AdapterBatch | None = None
        self._running = False

    @contextmanager
    def run(self, batch: AdapterBatch | None) -> Iterator[None]:
        """Run one forward pass inside the block, with `batch` as its adapters. Blocks must not nest.

        Raises:
            RuntimeError: A forward pass is running on this model.
        """
        if self._running:
            raise RuntimeError("a forward pass is already running on this model; passes of one model must not overlap")
        self._running, self.batch = True, batch
        try:
            yield
        finally:
            self._running, self.batch = False, None
