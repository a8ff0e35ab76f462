"""Times of single launches: CUDA graphs of many, replayed in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.gpu_setting import Setting

ROUNDS = 7
Launch = Callable[[int], object]


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        launch: Does it once; its argument counts from 0, so that operands can rotate.
        launches: How many make up one graph.
    """

    launch: Launch
    launches: int


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record `step` in a CUDA graph, after two runs in which Triton compiles and libraries start.

    `torch.cuda.graph` would collect garbage each time, which takes longer than most of what is measured here.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side_stream()):
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


@cache
def _side_stream() -> torch.cuda.Stream:
    # One for all captures: memory that one stream frees is of no use to another.
    return torch.cuda.Stream()


def interleaved(setting: Setting, cases: Mapping[str, Timed], rounds: int = ROUNDS) -> dict[str, float]:
    """Median microseconds of one launch of each case; the cases take turns, so that a slow moment hits all.

    On a GPU without any time between launches but the GPU's own; on a CPU a loop, which shows that the case runs.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    if not setting.on_gpu:
        for name, case in cases.items():
            start = time.perf_counter()
            for i in range(case.launches):
                case.launch(i)
            times[name].append((time.perf_counter() - start) * 1e6 / case.launches)
        return {name: values[0] for name, values in times.items()}
    graphs = {name: capture(lambda case=case: _all(case)) for name, case in cases.items()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) * 1e3 / cases[name].launches)
    return {name: statistics.median(values) for name, values in times.items()}


def _all(case: Timed) -> None:
    for i in range(case.launches):
        case.launch(i)


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second of a large copy on the device, read and written counted."""
    elements = (1 << 29) if setting.on_gpu else (1 << 18)
    source = torch.randn(elements // 4, device=setting.device).repeat(2).to(torch.bfloat16)
    target = torch.empty_like(source)
    us = interleaved(setting, {"copy": Timed(lambda _: target.copy_(source), 4)})["copy"]
    return 2 * source.nbytes / us * 1e6


def empty_launch(setting: Setting) -> float:
    """Microseconds of a launch that does next to nothing, as one of many in a graph."""
    one = torch.zeros(1, device=setting.device)
    return interleaved(setting, {"empty": Timed(lambda _: one.add_(1), 256)})["empty"]
