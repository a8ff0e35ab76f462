"""What adapters take of host memory: the host cache, counted exactly, and nothing beside it."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import wait
from typing import Any

import psutil
import pytest
import torch
from slow_store import Build, Store, granted, until, wait_for_loads

from adapters_store import AdapterBundle, AdapterConfig
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.residency import AdapterResidency, HostCache, PackedAdapter, pack
from sera_serve.residency import loader as loader_module
from support.factories import random_adapter


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Any]:
    """Packed host tensors that something still refers to."""
    tensors: weakref.WeakSet[Any] = weakref.WeakSet()

    def watched(*args: Any, **options: Any) -> PackedAdapter:
        packed = pack(*args, **options)
        tensors.add(packed.data)
        return packed

    monkeypatch.setattr(loader_module, "pack", watched)
    return tensors


def assert_host_bytes(alive: weakref.WeakSet[Any], nbytes: int) -> None:
    """The tensors alive have so many bytes, once no loader thread has another in its hands."""

    def held() -> int:
        gc.collect()
        return sum(tensor.numel() * tensor.element_size() for tensor in list(alive))

    until(lambda: held() == nbytes)


def test_resident_adapters_take_no_host_memory(build: Build, large: list[str], alive: weakref.WeakSet[Any]) -> None:
    residency = build(room=8)
    leases = [granted(residency.acquire(digest)) for digest in large]
    assert_host_bytes(alive, 0)
    for lease in leases:
        lease.release()


def test_host_memory_is_what_the_cache_counts(
    build: Build, bundles: dict[str, AdapterBundle], alive: weakref.WeakSet[Any]
) -> None:
    residency = build(room=2.2, host=2.5)
    for digest in [*bundles, *bundles]:
        granted(residency.acquire(digest)).release()
        assert 0 < residency.host_cache.used <= residency.host_cache.limit
    assert_host_bytes(alive, residency.host_cache.used)


def test_adapters_that_wait_for_room_take_no_memory(
    build: Build, large: list[str], store: Store, alive: weakref.WeakSet[Any]
) -> None:
    residency = build(room=1.1)
    held = granted(residency.acquire(large[0]))
    waiting = [residency.acquire(digest) for digest in large[1:]]
    wait_for_loads(residency)
    assert residency.stats().waiting == 3
    assert_host_bytes(alive, 0)
    for future in waiting:
        # Loads run side by side, so the order in the queue is not known.
        future.add_done_callback(lambda done: done.result().release())
    held.release()
    wait(waiting, timeout=10)
    assert sorted(store.asked) == sorted([large[0], *large[1:] * 2])


@pytest.mark.parametrize("when", ["resident", "waiting", "reading"])
def test_deleted_adapter_gives_all_its_memory_back(
    build: Build, large: list[str], store: Store, alive: weakref.WeakSet[Any], when: str
) -> None:
    residency = build(room=1.1, host=4)
    digest, other = large[:2]
    held = granted(residency.acquire(other)) if when == "waiting" else None
    if when == "reading":
        store.hold(digest)
    future = residency.acquire(digest)
    if when == "reading":
        assert store.reading[digest].wait(10)
    else:
        wait_for_loads(residency)
    residency.mark_deleted(digest)
    store.let_go()
    if held is not None:
        del store.bundles[digest]
        held.release()
    granted(future).release()
    wait_for_loads(residency)
    assert digest not in residency.resident_digests()
    if held is not None:
        residency.mark_deleted(other)
    assert (residency.pool.used, residency.host_cache.used) == (0, 0)
    assert_host_bytes(alive, 0)


def test_deleted_adapter_leaves_though_it_is_asked_for_meanwhile(build: Build, large: list[str]) -> None:
    residency = build(room=4, host=4)
    first = granted(residency.acquire(large[0]))
    residency.mark_deleted(large[0])
    second = granted(residency.acquire(large[0]))
    first.release()
    assert residency.resident_digests() == [large[0]]
    second.release()
    assert residency.resident_digests() == []


def test_memory_of_dropped_adapters_goes_back_to_the_system(base: FrozenBase, index: dict[str, int]) -> None:
    bundle = random_adapter(base, SeraConfig(64, 1, 8.0, "all-linear"), seed=0)
    process = psutil.Process()
    # After this malloc takes blocks of the adapters' size from its heap.
    torch.ones(1 << 24, dtype=torch.uint8)
    packed = [pack(bundle, index, torch.float32) for _ in range(64)]
    before = process.memory_info().rss
    # Every other one, so that what stays lies between.
    del packed[::2]
    # Up to four of the 32 stay, to be used again.
    assert before - process.memory_info().rss > 0.9 * 28 * packed[0].nbytes > 10 << 20


def test_cache_keeps_the_wanted_ones(bundles: dict[str, AdapterBundle], index: dict[str, int]) -> None:
    packed = [pack(bundle, index, torch.float32) for bundle in bundles.values()][::2]
    cache = HostCache(2 * packed[0].nbytes)
    wanted = {packed[0].digest}
    for adapter in packed:
        cache.put(adapter, wanted.__contains__)
        cache.check_invariants()
    assert [adapter.digest for adapter in packed if cache.get(adapter.digest)] == [packed[0].digest, packed[3].digest]
    wanted.add(packed[3].digest)
    assert not cache.has_room(wanted.__contains__)
    cache.put(packed[1], wanted.__contains__)
    assert cache.get(packed[1].digest) is None
    cache.drop(packed[0].digest)
    assert cache.has_room(wanted.__contains__)
    assert cache.used == packed[3].nbytes


def test_idle_check_runs_once_after_something_happened(build: Build, large: list[str], store: Store) -> None:
    residency: AdapterResidency = build(room=4)
    assert not residency.idle_check()
    lease = granted(residency.acquire(large[0]))
    assert not residency.idle_check()
    lease.release()
    assert residency.idle_check()
    assert not residency.idle_check()
    store.hold(large[1])
    loading = residency.acquire(large[1])
    assert not residency.idle_check()
    store.let_go()
    granted(loading).release()
    granted(residency.acquire(large[0])).release()
    residency.pool.tables.offset[0, lease.slot] += 8
    with pytest.raises(RuntimeError, match="does not point at its adapter"):
        residency.idle_check()
    residency.pool.tables.offset[0, lease.slot] -= 8


def test_a_device_without_memory_for_the_idle_check_is_not_taken_for_broken(
    build: Build, large: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency: AdapterResidency = build(room=4)
    granted(residency.acquire(large[0])).release()

    def too_little(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(residency.pool, "check_invariants", too_little)
        assert not residency.idle_check()
    assert residency.idle_check()


def test_an_adapter_is_a_few_objects_whatever_its_modules(base: FrozenBase, index: dict[str, int]) -> None:
    """All threads wait while a full garbage collection visits the objects of thousands of adapters."""

    def objects_of_one(config: SeraConfig, count: int = 40) -> float:
        bundle = random_adapter(base, config, 1, labels=["a", "b"])
        text = bundle.config.canonical_json()
        kept = []
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(count):
            packed = pack(AdapterBundle(AdapterConfig.from_json(text), bundle.tensors), index, torch.float32)
            assert packed.layout.classes.width and packed.layout.chunks
            kept.append(packed)
        gc.collect()
        return (len(gc.get_objects()) - before) / count

    one = objects_of_one(SeraConfig(4, 4, 8.0, ("q_proj",)))
    # Fourteen modules.
    assert objects_of_one(SeraConfig(4, 4, 8.0, "all-linear")) < one + 1
    assert one < 15
