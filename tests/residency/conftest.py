"""Residency over small adapters; the invariants are checked after every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slow_store import Build, Store

from adapters_store import AdapterBundle
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.residency import AdapterResidency, DevicePool, HostCache, LoaderThreads, pack
from support.factories import random_adapter, random_decoder

LARGE = SeraConfig(8, 8, 8.0, "all-linear")
SMALL = SeraConfig(4, 1, 8.0, ("q_proj",), use_mixer=False)


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="session")
def index(base: FrozenBase) -> dict[str, int]:
    return {path: row for row, path in enumerate(base.module_shapes())}


@pytest.fixture(scope="session")
def bundles(base: FrozenBase) -> dict[str, AdapterBundle]:
    """Eight adapters by digest: large and small in turn."""
    adapters = [random_adapter(base, (LARGE, SMALL)[i % 2], seed=i) for i in range(8)]
    return {bundle.digest: bundle for bundle in adapters}


@pytest.fixture(scope="session")
def large(bundles: dict[str, AdapterBundle]) -> list[str]:
    return list(bundles)[::2]


@pytest.fixture(scope="session")
def small(bundles: dict[str, AdapterBundle]) -> list[str]:
    return list(bundles)[1::2]


@pytest.fixture
def store(bundles: dict[str, AdapterBundle]) -> Iterator[Store]:
    store = Store(bundles)
    yield store
    store.let_go()


@pytest.fixture
def build(store: Store, index: dict[str, int], bundles: dict[str, AdapterBundle]) -> Iterator[Build]:
    made = []
    largest = max(pack(bundle, index, torch.float32).nbytes for bundle in bundles.values())

    def build(
        room: float, host: float = 0, slots: int = 64, threads: LoaderThreads | None = None, **options: Any
    ) -> AdapterResidency:
        """A pool and a host cache with room for that many of the larger adapters."""
        pool = DevicePool(int(room * largest), len(index), slots, torch.float32)
        residency = AdapterResidency(store.loading, pool, HostCache(int(host * largest)), index, threads, **options)
        made.append(residency)
        return residency

    yield build
    for residency in made:
        residency.check_invariants()
        residency.close()
        residency.check_invariants()
