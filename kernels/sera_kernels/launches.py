"""Launch parameters of the Triton kernel, by device and shape. Parameters that nobody has measured are guesses."""

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
        block_m: Tokens of a tile, at least 16. With 1 there are no tiles, and each token has its own programs.
        columns: Columns of an output that a program updates, at least 16.
        elements: Factors that the program of a single token reads at a time, at least 1024 and 2 * `columns`.
        block_n: Columns that the program of a tile holds at a time, at least 32.
        block_r: Ranks that the program of a tile reduces at a time, at least 16.
        block_k: Inputs that the program of a tile reads at a time, at least 16.
        num_warps: Warps of a program.
        num_stages: Loads in flight in a loop.
        max_registers: Registers of a thread. With fewer registers, more programs fit on a multiprocessor.

    Raises:
        ValueError: The kernel cannot be compiled for a value.
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
    """Read the shipped file. Its `note` describes the layout."""
    table: dict[str, Any] = json.loads(resources.files("sera_kernels").joinpath("launches.json").read_text())
    return table


@lru_cache(maxsize=4096)
def choose_launch(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """Choose the launch parameters for a device and a shape.

    The table has a list of rows for each device. The list is looked up by the device's name, then by its compute
    capability, then under "any". `pick_row` chooses the row.
    """
    devices = _table()["devices"]
    names = []
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device))]
    rows = next(devices[name]["rows"] for name in [*names, "any"] if name in devices)
    return pick_row(rows, tokens, d_in, d_out, dtype.itemsize)


def pick_row(rows: list[dict[str, Any]], tokens: int, d_in: int, d_out: int, element_bytes: int) -> Launch:
    """Pick the row of one device's list that fits best.

    Rows for another element size are left out. A row fits `tokens` if it was made for at least as many tokens. Among
    the rows that fit, the rows for the smallest number of tokens are taken. If no row fits, the rows for the largest
    number of tokens are taken. Among these, the row with the nearest widths is picked.
    """

    def misfit(row: dict[str, Any]) -> tuple[bool, int, float]:
        short = row["tokens"] < tokens
        widths = abs(log2(row["d_in"] / d_in)) + abs(log2(row["d_out"] / d_out))
        return short, -row["tokens"] if short else row["tokens"], widths

    row = min((row for row in rows if row["element_bytes"] == element_bytes), key=misfit)
    return Launch(**row["launch"])
