"""Adapters brought near for requests that are not admitted yet."""

from __future__ import annotations

from typing import Any

import pytest
from slow_store import Build, Store, granted, wait_for_loads

from sera_serve.residency import LoaderThreads


def test_prefetched_adapter_is_on_the_device_when_its_request_comes(
    build: Build, large: list[str], store: Store
) -> None:
    residency = build(room=4)
    hint = residency.prefetch(large[0])
    wait_for_loads(residency)
    assert residency.resident_digests() == [large[0]]
    granted(residency.acquire(large[0])).release()
    hint.release()
    hint.release()
    assert store.asked == [large[0]]
    assert residency.stats().granted == {"device": 1, "host": 0, "store": 0}


def test_prefetch_evicts_what_no_request_wants(build: Build, large: list[str]) -> None:
    residency = build(room=1.1)
    granted(residency.acquire(large[0])).release()
    hint = residency.prefetch(large[1])
    wait_for_loads(residency)
    assert residency.resident_digests() == [large[1]]
    hint.release()


@pytest.mark.parametrize("taken", ["leased", "pinned", "wanted"])
def test_prefetch_goes_no_further_than_the_host_cache_where_the_device_is_taken(
    build: Build, large: list[str], store: Store, taken: str
) -> None:
    residency = build(room=1.1, host=4, pin_share=1.0)
    if taken == "leased":
        held = granted(residency.acquire(large[0]))
    elif taken == "pinned":
        residency.pin(large[0]).result(10)
    else:
        held = residency.prefetch(large[0])
        wait_for_loads(residency)
    hint = residency.prefetch(large[1])
    wait_for_loads(residency)
    assert residency.resident_digests() == [large[0]]
    residency.unpin(large[0])
    if taken != "pinned":
        held.release()
    granted(residency.acquire(large[1])).release()
    hint.release()
    assert store.asked == large[:2]
    assert residency.stats().granted["host"] == 1


@pytest.mark.parametrize(
    ("options", "is_spare"),
    [({"room": 2.1}, True), ({"room": 1.9}, False), ({"room": 4, "slots": 1}, False), ({"room": 4, "slots": 2}, True)],
)
@pytest.mark.parametrize("taken", ["leased", "wanted"])
def test_room_is_spare_for_an_adapter_of_the_average_size(
    build: Build, large: list[str], options: dict[str, Any], is_spare: bool, taken: str
) -> None:
    residency = build(**options)
    assert residency._placement.has_spare_room()
    if taken == "leased":
        held = granted(residency.acquire(large[0]))
    else:
        held = residency.prefetch(large[0])
        wait_for_loads(residency)
    assert residency._placement.has_spare_room() is is_spare
    held.release()
    # No request wants it any more: it may leave.
    assert residency._placement.has_spare_room()


def test_requests_evict_wanted_adapters_last_and_the_latest_of_them_first(build: Build, large: list[str]) -> None:
    residency = build(room=3.2)
    hints = []
    for digest in large[:2]:
        hints.append(residency.prefetch(digest))
        wait_for_loads(residency)
    granted(residency.acquire(large[2])).release()
    granted(residency.acquire(large[3])).release()
    assert set(residency.resident_digests()) == {large[0], large[1], large[3]}
    held = granted(residency.acquire(large[3]))
    granted(residency.acquire(large[2])).release()
    assert set(residency.resident_digests()) == {large[0], large[2], large[3]}
    held.release()
    for hint in hints:
        hint.release()


def test_loads_that_requests_wait_for_go_before_prefetches(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=8, threads=LoaderThreads(at_once=1, stall_s=1000))
    a, b, c, d = large
    store.hold(a)
    first = residency.acquire(a)
    assert store.reading[a].wait(10)
    hints = [residency.prefetch(digest) for digest in (b, c, d)]
    # Its hint is released before its turn comes, so it is not read at all.
    hints[2].release()
    later = residency.acquire(c)
    store.let_go()
    for future in (first, later):
        granted(future).release()
    wait_for_loads(residency)
    assert store.asked == [a, c, b]
    for hint in hints:
        hint.release()


def test_nothing_is_read_that_cannot_be_kept(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=1.1, host=1.1)
    held = granted(residency.acquire(large[0]))
    first = residency.prefetch(large[1])
    wait_for_loads(residency)
    second = residency.prefetch(large[2])
    wait_for_loads(residency)
    assert store.asked == large[:2]
    for handle in (held, first, second):
        handle.release()


def test_prefetch_does_not_take_the_room_that_one_in_the_queue_waits_for(
    build: Build, large: list[str], small: list[str], store: Store
) -> None:
    residency = build(room=1.5, host=4)
    held = granted(residency.acquire(large[0]))
    waiting = residency.acquire(large[1])
    wait_for_loads(residency)
    hint = residency.prefetch(small[0])
    wait_for_loads(residency)
    assert residency.resident_digests() == [large[0]]
    assert small[0] in store.asked
    held.release()
    granted(waiting).release()
    hint.release()


def test_failed_prefetch_is_the_next_requests_affair(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=4)
    store.failing[large[0]] = OSError("disk on fire")
    hint = residency.prefetch(large[0])
    wait_for_loads(residency)
    with pytest.raises(OSError, match="disk on fire"):
        granted(residency.acquire(large[0]))
    store.failing.clear()
    granted(residency.acquire(large[0])).release()
    hint.release()


def test_adapter_deleted_while_it_is_prefetched_is_not_kept(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=4, host=4)
    store.hold(large[0])
    hint = residency.prefetch(large[0])
    assert store.reading[large[0]].wait(10)
    residency.mark_deleted(large[0])
    store.let_go()
    wait_for_loads(residency)
    assert (residency.pool.used, residency.host_cache.used) == (0, 0)
    hint.release()
