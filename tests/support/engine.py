"""Asking an engine, stores whose reads wait for the test, and waiting for what an engine does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from adapters_store import AdapterBundle, AdapterStore, parse_ref
from adapters_store.errors import InvalidAdapterName
from sera_serve import SeraConfig
from sera_serve.engine import (
    BASE_PRINCIPAL,
    ClassifyResult,
    GenerateParams,
    GenerationResult,
    GenerationStream,
    Principal,
    ServingEngine,
)

SHAPE = SeraConfig(8, 8, 8.0, "all-linear")
Start = Callable[..., ServingEngine]
"""The fixture `start_engine`."""


def acting_for(adapter: str | None) -> Principal:
    """The tenant that owns the adapter."""
    if adapter is None:
        return BASE_PRINCIPAL
    try:
        return Principal(parse_ref(adapter).parts[0])
    except InvalidAdapterName:
        return Principal("stranger")


async def generate(engine: ServingEngine, params: GenerateParams) -> GenerationStream:
    return await engine.generate(params, acting_for(params.adapter))


async def collect(engine: ServingEngine, **params: Any) -> GenerationResult:
    return await (await generate(engine, GenerateParams(**params))).collect()


async def classify(
    engine: ServingEngine, adapter: str, inputs: Sequence[str | tuple[str, str]], **options: Any
) -> ClassifyResult:
    return await engine.classify(adapter, inputs, acting_for(adapter), **options)


class GatedStore(AdapterStore):
    """A store whose reads of bundles wait for the test."""

    gate: threading.Event | None = None

    def loading(self, digest: str) -> AbstractContextManager[AdapterBundle]:
        if self.gate is not None:
            assert self.gate.wait(20)
        return super().loading(digest)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


async def settled(engine: ServingEngine) -> None:
    """Wait until nothing is in flight, and check that nothing is held."""
    await until(lambda: not (engine.in_flight() or engine.waiting() or engine.running() or engine.residency.leases()))
    check_invariants(engine)


def check_invariants(engine: ServingEngine) -> None:
    """Check residency, and the scheduler and the pages of every runner; nothing may be in flight."""
    engine.residency.check_invariants()
    for runner in engine.runners.values():
        runner.scheduler.check_invariants()
    if "generate" in engine.runners:
        planner = engine.runners["generate"].planner
        planner.check_invariants()
        assert not planner.running and planner.pages.available() == planner.pages.count
