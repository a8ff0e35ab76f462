"""Which threads of the process compute on all cores: the engine's, and no others.

Every thread that computes in parallel has an OpenMP pool of its own, and GNU OpenMP's pools stop spinning between two
parallel regions as soon as their threads, all pools together, outnumber the cores. A forward pass has dozens of regions
a layer; woken from sleep for each, it took twice as long (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def single_core_workers(count: int, name: str) -> ThreadPoolExecutor:
    """Threads whose torch operations take one core each, for work beside the engine."""
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


def run_and_forget_pool(work: Callable[[], T]) -> T:
    """Do work in a thread that ends, and its OpenMP pool with it; for what computes before the engine starts."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
