"""Pinned adapters stay, and cannot fill the pool."""

from __future__ import annotations

import pytest
from slow_store import Build, Store, granted, wait_for_loads

from sera_serve.errors import AdapterTooLarge, CannotPin


def test_pinned_adapter_stays_until_it_is_unpinned(build: Build, large: list[str]) -> None:
    residency = build(room=2.2, host=8)
    residency.pin(large[0]).result(10)
    residency.pin(large[0]).result(10)
    for digest in large[1:]:
        granted(residency.acquire(digest)).release()
    assert set(residency.resident_digests()) == {large[0], large[3]}
    assert residency.pinned_digests() == [large[0]]
    assert residency.stats().pinned == 1
    places = residency.presence([large[0], large[3], large[1], "never loaded"])
    assert places == [("device", True), ("device", False), ("host", False), ("store", False)]
    residency.unpin(large[0])
    residency.unpin(large[0])
    granted(residency.acquire(large[1])).release()
    assert large[0] not in residency.resident_digests()


@pytest.mark.parametrize(("room", "slots"), [(2.2, 64), (64, 3)])
def test_pins_leave_half_of_bytes_and_slots_to_others(build: Build, large: list[str], room: float, slots: int) -> None:
    residency = build(room=room, slots=slots)
    residency.pin(large[0]).result(10)
    with pytest.raises(CannotPin, match=r"50%.*1 are pinned.*unpin one"):
        residency.pin(large[1]).result(10)
    assert residency.pinned_digests() == [large[0]]
    residency.unpin(large[0])
    residency.pin(large[1]).result(10)


def test_adapter_that_pins_leave_no_room_for_is_refused_at_once(
    build: Build, large: list[str], small: list[str]
) -> None:
    residency = build(room=1.1)
    held = granted(residency.acquire(small[0]))
    waiting = residency.acquire(large[0])
    wait_for_loads(residency)
    assert not waiting.done()
    residency.pin(small[0]).result(10)
    with pytest.raises(AdapterTooLarge, match="pinned"):
        granted(waiting)
    with pytest.raises(AdapterTooLarge, match="unpin some"):
        granted(residency.acquire(large[0]))
    held.release()
    residency.unpin(small[0])
    granted(residency.acquire(large[0])).release()


def test_one_in_the_queue_gets_the_room_of_an_unpinned_adapter(build: Build, large: list[str]) -> None:
    residency = build(room=2.2)
    residency.pin(large[0]).result(10)
    held = granted(residency.acquire(large[1]))
    waiting = residency.acquire(large[2])
    wait_for_loads(residency)
    assert not waiting.done()
    residency.unpin(large[0])
    granted(waiting).release()
    held.release()


def test_deleted_adapter_is_pinned_no_longer_and_cannot_be(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=4)
    residency.pin(large[0]).result(10)
    held = granted(residency.acquire(large[0]))
    residency.mark_deleted(large[0])
    assert residency.pinned_digests() == []
    with pytest.raises(CannotPin, match="being deleted"):
        residency.pin(large[0]).result(10)
    held.release()
    assert residency.resident_digests() == []
    store.failing[large[0]] = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        residency.pin(large[0]).result(10)


def test_pin_that_was_given_up_pins_nothing(build: Build, large: list[str], store: Store) -> None:
    residency = build(room=4)
    store.hold(large[0])
    pin = residency.pin(large[0])
    assert pin.cancel()
    store.let_go()
    wait_for_loads(residency)
    assert residency.pinned_digests() == []
    assert residency.leases() == 0
