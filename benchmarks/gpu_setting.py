"""What the sections of the GPU suite share: device, sizes, time left, and where the kernel is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# A GPU machine may have torch and Triton alone, with nothing of the project installed.
if find_spec("sera_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import sera_kernels

Row = dict[str, Any]
Grouped = Callable[..., None]
"""Takes what `sera_kernels.grouped_sera` takes."""


class SectionSkipped(Exception):
    """A section cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Setting:
    """How the suite runs.

    Attributes:
        device: A CUDA device, or the CPU in small mode.
        small: Tiny sizes: shows that everything runs, says nothing about speed.
        operation: What is checked and timed, and its name.
        deadline: `time.monotonic()` at which the budget is spent.
        layers: Decoder layers of the whole decode step.
        peer_kernels: Folder of an unpacked vLLM wheel, or None.
        started: `time.monotonic()` of the start.
    """

    device: torch.device
    small: bool
    operation: tuple[str, Grouped]
    deadline: float
    layers: int
    peer_kernels: Path | None
    started: float

    @property
    def on_gpu(self) -> bool:
        """Whether figures say anything about a GPU."""
        return self.device.type == "cuda"

    @property
    def l2_bytes(self) -> int:
        """Second-level cache; a stand-in on the CPU, so that sets of operands rotate there too."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.on_gpu else 1 << 13

    def out_of_time(self) -> bool:
        """Whether what has not begun must be left."""
        return time.monotonic() > self.deadline

    def say(self, text: str) -> None:
        """A progress line, with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)


def find_operation(device: torch.device) -> tuple[str, Grouped]:
    """The grouped operation as layers reach it, or the Triton kernel itself under Triton's interpreter.

    Raises:
        SectionSkipped: On a GPU, where the Triton kernel cannot be imported.
    """
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        try:
            from sera_kernels.triton_path import grouped_sera_triton
        except ImportError as error:
            raise SectionSkipped(f"the Triton kernel cannot be imported: {error}") from error
        if device.type == "cpu":
            return "grouped_sera_triton, interpreted", grouped_sera_triton
    return "grouped_sera", sera_kernels.grouped_sera
