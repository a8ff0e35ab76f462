"""A store whose reads wait for the test, and what tests of scheduling wait for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine

SHAPE = SeraConfig(8, 8, 8.0, "all-linear")
Start = Callable[..., ServingEngine]
"""The fixture `start_engine`."""


class GatedStore(AdapterStore):
    """A store whose reads of bundles wait for the test."""

    gate: threading.Event | None = None

    def load(self, digest: str) -> AdapterBundle:
        if self.gate is not None:
            assert self.gate.wait(20)
        return super().load(digest)


async def collect(engine: ServingEngine, **params: Any) -> GenerationResult:
    return await (await engine.generate(GenerateParams(**params))).collect()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


async def settled(engine: ServingEngine) -> None:
    await until(lambda: not (engine.in_flight() or engine.waiting() or engine.running() or engine.residency.leases()))
    engine.residency.check_invariants()
