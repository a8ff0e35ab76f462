"""What every section knows: device, sizes, time left, the operation under test, and figures of earlier sections."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import sera_kernels
from benchmarks.gpu.record import Record, Row

Grouped = Callable[..., None]
"""Takes what `sera_kernels.grouped_sera` takes."""


class SectionSkipped(Exception):
    """A section cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Options:
    """How the benchmark was started. Processes of sections get it as it is, or as JSON.

    Attributes:
        command: "first" or "second".
        record: File of the rows.
        log: File of all that sections print.
        small: Tiny sizes: shows that everything runs, says nothing about speed.
        layers: Decoder layers of the large base.
        peer_kernels: Folder of an unpacked vLLM wheel, or None.
        started: `time.monotonic()` of the start, which all processes of a machine share.
        budget_s: Seconds from the start until everything ends.
        has_gpu: Whether torch sees a CUDA device.
    """

    command: str
    record: str
    log: str
    small: bool
    layers: int
    peer_kernels: str | None
    started: float
    budget_s: float
    has_gpu: bool

    @property
    def record_path(self) -> Path:
        """File of the rows."""
        return Path(self.record)

    @property
    def deadline(self) -> float:
        """`time.monotonic()` at which everything ends."""
        return self.started + self.budget_s


@dataclass(frozen=True)
class Setting:
    """How a section runs.

    Attributes:
        device: A CUDA device, or the CPU in small mode.
        small: Tiny sizes: shows that everything runs, says nothing about speed.
        operation: What the kernel's sections check and time, and its name.
        deadline: `time.monotonic()` after which a section with many points begins no more of them.
        layers: Decoder layers of the large base.
        peer_kernels: Folder of an unpacked vLLM wheel, or None.
        started: `time.monotonic()` of the benchmark's start.
        record: Rows of the sections that have run.
    """

    device: torch.device
    small: bool
    operation: tuple[str, Grouped]
    deadline: float
    layers: int
    peer_kernels: Path | None
    started: float
    record: Record

    @classmethod
    def of(cls, options: Options, deadline: float) -> Setting:
        """The setting of a section that has until `deadline`.

        Raises:
            SectionSkipped: See `find_operation`.
        """
        device = torch.device("cuda" if options.has_gpu else "cpu")
        return cls(
            device,
            options.small,
            find_operation(device),
            deadline,
            options.layers,
            None if options.peer_kernels is None else Path(options.peer_kernels),
            options.started,
            Record(options.record_path),
        )

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
        """A progress line in the log, with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def figure(self, name: str) -> float:
        """A figure of the section `machine`.

        Raises:
            SectionSkipped: That section has not found it.
        """
        for row in self.record.rows():
            if row["section"] == "machine" and name in row:
                return float(row[name])
        raise SectionSkipped(f"the section machine has not found {name}")


def find_operation(device: torch.device, interpreted: bool = False) -> tuple[str, Grouped]:
    """The grouped operation as layers reach it, or the Triton kernel itself under Triton's interpreter.

    Raises:
        SectionSkipped: The Triton kernel is what would run, and it cannot be imported.
    """
    if device.type == "cuda" or interpreted:
        try:
            from sera_kernels.triton_path import grouped_sera_triton
        except ImportError as error:
            raise SectionSkipped(f"the Triton kernel cannot be imported: {error}") from error
        if device.type == "cpu":
            return "grouped_sera_triton, interpreted", grouped_sera_triton
    return "grouped_sera", sera_kernels.grouped_sera


__all__ = ["Grouped", "Options", "Row", "SectionSkipped", "Setting", "find_operation"]
