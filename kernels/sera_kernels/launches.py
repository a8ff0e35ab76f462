"""Launch parameters of the Triton kernels: by device, and how many elements they read at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Parameters of the two phases of decoding, and of the first phase of a prompt in blocks of neighbours.

    Attributes:
        reduce_elements: Factors that a program of the first phase reads at a time, at most.
        reduce_thread: Factors that a thread of it reads at a time.
        expand_columns: Columns of an output that a program of the second phase updates.
        expand_warps: Warps of such a program.
        run_tokens: Tokens of a block of a prompt.
        run_inputs: Inputs of each of 16 segments that such a block's program multiplies at a time.

    Raises:
        ValueError: The kernels cannot be compiled for a value.
    """

    reduce_elements: int
    reduce_thread: int
    expand_columns: int
    expand_warps: int
    run_tokens: int
    run_inputs: int

    def __post_init__(self) -> None:
        least = {"reduce_elements": 1024, "expand_columns": 16, "run_tokens": 4, "run_inputs": 32}
        for field in fields(self):
            value = getattr(self, field.name)
            if value < least.get(field.name, 1) or value.bit_count() != 1:
                raise ValueError(
                    f"{field.name} must be a power of two of at least {least.get(field.name, 1)}, not {value}"
                )


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    """Read the shipped file. Its `note` describes the layout."""
    table: dict[str, Any] = json.loads(resources.files("sera_kernels").joinpath("launches.json").read_text())
    return table


@lru_cache(maxsize=64)
def choose_launch(dtype: torch.dtype, device: torch.device) -> Launch:
    """Choose the launch parameters: those of the device's name, else of its compute capability, else those of "any"."""
    devices = _table()["devices"]
    names = []
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device))]
    size = str(dtype.itemsize)
    return Launch(**next(devices[name][size] for name in [*names, "any"] if size in devices.get(name, ())))


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
