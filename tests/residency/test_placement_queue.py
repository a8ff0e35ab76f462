"""Adapters that wait for room: which may bypass which, and how often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slow_store import Build, Store, granted, wait_for_loads

from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.residency import Claim, Lease, LoaderThreads, pack, placement
from support.factories import random_adapter


def test_adapter_that_fits_by_bytes_gets_in_between_leased_ones(
    build: Build, large: list[str], store: Store, base: FrozenBase
) -> None:
    huge = random_adapter(base, SeraConfig(16, 16, 8.0, "all-linear"), seed=9)
    store.bundles[huge.digest] = huge
    residency = build(room=3)
    leases = [granted(residency.acquire(digest)) for digest in large[:3]]
    leases[0].release()
    leases[2].release()
    lease = granted(residency.acquire(huge.digest))
    assert len(lease.placement.extents) == 2
    assert residency.resident_digests() == [large[1], huge.digest]
    stats = residency.stats()
    assert (stats.evictions, stats.copies) == (2, 5)
    lease.release()
    leases[1].release()


def test_no_adapter_is_evicted_in_vain(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.2, host=4)
    held = granted(residency.acquire(small[0]))
    granted(residency.acquire(small[1])).release()
    hint = residency.prefetch(large[0])
    wait_for_loads(residency)
    assert residency.resident_digests() == [small[0], small[1]]
    hint.release()
    waiting = residency.acquire(large[0])
    wait_for_loads(residency)
    other = granted(residency.acquire(small[2]))
    assert residency.resident_digests() == [small[0], small[1], small[2]]
    other.release()
    held.release()
    granted(waiting).release()


def test_the_first_in_the_queue_is_bypassed_only_so_often(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.5, max_bypasses=3)
    held = granted(residency.acquire(large[0]))
    waiting = residency.acquire(large[1])
    wait_for_loads(residency)
    # A small one that fits beside the one held, and is evicted and asked for again and again.
    for i in range(3):
        granted(residency.acquire(small[i % 2])).release()
    late = residency.acquire(small[2])
    wait_for_loads(residency)
    assert not waiting.done() and not late.done()
    held.release()
    lease = granted(waiting)
    granted(late).release()
    lease.release()


def test_adapter_in_constant_use_makes_room_for_one_that_waits(
    build: Build, large: list[str], small: list[str]
) -> None:
    residency = build(room=1.1, max_bypasses=5)
    leases = [granted(residency.acquire(small[0]))]
    waiting = residency.acquire(large[0])
    wait_for_loads(residency)
    while (future := residency.acquire(small[0])).done():
        leases.append(granted(future))
        assert len(leases) <= 6, "it starves"
    assert len(leases) == 6
    assert not waiting.done()
    for lease in leases:
        lease.release()
    granted(waiting).release()
    granted(future).release()


def test_no_more_adapters_drain_than_must_and_idle_ones_first(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.5, max_bypasses=0)
    leases = [granted(residency.acquire(digest)) for digest in small]
    leases[3].release()
    waiting = residency.acquire(large[0])
    wait_for_loads(residency)
    # Three of the four must leave: the idle one, and the two least recently used of the others.
    behind = [residency.acquire(small[i]) for i in (0, 1, 3)]
    assert not any(future.done() for future in behind)
    granted(residency.acquire(small[2])).release()
    leases[0].release()
    leases[1].release()
    lease = granted(waiting)
    assert set(residency.resident_digests()) >= {large[0], small[2]}
    lease.release()
    for future in behind:
        granted(future).release()
    leases[2].release()


def test_room_of_a_load_that_was_cancelled_goes_to_the_next(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=1.1, threads=LoaderThreads(at_once=1, stall_s=1000))
    held = granted(residency.acquire(large[0]))
    cancelled, following = residency.acquire(large[1]), residency.acquire(large[2])
    wait_for_loads(residency)
    store.hold(large[3])
    last = residency.acquire(large[3])
    assert store.reading[large[3]].wait(10)
    # The first in the queue has room now, and is to be read again after the one that the only thread is reading.
    held.release()
    assert cancelled.cancel()
    store.let_go()
    granted(following).release()
    granted(last).release()


@pytest.mark.parametrize("asked", ["resident", "new"])
def test_a_cancelled_request_holds_up_no_others(build: Build, large: list[str], small: list[str], asked: str) -> None:
    residency = build(room=1.5, max_bypasses=0)
    first = large if asked == "new" else small
    held = granted(residency.acquire(first[0]))
    other = granted(residency.acquire(small[1])) if asked == "resident" else None
    cancelled = residency.acquire(large[1])
    wait_for_loads(residency)
    behind = residency.acquire(small[0])
    wait_for_loads(residency)
    assert not behind.done()
    assert cancelled.cancel()
    granted(behind).release()
    held.release()
    if other is not None:
        other.release()


def test_loads_that_find_no_room_are_all_served_in_the_end(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, slots=1)
    held = granted(residency.acquire(large[0]))
    futures = [residency.acquire(digest) for digest in [*large[1:], *small]]
    wait_for_loads(residency)
    assert residency.stats().waiting == 7
    held.release()
    for future in futures:
        future.add_done_callback(lambda done: done.result().release())
    for future in futures:
        granted(future)
    assert residency.leases() == 0


class Served:
    """What tenants were served, as a scheduler counts it."""

    def __init__(self, **tokens: float) -> None:
        self.tokens = tokens

    def claim(self, tenant: str) -> Claim:
        return Claim(tenant, self.counter)

    def counter(self, tenant: str) -> float:
        return self.tokens[tenant]


def test_a_tenant_that_was_served_more_gives_its_room_up_when_its_requests_end(build: Build, large: list[str]) -> None:
    residency = build(room=1.1, max_wait_s=1000)
    served = Served(a=10, b=10)
    first = granted(residency.acquire(large[0], served.claim("a")))
    waiting = residency.acquire(large[1], served.claim("b"))
    wait_for_loads(residency)
    # Alike so far.
    second = granted(residency.acquire(large[0], served.claim("a")))
    first.release()
    served.tokens["a"] = 12
    third = residency.acquire(large[0], served.claim("a"))
    assert not third.done() and not waiting.done()
    second.release()
    lease = granted(waiting)
    # The tenant that was served is ahead no more: it waits for its turn as well.
    assert not third.done()
    lease.release()
    granted(third).release()


def test_a_tenant_that_was_served_less_keeps_its_room(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, max_wait_s=1000)
    served = Served(a=12, b=10, c=8)
    of_a = granted(residency.acquire(small[0], served.claim("a")))
    of_c = granted(residency.acquire(small[1], served.claim("c")))
    waiting = residency.acquire(large[0], served.claim("b"))
    wait_for_loads(residency)
    leases = [granted(residency.acquire(small[i], served.claim("ac"[i]))) for i in (0, 1, 0, 1)]
    assert residency.resident_digests() == small[:2], "what one of them could give is not enough"
    served.tokens["c"] = 11
    # Another scheduler's counters tell nothing of these.
    elsewhere = granted(residency.acquire(small[0], Served(a=12).claim("a")))
    leases.append(granted(residency.acquire(small[1], served.claim("c"))))
    elsewhere.release()
    late = residency.acquire(small[1], served.claim("c"))
    assert not late.done()
    for lease in (of_a, of_c, *leases):
        lease.release()
    granted(waiting).release()
    granted(late).release()


def test_an_adapter_is_bypassed_only_so_long(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, max_wait_s=0.0)
    held = granted(residency.acquire(small[0]))
    waiting = residency.acquire(large[0])
    wait_for_loads(residency)
    late = residency.acquire(small[0])
    assert not late.done() and not waiting.done()
    held.release()
    granted(waiting).release()
    granted(late).release()


def test_tenants_take_turns_in_the_queue_for_room(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, slots=1, max_wait_s=1000)
    served = Served(a=1, b=1)
    held = granted(residency.acquire(small[0]))
    asked = [(digest, "a") for digest in large] + [(small[1], "b")]
    order: list[str] = []
    futures = []
    for digest, tenant in asked:
        future = residency.acquire(digest, served.claim(tenant))
        future.add_done_callback(lambda done, digest=digest: (order.append(digest), done.result().release()))  # type: ignore[misc]
        futures.append(future)
        wait_for_loads(residency)
    assert residency.stats().waiting == 5
    held.release()
    for future in futures:
        granted(future)
    wait_for_loads(residency)
    assert order == [large[0], small[1], *large[1:]]


def test_nothing_waits_for_a_drain_that_was_given_up(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.5, max_wait_s=1000)
    served = Served(a=20, b=10, c=0)
    of_a = granted(residency.acquire(large[0], served.claim("a")))
    of_c = granted(residency.acquire(small[0], served.claim("c")))
    waiting = residency.acquire(large[1], served.claim("b"))
    wait_for_loads(residency)
    late = residency.acquire(large[0], served.claim("a"))
    assert not late.done()
    # Other requests of the tenant were served meanwhile: the one that drains is ahead no more.
    served.tokens["b"] = 30
    of_c.release()
    granted(late).release()
    new = residency.acquire(small[1], served.claim("c"))
    granted(new).release()
    assert not waiting.done()
    of_a.release()
    granted(waiting).release()


def test_others_drain_for_one_that_became_overdue_while_a_load_ran(
    build: Build, large: list[str], small: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: clock.now))
    residency = build(room=1.5, max_wait_s=5.0)
    held = granted(residency.acquire(large[0]))
    waiting = residency.acquire(large[1])
    wait_for_loads(residency)
    store.hold(small[0])
    new = residency.acquire(small[0])
    assert store.reading[small[0]].wait(10)
    clock.now = 6.0
    store.let_go()
    wait_for_loads(residency)
    assert not new.done()
    assert residency.ready_and_wanted() == ([], [large[1], small[0]]), "the one on the device does not drain"
    held.release()
    granted(waiting).release()
    granted(new).release()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_shared_adapter_takes_the_turn_of_each_tenant_that_waits(
    build: Build, large: list[str], small: list[str], is_cancelled: bool
) -> None:
    residency = build(room=1.1, slots=1, max_wait_s=1000)
    served = Served(a=100, b=0)
    held = granted(residency.acquire(small[0]))
    order: list[str] = []
    futures = []
    for digest, tenant in [(digest, "a") for digest in large] + [(large[3], "b")]:
        future = residency.acquire(digest, served.claim(tenant))
        futures.append(future)
        wait_for_loads(residency)
        if is_cancelled and len(futures) == 5:
            assert futures.pop(3).cancel()
    for future, name in zip(futures, ("a0", "a1", "a2", *(() if is_cancelled else ("a3",)), "b3"), strict=True):
        future.add_done_callback(lambda done, name=name: (order.append(name), done.result().release()))  # type: ignore[misc]
    assert residency.stats().waiting == 4
    held.release()
    for future in futures:
        granted(future)
    wait_for_loads(residency)
    assert order == (["a0", "b3", "a1", "a2"] if is_cancelled else ["a0", "a3", "b3", "a1", "a2"])


def test_a_tenant_whose_request_was_cancelled_has_no_turn(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, slots=1, max_wait_s=1000)
    served = Served(a=0, b=0)
    held = granted(residency.acquire(small[0]))
    order: list[str] = []
    futures = []
    for digest, tenant in ((large[0], "a"), (large[1], "b"), (large[2], "b"), (large[2], "a")):
        futures.append(residency.acquire(digest, served.claim(tenant)))
        wait_for_loads(residency)
    assert futures.pop().cancel()
    futures.append(residency.acquire(large[3], served.claim("a")))
    wait_for_loads(residency)
    for future, digest in zip(futures, large, strict=True):
        future.add_done_callback(lambda done, digest=digest: (order.append(digest), done.result().release()))  # type: ignore[misc]
    held.release()
    for future in futures:
        granted(future)
    wait_for_loads(residency)
    assert order == [large[0], large[1], large[3], large[2]]


def test_the_least_served_tenant_that_waits_is_not_bypassed(build: Build, large: list[str], small: list[str]) -> None:
    residency = build(room=1.1, max_wait_s=1000)
    served = Served(a=100, b=0)
    held = granted(residency.acquire(small[0], served.claim("a")))
    waiting = []
    for tenant in "ab":
        waiting.append(residency.acquire(large[0], served.claim(tenant)))
        wait_for_loads(residency)
    late = residency.acquire(small[0], served.claim("a"))
    assert not late.done()
    # Once it has gone, the tenants are alike, and nothing drains any more.
    assert waiting.pop().cancel()
    granted(late).release()
    held.release()
    granted(waiting.pop()).release()


def test_others_drain_for_the_next_where_too_few_may_for_the_first(
    build: Build, large: list[str], store: Store, base: FrozenBase
) -> None:
    huge = random_adapter(base, SeraConfig(16, 16, 8.0, "all-linear"), seed=9)
    store.bundles[huge.digest] = huge
    residency = build(room=2.2, max_wait_s=1000)
    served = Served(a=20, b=10, c=0)
    of_c = granted(residency.acquire(large[0], served.claim("c")))
    of_a = granted(residency.acquire(large[1], served.claim("a")))
    first = residency.acquire(huge.digest, served.claim("b"))
    wait_for_loads(residency)
    second = residency.acquire(large[2], served.claim("b"))
    wait_for_loads(residency)
    late = residency.acquire(large[1], served.claim("a"))
    assert not late.done()
    of_a.release()
    granted(second).release()
    granted(late).release()
    of_c.release()
    granted(first).release()


class Crowd:
    """Tiny adapters in use on the device, which they fill, and one that waits for room."""

    def __init__(self, build: Build, store: Store, base: FrozenBase, index: dict[str, int], tenants: str) -> None:
        tiny = random_adapter(base, SeraConfig(1, 1, 8.0, ("q_proj",), use_mixer=False), seed=9)
        self.digests = [f"{number:064x}" for number in range(96)]
        huge = random_adapter(base, SeraConfig(16, 16, 8.0, "all-linear"), seed=9)
        # Only the book-keeping matters: the tiny ones are all alike.
        store.bundles |= {huge.digest: huge, **dict.fromkeys(self.digests, tiny)}
        unit = max(pack(bundle, index, torch.float32).nbytes for bundle in store.bundles.values() if bundle is not huge)
        nbytes = 96 * pack(tiny, index, torch.float32).nbytes
        self.residency = build(room=(nbytes + 0.5) / unit, slots=100, max_bypasses=10**6, max_wait_s=1000)
        self.served = Served(a=10, b=5, c=0)
        self.held = [self.use(number, tenants[number % len(tenants)]) for number in range(96)]
        self.waiting = self.residency.acquire(huge.digest, self.served.claim("b"))
        wait_for_loads(self.residency)

    def use(self, number: int, tenant: str) -> Lease:
        return granted(self.residency.acquire(self.digests[number], self.served.claim(tenant)))

    def leave(self) -> None:
        for lease in self.held:
            lease.release()
        granted(self.waiting).release()


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """A list that grows with each call of a method."""
    calls: list[None] = []
    method = getattr(owner, name)

    def call(*args: Any) -> Any:
        calls.append(None)
        return method(*args)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_residents_are_not_looked_through_in_vain_at_each_lease(
    build: Build, store: Store, base: FrozenBase, index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(build, store, base, index, "c")
    looks = counted(monkeypatch, crowd.residency._placement, "_drain_order")
    for _ in range(30):
        crowd.use(95, "a").release()
    # The tenant of all others was served less than the one that waits.
    assert len(looks) == 30 // (96 // 32)
    crowd.leave()


def test_residents_are_not_looked_through_at_each_lease_while_some_drain(
    build: Build, store: Store, base: FrozenBase, index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(build, store, base, index, "a")
    late = crowd.residency.acquire(crowd.digests[0], crowd.served.claim("a"))
    assert not late.done()
    # The one that was just asked for waits as well.
    crowd.use(95, "a").release()
    looks = counted(monkeypatch, crowd.residency._placement, "_drain_order")
    for _ in range(30):
        crowd.use(95, "a").release()
    assert len(looks) == 0
    # An adapter that may leave changes what has to drain.
    crowd.held.pop(0).release()
    assert len(looks) == 1
    crowd.leave()
    granted(late).release()


@pytest.mark.parametrize(("max_bypasses", "tried"), [(100, 1), (0, 0)], ids=["free to bypass", "some drain"])
def test_one_that_joins_has_no_other_tried_again(
    build: Build, large: list[str], monkeypatch: pytest.MonkeyPatch, max_bypasses: int, tried: int
) -> None:
    # No room came free since the others were tried; with many that join, each would try many.
    residency = build(room=1.1, host=8, max_bypasses=max_bypasses)
    for digest in large[1:]:
        granted(residency.acquire(digest)).release()
    held = granted(residency.acquire(large[0]))
    waiting = [residency.acquire(digest) for digest in large[1:3]]
    wait_for_loads(residency)
    tries = counted(monkeypatch, residency._placement, "_place")
    waiting.append(residency.acquire(large[3]))
    wait_for_loads(residency)
    assert len(tries) == tried and not any(future.done() for future in waiting)
    held.release()
    for future in waiting:
        granted(future).release()


def test_what_pins_leave_is_found_once_for_each_change_of_pins(
    build: Build, store: Store, base: FrozenBase, index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(build, store, base, index, "c")
    crowd.residency.pin(crowd.digests[0]).result(10)
    attempts = counted(monkeypatch, crowd.residency._placement, "_could_fit")
    looks = counted(monkeypatch, crowd.residency.pool, "room_beside")
    for _ in range(30):
        crowd.use(95, "c").release()
    assert len(attempts) >= 30 and len(looks) <= 1
    crowd.residency.unpin(crowd.digests[0])
    assert len(looks) <= 2
    crowd.leave()


def test_holes_are_gone_through_a_few_times_where_no_drain_is_enough(
    build: Build, store: Store, base: FrozenBase, index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every second adapter may drain: room enough in all, in holes that are too small for a layer.
    crowd = Crowd(build, store, base, index, "ac")
    asked = counted(monkeypatch, crowd.residency.pool, "would_fit")
    crowd.use(0, "a").release()
    assert 0 < len(asked) <= 4
    crowd.leave()


def test_no_more_adapters_drain_than_must_where_holes_are_too_small(
    build: Build, store: Store, base: FrozenBase, index: dict[str, int]
) -> None:
    crowd = Crowd(build, store, base, index, "a")
    # Every second adapter was used last. The others leave first, and holes of their size are of no use.
    for number in range(0, 96, 2):
        granted(crowd.residency.acquire(crowd.digests[number])).release()
    late = crowd.residency.acquire(crowd.digests[95], crowd.served.claim("a"))
    queue, pool = crowd.residency._placement, crowd.residency.pool
    leaving = [entry.placement for entry in queue._draining.values() if entry.placement is not None]
    layout = queue._favoured and queue._favoured.layout
    assert layout is not None and 48 < len(leaving) < 88
    assert pool.would_fit(layout, leaving) and not pool.would_fit(layout, leaving[:-1])
    crowd.leave()
    granted(late).release()
