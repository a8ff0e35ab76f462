"""How steps are captured as graphs, with a driver that only writes down what it is asked."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sera_kernels import ShapeClasses
from sera_serve.engine.loop import graphs
from sera_serve.engine.loop.graphs import NotCapturable, StepGraphs, check_capturable
from sera_serve.engine.loop.static_step import StaticKey


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch's modes of watching for waits, as they are set."""
    log: list[Any] = []

    def set_mode(mode: Any) -> None:
        if not log:
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet", stacklevel=2)
        log.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return log


def waits() -> None:
    raise RuntimeError("called a synchronizing CUDA operation")


def fails() -> None:
    raise RuntimeError("no memory")


def test_a_base_that_waits_for_the_device_is_named_before_the_capture(modes: list[Any]) -> None:
    with pytest.raises(NotCapturable, match=r"waits \(.*test_graph_capture\.py, line \d+\) waits for the device"):
        check_capturable(waits)
    with pytest.raises(RuntimeError, match="no memory"):
        check_capturable(fails)
    check_capturable(lambda: modes.append("ran"))
    assert modes == ["error", 0, "error", 0, "error", "ran", 0]


class Driver:
    """Stands for torch's graphs: at most one capture at a time in a pool of memory."""

    def __init__(self) -> None:
        self.pools = 0
        self.open: set[int] = set()
        self.can_end = True

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def CUDAGraph(self) -> Any:
        held: list[int] = []

        def begin(pool: int, capture_error_mode: str) -> None:
            if pool in self.open:
                raise RuntimeError(f"already recording to pool {pool}")
            self.open.add(pool)
            held.append(pool)

        def end() -> None:
            if not self.can_end:
                raise RuntimeError("a stream has not come back")
            self.open.remove(held[0])

        return SimpleNamespace(capture_begin=begin, capture_end=end)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", made.new_pool)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    return made


@pytest.mark.parametrize("can_end", [True, False])
def test_a_capture_that_fails_does_not_bar_the_next(
    can_end: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[bool] = []

    def run() -> None:
        runs.append(True)
        # After the warm-up, in the first capture.
        if len(runs) == graphs._WARM_UP_RUNS + 1:
            driver.can_end = can_end
            raise torch.OutOfMemoryError("out of memory")

    step = SimpleNamespace(stage=lambda batch, tables: 0, upload=lambda turn: None, run=run)
    monkeypatch.setattr(graphs, "StaticStep", lambda *_, **__: step)
    tables = SimpleNamespace(pages=torch.zeros(4, 8))
    found = StepGraphs(SimpleNamespace(device="cpu"), None, None, tables)  # type: ignore[arg-type]
    key = StaticKey(1, 1, ShapeClasses(), sampled=False, truncated=False)
    with pytest.raises(torch.OutOfMemoryError):
        found._graph(key)
    driver.can_end = True
    captured = found._graph(key)
    assert captured[0] is step and found._graph(key) is captured  # type: ignore[comparison-overlap]
    assert len(runs) == 2 * (graphs._WARM_UP_RUNS + 1)
