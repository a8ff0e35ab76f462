"""The server under siege: its own process and temporary folder, and a gauge of what it holds."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

# A server above this is killed, so that the machine survives.
RSS_CAP_MIB = 4096
_PERIOD_S = 0.1


@dataclass(frozen=True)
class Reading:
    """What a process held at one time, or at most within some time.

    Attributes:
        rss_mib: Resident memory.
        files: Open descriptors, connections among them.
        temp_mib: Bytes of its files in the temporary folder, those without a name among them.
    """

    rss_mib: float = 0.0
    files: int = 0
    temp_mib: float = 0.0

    def __or__(self, other: Reading) -> Reading:
        """The greater of each."""
        return Reading(
            max(self.rss_mib, other.rss_mib), max(self.files, other.files), max(self.temp_mib, other.temp_mib)
        )


def read(process: psutil.Process, temp: Path) -> Reading:
    """Read what a process holds now.

    Raises:
        psutil.NoSuchProcess, FileNotFoundError: The process has ended.
    """
    rss = process.memory_info().rss
    count = size = 0
    # psutil lists no file without a name, and temporary files have none.
    with os.scandir(f"/proc/{process.pid}/fd") as descriptors:
        for descriptor in descriptors:
            count += 1
            with contextlib.suppress(FileNotFoundError):
                if Path(descriptor.path).readlink().is_relative_to(temp):
                    size += Path(descriptor.path).stat().st_size
    return Reading(round(rss / 2**20, 1), count, round(size / 2**20, 1))


class Gauge(threading.Thread):
    """Reads a process ten times a second, and kills the process when its memory passes the cap."""

    def __init__(self, pid: int, temp: Path) -> None:
        """Start at once."""
        super().__init__(name="gauge", daemon=True)
        self.most = Reading()
        self.over_cap = False
        self._process = psutil.Process(pid)
        self._temp = temp
        self._end = threading.Event()
        self.start()

    def now(self) -> Reading:
        """Read once; zeros where the process has ended."""
        try:
            return read(self._process, self._temp)
        except (psutil.NoSuchProcess, FileNotFoundError):
            return Reading()

    def processor_s(self) -> float:
        """Seconds of processor time that the process has had so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def begin(self) -> Reading:
        """Forget the most so far; returns a reading."""
        self.most = now = self.now()
        return now

    def run(self) -> None:
        """Read until `close`."""
        while not self._end.wait(_PERIOD_S):
            now = self.now()
            self.most |= now
            if now.rss_mib > RSS_CAP_MIB:
                self.over_cap = True
                self._process.kill()
                return

    def close(self) -> None:
        """Stop reading."""
        self._end.set()
        self.join()
