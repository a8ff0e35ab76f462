"""Asking an engine in this process, and waiting until it holds nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adapters_store import AdapterStore, parse_ref
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import (
    BASE_PRINCIPAL,
    GenerateParams,
    GenerationResult,
    GenerationStream,
    Principal,
    ServingEngine,
)

_SETTLE_S = 20


@contextmanager
def running_engine(base: FrozenBase, store: AdapterStore, **settings: Any) -> Iterator[ServingEngine]:
    """An engine with these settings, started, and stopped at the end of the block."""
    device = base.device.type
    engine = ServingEngine(base, store, ServeSettings(device=device, **settings))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def principal(adapter: str | None) -> Principal:
    """The tenant that owns an adapter."""
    return BASE_PRINCIPAL if adapter is None else Principal(parse_ref(adapter).parts[0])


async def start(engine: ServingEngine, params: GenerateParams) -> GenerationStream:
    """Begin one generation."""
    return await engine.generate(params, principal(params.adapter))


async def collect(engine: ServingEngine, params: GenerateParams) -> GenerationResult:
    """One whole generation."""
    return await (await start(engine, params)).collect()


def ask_all(engine: ServingEngine, batch: Sequence[GenerateParams]) -> list[GenerationResult]:
    """Ask for all at once; returns when all have ended and the engine holds nothing."""

    async def ask() -> list[GenerationResult]:
        results = await asyncio.gather(*(collect(engine, params) for params in batch))
        await settled(engine)
        return list(results)

    return asyncio.run(ask())


async def settled(engine: ServingEngine) -> None:
    """Wait until nothing is in flight, and check the invariants of all that is held.

    Raises:
        RuntimeError: Something is still held.
    """
    deadline = time.monotonic() + _SETTLE_S
    while engine.in_flight() or engine.waiting() or engine.running() or engine.residency.leases():
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_SETTLE_S} s something is still in flight")
        await asyncio.sleep(0.002)
    engine.residency.check_invariants()
    for runner in engine.runners.values():
        runner.scheduler.check_invariants()
    planner = engine.runners["generate"].planner  # type: ignore[attr-defined]
    planner.check_invariants()
    if planner.running or planner.pages.available() != planner.pages.count:
        raise RuntimeError("pages are still in use, or requests in the batch, with nothing in flight")
