"""How many elements a kernel may read at a time."""

from __future__ import annotations

from torch import Tensor


def vector_elements(*tensors: Tensor) -> int:
    """Return how many elements 16 bytes hold, if every row of these tensors allows accesses of 16 bytes; else 1."""
    elements = 16 // tensors[0].element_size()
    fits = all(
        t.data_ptr() % 16 == 0 and t.shape[-1] % elements == 0 and (t.dim() == 1 or t.stride(0) % elements == 0)
        for t in tensors
    )
    return elements if fits else 1
