"""Launch parameters of the Triton kernel, by device and shape: measured ones where there are, else guesses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import log2
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """Parameters of one launch.

    Attributes:
        block_m: Tokens of a tile, at least 16; or 1, which gives each token programs of its own.
        columns: Columns of an output that a program updates.
        elements: Factors that a single token's program reads at a time; at least 1024, and twice `columns`.
        block_n: Of these, those that a tile's program holds at a time; at least 32.
        block_r: Ranks that a tile's program reduces at a time; at least 16.
        block_k: Inputs that a tile's program reads at a time; at least 16.
        num_warps: Of a program.
        num_stages: Loads that loops keep under way.
        max_registers: Of a thread; with fewer, more programs fit on a multiprocessor.

    Raises:
        ValueError: A value that the kernel cannot be compiled for.
    """

    block_m: int
    columns: int
    elements: int
    block_n: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int

    def __post_init__(self) -> None:
        least = {"block_m": 1, "columns": 16, "elements": max(1024, 2 * self.columns), "block_n": 32, "block_r": 16}
        least |= {"block_k": 16, "num_warps": 1}
        for name, value in least.items():
            if getattr(self, name) < value or getattr(self, name).bit_count() != 1:
                raise ValueError(f"{name} must be a power of two of at least {value}, not {getattr(self, name)}")
        if 1 < self.block_m < 16:
            raise ValueError(f"block_m must be 1 or at least 16, not {self.block_m}")


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    """The shipped file; its `note` says how it is laid out."""
    table: dict[str, Any] = json.loads(resources.files("sera_kernels").joinpath("launches.json").read_text())
    return table


@lru_cache(maxsize=4096)
def choose_launch(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """What the table has for the device's name, else for its compute capability, else for any device.

    Of its rows for the dtype's size: those for the least number of tokens that is enough (else for the most), and of
    these the one whose widths are nearest.
    """
    devices = _table()["devices"]
    names = []
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device))]
    rows = next(devices[name]["rows"] for name in [*names, "any"] if name in devices)
    return pick_row(rows, tokens, d_in, d_out, dtype.itemsize)


def pick_row(rows: list[dict[str, Any]], tokens: int, d_in: int, d_out: int, element_bytes: int) -> Launch:
    """The row of one device's list that fits best."""

    def misfit(row: dict[str, Any]) -> tuple[bool, int, float]:
        short = row["tokens"] < tokens
        widths = abs(log2(row["d_in"] / d_in)) + abs(log2(row["d_out"] / d_out))
        return short, -row["tokens"] if short else row["tokens"], widths

    row = min((row for row in rows if row["element_bytes"] == element_bytes), key=misfit)
    return Launch(**row["launch"])
