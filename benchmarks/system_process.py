"""Systems that are compared, each in a process of its own, as it would run.

In one process they would slow each other down: GNU OpenMP stops spinning between parallel regions as soon as the
threads of all its pools outnumber the cores, and every thread that computes has a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

Case = Callable[[], Any]


@dataclass(frozen=True)
class System:
    """One thing to measure: its cases by name, and how to end its threads."""

    cases: dict[str, Case]
    close: Callable[[], None] = lambda: None


class SystemProcess:
    """One system in a process of its own, which idles between cases."""

    def __init__(self, system: Callable[[Any], System], setting: Any) -> None:
        """Start the process and begin to build the system."""
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self._built = self._pool.submit(_build, system, setting)

    def run(self, case: str) -> Any:
        """Run one case and wait for it."""
        self._built.result()
        return self._pool.submit(_run, case).result()

    def close(self) -> None:
        """End the process."""
        self._pool.submit(_close)
        self._pool.shutdown()


# The one system of this process, where it is a SystemProcess's.
_systems: list[System] = []


def _build(system: Callable[[Any], System], setting: Any) -> None:
    # In a thread that ends, and its OpenMP pool with it: what runs later is then alone.
    with ThreadPoolExecutor(1) as thread:
        _systems.append(thread.submit(system, setting).result())


def _run(case: str) -> Any:
    return _systems[0].cases[case]()


def _close() -> None:
    for system in _systems:
        system.close()
