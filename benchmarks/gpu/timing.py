"""Times of single launches: CUDA graphs of many, replayed in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks.gpu.setting import Setting

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


@dataclass(frozen=True)
class Captured:
    """A CUDA graph, and what was captured: a graph itself does not keep the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], None]

    def replay(self) -> None:
        """Run the step again, with other contents of its tensors."""
        self.graph.replay()


def capture(step: Callable[[], None]) -> Captured:
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
    return Captured(graph, step)


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
    graphs = {name: capture(partial(_all, case)) for name, case in cases.items()}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            us = gpu_milliseconds(graph.replay, 1) * 1e3 / cases[name].launches
            if turn:
                times[name].append(us)
    return {name: statistics.median(values) for name, values in times.items()}


def _all(case: Timed) -> None:
    for i in range(case.launches):
        case.launch(i)


def gpu_milliseconds(run: Callable[[], object], times: int) -> float:
    """Milliseconds of one of so many runs, by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def cpu_milliseconds(run: Callable[[], object]) -> float:
    """Milliseconds of one run by the host's clock."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
