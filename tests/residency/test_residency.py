"""Loads, leases, eviction and the pool's books."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import pytest
import torch

from adapters_store import AdapterBundle
from factories import random_adapter, random_decoder
from sera_kernels import Entry
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.errors import AdapterTooLarge
from sera_serve.residency import AdapterResidency, DevicePool, HostCache, Lease, pack

SHAPES = [SeraConfig(8, 8, 8.0, "all-linear"), SeraConfig(4, 1, 8.0, ("q_proj",), use_mixer=False)]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def bundles(base: FrozenBase) -> dict[str, AdapterBundle]:
    adapters = [random_adapter(base, SHAPES[i % 2], seed=i) for i in range(8)]
    return {bundle.digest: bundle for bundle in adapters}


Build = Callable[..., AdapterResidency]


@pytest.fixture
def build(base: FrozenBase, bundles: dict[str, AdapterBundle]) -> Iterator[Build]:
    made = []

    def build(
        room: float,
        host: float = 0,
        load: Callable[[str], AdapterBundle] = bundles.__getitem__,
        slots: int = 64,
    ) -> AdapterResidency:
        """A pool and a host cache with room for that many of the larger adapters."""
        largest = max(pack(b, index, torch.float32).nbytes for b in bundles.values())
        pool = DevicePool(int(room * largest), len(index), slots, torch.float32)
        made.append(AdapterResidency(load, pool, HostCache(int(host * largest)), index))
        return made[-1]

    index = {path: row for row, path in enumerate(base.module_shapes())}
    yield build
    for residency in made:
        residency.check_integrity()
        residency.close()


def granted(future: Future[Lease]) -> Lease:
    return future.result(timeout=10)


def test_pool_holds_the_bundle_exactly(base: FrozenBase, bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=8)
    index = list(base.module_shapes())
    leases = [granted(residency.acquire(digest)) for digest in bundles]
    for lease, bundle in zip(leases, bundles.values(), strict=True):
        for row, path in enumerate(index):
            (entry,) = residency.pool.tables.entries(row, [lease.slot])
            spec = bundle.config.modules.get(path)
            if spec is None:
                assert entry.offset == -1
                continue
            assert entry == Entry(entry.offset, spec.rank, spec.split, spec.use_mixer, spec.scaling)
            a, c, b = entry.factors(residency.pool.data, spec.d_in, spec.d_out)
            assert torch.equal(a, bundle.tensors[f"{path}.sera_a"])
            assert torch.equal(b, bundle.tensors[f"{path}.sera_b"])
            assert (c is None) == (not spec.use_mixer)
            assert c is None or torch.equal(c, bundle.tensors[f"{path}.sera_c"])
        lease.release()


def test_no_rank_padding(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=8)
    lease = granted(residency.acquire(next(iter(bundles))))
    stored = sum(tensor.numel() for tensor in next(iter(bundles.values())).tensors.values())
    modules = len(next(iter(bundles.values())).config.modules)
    assert stored <= residency.pool.used < stored + 8 * modules
    lease.release()


def test_least_recently_used_leaves_first(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=2.2)
    a, b, c = [digest for i, digest in enumerate(bundles) if i % 2 == 0][:3]
    for digest in (a, b, a, c):
        granted(residency.acquire(digest)).release()
    assert residency.resident_digests() == [a, c]


def test_leased_adapters_stay_and_others_wait(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=2.2)
    a, b, c, d = [digest for i, digest in enumerate(bundles) if i % 2 == 0]
    held = [granted(residency.acquire(digest)) for digest in (a, b)]
    waiting = [residency.acquire(c), residency.acquire(d)]
    done, _ = wait(waiting, timeout=0.3)
    assert not done
    residency.check_integrity()
    held[1].release()
    # The one that was loaded first gets the room; loads run side by side.
    (first,), (second,) = wait(waiting, timeout=10, return_when=FIRST_COMPLETED)
    lease = granted(first)
    assert set(residency.resident_digests()) == {a, lease.placement.adapter.digest}
    assert not second.done()
    lease.release()
    last = granted(second)
    assert {lease.placement.adapter.digest, last.placement.adapter.digest} == {c, d}
    last.release()
    held[0].release()


def test_concurrent_requests_share_one_load(bundles: dict[str, AdapterBundle], build: Build) -> None:
    loads: list[str] = []
    gate = threading.Event()

    def load(digest: str) -> AdapterBundle:
        loads.append(digest)
        gate.wait(10)
        return bundles[digest]

    residency = build(room=8, load=load)
    digest = next(iter(bundles))
    futures = [residency.acquire(digest) for _ in range(20)]
    gate.set()
    leases = [granted(future) for future in futures]
    assert loads == [digest]
    assert residency.leases() == 20
    for lease in leases:
        lease.release()
        lease.release()
    assert residency.leases() == 0


def test_host_cache_spares_the_store(bundles: dict[str, AdapterBundle], build: Build) -> None:
    loads: list[str] = []

    def load(digest: str) -> AdapterBundle:
        loads.append(digest)
        return bundles[digest]

    residency = build(room=1.1, host=2.2, load=load)
    a, b, c = [digest for i, digest in enumerate(bundles) if i % 2 == 0][:3]
    for digest in (a, b, a, b, c, b, a):
        granted(residency.acquire(digest)).release()
    assert loads == [a, b, c, a]


def test_failed_load_reaches_every_waiter_and_is_retried_later(bundles: dict[str, AdapterBundle], build: Build) -> None:
    attempts = []

    def load(digest: str) -> AdapterBundle:
        attempts.append(digest)
        if len(attempts) == 1:
            raise OSError("disk on fire")
        return bundles[digest]

    residency = build(room=8, load=load)
    digest = next(iter(bundles))
    with pytest.raises(OSError, match="disk on fire"):
        granted(residency.acquire(digest))
    granted(residency.acquire(digest)).release()


def test_adapter_larger_than_the_pool_is_refused(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=0.9)
    with pytest.raises(AdapterTooLarge, match="pool_mib"):
        granted(residency.acquire(next(iter(bundles))))
    small = list(bundles)[1]
    granted(residency.acquire(small)).release()


def test_slots_run_out_before_bytes(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=8, slots=2)
    for digest in bundles:
        granted(residency.acquire(digest)).release()
    assert residency.resident_digests() == list(bundles)[-2:]


def test_deleted_adapter_gives_its_memory_back_after_the_last_lease(
    bundles: dict[str, AdapterBundle], build: Build
) -> None:
    residency = build(room=8, host=8)
    digest = next(iter(bundles))
    lease = granted(residency.acquire(digest))
    residency.forget(digest)
    assert residency.host_cache.used == 0
    assert residency.resident_digests() == [digest]
    lease.release()
    assert residency.resident_digests() == []
    assert residency.pool.used == 0


def test_cancelled_wait_holds_nothing(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=1.1)
    a, b = [digest for i, digest in enumerate(bundles) if i % 2 == 0][:2]
    held = granted(residency.acquire(a))

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await residency.lease(b)

    asyncio.run(give_up())
    held.release()
    granted(residency.acquire(a)).release()
    assert residency.leases() == 0


def test_random_traffic_keeps_the_books(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=2.5, host=3)

    async def user(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(25):
            digest = choice.choice(list(bundles))
            try:
                async with asyncio.timeout(choice.choice([0.001, 5])):
                    lease = await residency.lease(digest)
            except TimeoutError:
                continue
            assert lease.placement.adapter.digest == digest
            await asyncio.sleep(choice.random() / 500)
            lease.release()
            if choice.random() < 0.1:
                residency.forget(digest)
            residency.check_integrity()

    async def main() -> None:
        await asyncio.gather(*(user(seed) for seed in range(12)))

    asyncio.run(main())
    assert residency.leases() == 0
