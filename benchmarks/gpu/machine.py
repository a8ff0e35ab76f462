"""What the machine can do at most: bytes a second, and an empty launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved


def measure_machine(setting: Setting) -> Iterator[Row]:
    """The GPU, and the figures that bounds are made of.

    `memory_bytes_per_s` is the greater of a copy (read and written) and a sum (read alone), by kernels of one element
    after the other: `copy_` in a graph becomes a copy by another engine, which is slower than a kernel.
    """
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        yield {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / (1 << 30),
            "l2_mib": properties.L2_cache_size / (1 << 20),
            "cuda": torch.version.cuda,
        }
    elements = (1 << 28) if setting.on_gpu else (1 << 16)
    source = torch.ones(elements, dtype=torch.float32, device=setting.device)
    target, total = torch.empty_like(source), torch.empty((), device=setting.device)
    one = torch.zeros(1, device=setting.device)
    cases = {
        "copy": Timed(lambda _: torch.add(source, 1, out=target), 4),
        "sum": Timed(lambda _: torch.sum(source, 0, out=total), 4),
        "empty": Timed(lambda _: one.add_(1), 256 if setting.on_gpu else 2),
    }
    us = interleaved(setting, cases)
    copied, read = 2 * source.nbytes / us["copy"] * 1e6, source.nbytes / us["sum"] * 1e6
    yield {
        "copy_bytes_per_s": copied,
        "read_bytes_per_s": read,
        "memory_bytes_per_s": max(copied, read),
        "empty_launch_us": us["empty"],
    }
