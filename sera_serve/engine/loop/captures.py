"""CUDA graphs by key: captured once, replayed with other contents of the buffers, and done without where one fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import reduce
from operator import or_
from typing import Generic, Protocol, TypeVar

import torch

from sera_kernels import ShapeClasses
from sera_serve.engine.memory import free_memory

logger = logging.getLogger("sera_serve.engine")

# Memory may be short because another process uses the GPU. A capture that fails takes as long as many steps.
_REFUSED_S = 60
# Runs before a capture, in which libraries start, kernels are compiled, and torch's allocator settles.
_WARM_UP_RUNS = 2
# torch keeps one state of random numbers for a GPU, which each capture begins and ends.
_ONE_AT_A_TIME = threading.Lock()


FIRST_CLASSES = ShapeClasses(single=64)
"""SeRA with segments of rank 1, up to rank 64: captured before a request has them."""

# Kinds of shapes that have graphs of their own. There are 432, each with some 60 graphs of steps, of some MB and a
# fifth of a second each: adapters of one tenant alone could take all memory, and keep the loop for an hour.
_MOST_KINDS = 8


class NotCaptured(Exception):
    """Work could not be made static now; nothing of it has run. `Captures.can_run` knows of it."""


class Static(Protocol):
    """Work on buffers that stay where they are."""

    def run(self) -> None:
        """Do the work: Python decides nothing in it, and no operation reads the device."""


K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Static)


def least_covering(captured: list[ShapeClasses], wanted: ShapeClasses) -> ShapeClasses:
    """The least of the captured kinds of shapes that covers the wanted ones; these themselves if there is none.

    It has vectors exactly where they are wanted: else adapters without them would pay for their launches. Without any
    adapter it has no kinds at all. Where `_MOST_KINDS` are captured and none covers the wanted ones, it is all of them
    together, which costs time and is right.
    """
    if not wanted.width:
        return wanted
    covering = [kinds for kinds in captured if kinds | wanted == kinds and kinds.vectors == wanted.vectors]
    if not covering and len(captured) >= _MOST_KINDS:
        return reduce(or_, captured, wanted)
    return min(covering, key=lambda kinds: (kinds.whole, kinds.segmented, kinds.single), default=wanted)


class Captures(Generic[K, S]):
    """The graphs of one thread, in the order of its current stream; they never run at the same time."""

    def __init__(self, make: Callable[[K], S], what: str) -> None:
        """Set up without capturing.

        Args:
            make: Makes the work of a key, with nothing but padding in its buffers.
            what: Is captured, for the log: "a step".
        """
        self._make = make
        self._what = what
        self._graphs: dict[K, tuple[S, torch.cuda.CUDAGraph]] = {}
        # Keys that could not be captured, and when they are tried again (`time.monotonic`).
        self._refused: dict[K, float] = {}
        # One pool of memory for all graphs.
        self._memory = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __iter__(self) -> Iterator[K]:
        """The keys of the graphs."""
        return iter(self._graphs)

    def __contains__(self, key: object) -> bool:
        """Whether there is a graph of a key."""
        return key in self._graphs

    def can_run(self, key: Callable[[], K]) -> bool:
        """Whether a key is not one that could not be captured lately."""
        return not self._refused or time.monotonic() >= self._refused.get(key(), 0)

    def get(self, key: K) -> tuple[S, torch.cuda.CUDAGraph]:
        """The work of a key and its graph, which is captured first where there is none.

        Raises:
            NotCaptured: It could not be captured. For a while it is not to be tried again.
        """
        try:
            return self.captured(key)
        except Exception as error:
            self._refused[key] = time.monotonic() + _REFUSED_S
            logger.warning(
                "no CUDA graph could be made of %s (%s); such ones take longer for %d s",
                self._what,
                key,
                _REFUSED_S,
                exc_info=error,
            )
            free_memory(error)
            raise NotCaptured from error

    def captured(self, key: K) -> tuple[S, torch.cuda.CUDAGraph]:
        """`get`, but what fails is raised as it is."""
        if key not in self._graphs:
            work = self.warmed_up(key)
            torch.cuda.current_stream().synchronize()
            with _ONE_AT_A_TIME:
                self._graphs[key] = work, self._capture(work)
            self._refused.pop(key, None)
        return self._graphs[key]

    def warmed_up(self, key: K) -> S:
        """The work of a key, run a few times over padding."""
        work = self._make(key)
        for _ in range(_WARM_UP_RUNS):
            work.run()
        return work

    def _capture(self, work: S) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`, which collects garbage each time: that takes longer than the capture. Other threads
        # may allocate memory and wait for the device meanwhile.
        graph.capture_begin(self._memory, capture_error_mode="thread_local")
        try:
            work.run()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that has failed."""
        try:
            graph.capture_end()
        except RuntimeError:
            # torch does not close the pool of a capture that cannot be ended. While one is open, the process gives no
            # unused memory back, not even where it is short. No public function closes it, so a torch without these
            # goes on as before.
            with suppress(RuntimeError, AttributeError):
                device = torch.cuda.current_device()
                torch._C._cuda_endAllocateToPool(device, self._memory)
                torch._C._cuda_releasePool(device, self._memory)
        self._memory = torch.cuda.graph_pool_handle()
