"""Thread pools: only the engine's threads compute on all cores.

Every thread that computes in parallel has its own OpenMP pool. GNU OpenMP's threads spin between two parallel regions,
unless the threads of all pools outnumber the cores; then they sleep. A forward pass has dozens of regions a layer. With
threads that wake from sleep for each region, a forward pass took twice as long (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def single_core_workers(count: int, name: str) -> ThreadPoolExecutor:
    """Make a pool for work beside the engine, in which each thread's torch operations use one core."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


def run_and_forget_pool(work: Callable[[], T]) -> T:
    """Run work that computes before the engine starts, in a thread of its own.

    The thread ends with the work, and so does the thread's OpenMP pool.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
