"""Loads, leases, eviction, and what the pool holds."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import FIRST_COMPLETED, Future, wait

import pytest
import torch
from slow_store import Build, Store, granted, leased, wait_for_loads

from adapters_store import AdapterBundle, AdapterNotFound
from adapters_store.errors import CannotCombine
from sera_kernels import ABSENT, Entry
from sera_serve.base import FrozenBase
from sera_serve.errors import AdapterTooLarge
from sera_serve.residency import Lease
from support.live_server import wait_until


def test_pool_holds_the_bundle_exactly(base: FrozenBase, bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=8)
    index = list(base.module_shapes())
    leases = [granted(residency.acquire(digest)) for digest in bundles]
    for lease, bundle in zip(leases, bundles.values(), strict=True):
        for row, path in enumerate(index):
            (entry,) = residency.pool.tables.entries(row, [lease.slot])
            spec = bundle.config.modules.get(path)
            if spec is None:
                assert entry == Entry(ABSENT, rank=0, split=1, mixer=False, scaling=0.0)
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


def test_least_recently_used_leaves_first(large: list[str], build: Build) -> None:
    residency = build(room=2.2)
    a, b, c, _ = large
    for digest in (a, b, a, c):
        granted(residency.acquire(digest)).release()
    assert residency.resident_digests() == [a, c]


def test_an_adapter_takes_the_room_of_others_to_the_last_element(large: list[str], build: Build) -> None:
    residency = build(room=1)
    for digest in large[:2]:
        granted(residency.acquire(digest)).release()
    assert residency.resident_digests() == [large[1]] and residency.pool.used == residency.pool.capacity


def test_leased_adapters_stay_and_others_wait(large: list[str], build: Build) -> None:
    residency = build(room=2.2)
    a, b, c, d = large
    held = [granted(residency.acquire(digest)) for digest in (a, b)]
    waiting = [residency.acquire(c), residency.acquire(d)]
    done, _ = wait(waiting, timeout=0.3)
    assert not done
    residency.check_invariants()
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


def test_concurrent_requests_share_one_load_and_one_copy(large: list[str], store: Store, build: Build) -> None:
    residency = build(room=8)
    digest = large[0]
    store.hold(digest)
    futures = [residency.acquire(digest) for _ in range(20)]
    assert futures[3].cancel()
    store.let_go()
    leases = [granted(future) for i, future in enumerate(futures) if i != 3]
    assert store.asked == [digest]
    assert residency.pool.copies == 1
    assert residency.leases() == 19
    for lease in leases:
        lease.release()
        lease.release()
    assert residency.leases() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_any_number_may_wait_and_give_back_at_once(fails: bool, large: list[str], store: Store, build: Build) -> None:
    residency = build(room=8)
    digest = large[0]
    store.hold(digest)
    if fails:
        store.failing[digest] = OSError("disk on fire")
    futures = [residency.acquire(digest) for _ in range(2000)]

    def give_back(future: Future[Lease]) -> None:
        if not fails:
            future.result().release()

    for future in futures:
        future.add_done_callback(give_back)
    store.let_go()
    assert not wait(futures, 20).not_done
    # The last callback ends after its future.
    wait_until(lambda: residency.leases() == 0)
    if not fails:
        granted(residency.acquire(digest)).release()


def test_host_cache_spares_the_store(large: list[str], store: Store, build: Build) -> None:
    residency = build(room=1.1, host=2.2)
    a, b, c, _ = large
    for digest in (a, b, a, b, c, b, a):
        granted(residency.acquire(digest)).release()
    assert store.asked == [a, b, c, a]
    stats = residency.stats()
    assert stats.granted == {"device": 0, "host": 3, "store": 4}
    assert {tier: sum(times.counts) for tier, times in stats.loads.items()} == {"host": 3, "store": 4}
    assert stats.loads["store"].seconds > 0
    assert stats.evictions == 6


def test_failed_load_reaches_every_waiter_and_is_retried_later(large: list[str], store: Store, build: Build) -> None:
    residency = build(room=8)
    digest, other = large[:2]
    store.hold(digest)
    store.failing[digest] = OSError("disk on fire")
    futures = [residency.acquire(digest) for _ in range(3)]
    assert store.reading[digest].wait(10)
    granted(residency.acquire(other)).release()
    store.let_go()
    for future in futures:
        with pytest.raises(OSError, match="disk on fire"):
            granted(future)
    assert store.asked.count(digest) == 1
    assert residency.stats().failed_loads == {"gone": 0, "cannot_combine": 0, "error": 1}
    store.failing[digest] = AdapterNotFound("it was deleted")
    with pytest.raises(AdapterNotFound):
        granted(residency.acquire(digest))
    assert residency.stats().failed_loads == {"gone": 1, "cannot_combine": 0, "error": 1}
    store.failing[digest] = CannotCombine("their heads differ")
    hint = residency.prefetch(digest)
    wait_for_loads(residency)
    # The load that was only hinted counts with the one that a request waits for.
    assert residency.stats().failed_loads == {"gone": 1, "cannot_combine": 0, "error": 1}
    with pytest.raises(CannotCombine):
        granted(residency.acquire(digest))
    hint.release()
    assert residency.stats().failed_loads == {"gone": 1, "cannot_combine": 1, "error": 1}
    del store.failing[digest]
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
    residency.mark_deleted(digest)
    assert residency.host_cache.used == 0
    assert residency.resident_digests() == [digest]
    lease.release()
    assert residency.resident_digests() == []
    assert residency.pool.used == 0


def test_cancelled_wait_holds_nothing(large: list[str], build: Build) -> None:
    residency = build(room=1.1)
    a, b = large[:2]
    held = granted(residency.acquire(a))

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await leased(residency, b)

    asyncio.run(give_up())
    held.release()
    granted(residency.acquire(a)).release()
    assert residency.leases() == 0


def test_random_traffic_keeps_the_invariants(bundles: dict[str, AdapterBundle], build: Build) -> None:
    residency = build(room=2.5, host=3)

    async def user(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(25):
            digest = choice.choice(list(bundles))
            try:
                async with asyncio.timeout(choice.choice([0.001, 5])):
                    lease = await leased(residency, digest)
            except TimeoutError:
                continue
            assert lease.placement.adapter.digest == digest
            await asyncio.sleep(choice.random() / 500)
            lease.release()
            if choice.random() < 0.1:
                residency.mark_deleted(digest)
            residency.check_invariants()

    async def main() -> None:
        await asyncio.gather(*(user(seed) for seed in range(12)))

    asyncio.run(main())
    assert residency.leases() == 0
