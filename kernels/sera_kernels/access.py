"""How many elements a kernel may read at a time."""

from __future__ import annotations

from torch import Tensor


def vector_elements(*rows: Tensor, pool: Tensor | None = None) -> int:
    """Return how many elements 16 bytes hold, if every row of these tensors allows accesses of 16 bytes; else 1.

    Args:
        rows: (tokens, width) each, all of one dtype.
        pool: The factors, of the same dtype, if the kernel reads them. It checks each adapter's own place itself.
    """
    some = rows[0] if pool is None else pool
    elements = 16 // some.element_size()
    fits = all(t.data_ptr() % 16 == 0 and t.stride(0) % elements == 0 and t.shape[1] % elements == 0 for t in rows)
    return elements if fits and some.data_ptr() % 16 == 0 else 1
