"""Bases, stores and engines for the engine's tests."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.layers import served_linear
from support.engine import SHAPE, GatedStore, check_invariants
from support.factories import random_adapter, random_decoder, random_encoder, with_vectors
from support.graph_recorder import static_add_updates
from support.static_batches import ADAPTERS, MAX_RANK, SHAPES


@pytest.fixture(scope="session")
def decoder() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="session")
def encoder() -> FrozenBase:
    return random_encoder()


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """For recordings, which hold every tensor of a step: the memory of many tests would add up to 11 GB.

    They end in cycles, and what is free in a thread's heap stays there when the thread has ended.
    """
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def gated(decoder: FrozenBase, tmp_path: Any) -> GatedStore:
    store = GatedStore(tmp_path / "gated")
    for tenant in ("a", "b"):
        store.publish(random_adapter(decoder, SHAPE, ord(tenant)), f"{tenant}/writer")
        labeler = random_adapter(decoder, SHAPE, ord(tenant) + 1, labels=["no", "yes"], pooling="mean", max_length=200)
        store.publish(labeler, f"{tenant}/labels")
    return store


@pytest.fixture
def start_engine() -> Iterator[Callable[..., ServingEngine]]:
    """Start engines that are checked and stopped at the end of the test."""
    engines = []

    def start(base: FrozenBase, store: AdapterStore, **settings: Any) -> ServingEngine:
        engine = ServingEngine(base, store, ServeSettings(**({"pool_mib": 8, "kv_cache_tokens": 8192} | settings)))
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        if engine.failure() is None:
            assert engine.residency.leases() == 0
            assert engine.in_flight() == 0
            check_invariants(engine)
        engine.stop()


@pytest.fixture
def adapters(decoder: FrozenBase, store: AdapterStore) -> AdapterStore:
    """The adapters of `support.static_batches`, in the store."""
    for seed, name in enumerate(ADAPTERS):
        bundle = random_adapter(decoder, SHAPES[seed % 3], seed, strength=0.5)
        # Two of them with vectors: in batches with others, without them, and in none.
        names = {1: ("q_proj", "v_proj"), 5: ("k_proj", "down_proj")}.get(seed, ())
        store.publish(with_vectors(bundle, gain=names, offset=names[:1], seed=seed), name)
    return store


@pytest.fixture
def static_updates(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the serving layers compute adapters by torch operations: no mode sees what numba does."""
    return lambda: monkeypatch.setattr(served_linear, "add_updates", static_add_updates(MAX_RANK))
