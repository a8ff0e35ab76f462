"""The limits at the door and the room of a batch, by a clock of the test's own."""

from __future__ import annotations

import pytest

from sera_serve.engine.admission import Door, Room, Visit
from sera_serve.engine.fair_queue import Ticket
from sera_serve.errors import Overloaded, TenantOverloaded


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def nobody_waits(tenant: str) -> bool:
    return False


def test_a_tenant_with_too_many_is_told_429_and_others_come_in() -> None:
    door = Door(limit=10, tenant_limit=3, clock=Clock())
    visits = [door.enter("flood", nobody_waits) for _ in range(3)]
    with pytest.raises(TenantOverloaded) as refusal:
        door.enter("flood", nobody_waits)
    assert (refusal.value.status, refusal.value.code) == (429, "tenant_overloaded")
    door.enter("other", nobody_waits)
    door.leave(visits[0])
    door.leave(visits[0])
    assert door.inside() == 3
    door.enter("flood", nobody_waits)


def test_a_full_server_refuses_with_503() -> None:
    door = Door(limit=4, tenant_limit=10, clock=Clock())
    for tenant in ("a", "a", "b", "b"):
        door.enter(tenant, nobody_waits)
    for tenant in ("a", "b", "c"):
        with pytest.raises(Overloaded) as refusal:
            door.enter(tenant, nobody_waits)
        assert type(refusal.value) is Overloaded and refusal.value.status == 503
    assert door.inside() == 4


def test_a_full_server_turns_away_one_of_the_tenant_with_the_most() -> None:
    door = Door(limit=6, tenant_limit=10, clock=Clock())
    waiting: dict[str, list[Visit]] = {}

    def displace(tenant: str) -> bool:
        door.leave(waiting[tenant].pop())
        return True

    for tenant in ["flood"] * 5 + ["b"]:
        waiting.setdefault(tenant, []).append(door.enter(tenant, displace))
    for tenant in ("c", "d", "b"):
        waiting.setdefault(tenant, []).append(door.enter(tenant, displace))
        assert door.inside() == 6
    assert {tenant: len(visits) for tenant, visits in waiting.items()} == {"flood": 2, "b": 2, "c": 1, "d": 1}
    # Nobody has two more than these: taking turns at being turned away would serve no one.
    for tenant in ("c", "flood"):
        with pytest.raises(Overloaded, match="6 requests are under way"):
            door.enter(tenant, displace)


def test_retry_after_is_what_the_present_requests_will_take() -> None:
    clock = Clock()
    door = Door(limit=40, tenant_limit=20, clock=clock)

    def retry_after(tenant: str) -> int:
        with pytest.raises(Overloaded) as refusal:
            door.enter(tenant, nobody_waits)
        return refusal.value.retry_after

    def serve(every: float, times: int) -> None:
        for turn in range(times):
            clock.now += every
            door.leave(visits[turn % 40], served=True)
            visits[turn % 40] = door.enter(visits[turn % 40].tenant, nobody_waits)

    visits = [door.enter(tenant, nobody_waits) for tenant in ["a", "b"] * 20]
    assert retry_after("a") == 1, "nothing is known yet"
    serve(every=0.25, times=200)
    assert retry_after("c") == 10
    assert retry_after("a") == 10, "a half of the rate for a half of the requests"
    # A quiet hour tells nothing about the rate.
    for visit in visits:
        door.leave(visit)
    clock.now += 3600
    visits = [door.enter(tenant, nobody_waits) for tenant in ["a", "b"] * 20]
    assert retry_after("c") == 10
    # Nor is anybody sent away for longer than a minute.
    serve(every=100, times=20)
    assert retry_after("c") == 60


def test_room_for_places_cache_and_prompts() -> None:
    room = Room(places=3, cache_tokens=100, prefill_tokens=20)
    first = Ticket("a", 15, cache_tokens=40)
    assert room.fits(first)
    room.enter(first)
    second = Ticket("a", 10, cache_tokens=40)
    assert not room.fits(second), "25 prompt tokens would wait"
    assert room.fits(Ticket("a", 5, cache_tokens=60))
    assert not room.fits(Ticket("a", 5, cache_tokens=61))
    assert room.prefilled(first) and not room.prefilled(first)
    assert room.fits(second)
    assert room.fits(Ticket("a", 500, cache_tokens=60)), "a long prompt goes when no other waits"
    room.enter(second)
    room.prefilled(second)
    third = Ticket("a", 1, places=2)
    assert not room.fits(third)
    room.leave(first)
    assert room.fits(third)
    room.leave(second)
    assert len(room) == 0
    assert room.fits(Ticket("a", 1, places=10, cache_tokens=1000)), "alone, anything may enter"
