"""The states of an adapter's entry: every edge is walked, and no other one can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
from slow_store import Build, Store, granted, until, wait_for_loads

from sera_serve.residency import TRANSITIONS, AdapterEntry, AdapterState

ABSENT, READING, ON_HOST, COPYING, RESIDENT, DRAINING, DELETED = AdapterState
EDGES = {(state, following) for state, after in TRANSITIONS.items() for following in after}
LOADED = [ABSENT, READING, COPYING, RESIDENT]


class Setting:
    """What a scenario works with, and the states that adapters went through."""

    def __init__(
        self, build: Build, store: Store, large: list[str], small: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.build, self.store, self.large, self.small, self.monkeypatch = build, store, large, small, monkeypatch
        self.paths: dict[str, list[AdapterState]] = {}
        move_to = AdapterEntry.move_to

        def recorded(entry: AdapterEntry, state: AdapterState) -> None:
            move_to(entry, state)
            self.paths.setdefault(entry.digest, [ABSENT]).append(state)

        monkeypatch.setattr(AdapterEntry, "move_to", recorded)

    def break_copies(self, residency: Any) -> None:
        def fill(*args: Any) -> None:
            raise OSError("no such device")

        self.monkeypatch.setattr(residency.pool, "fill", fill)


@pytest.fixture
def setting(build: Build, store: Store, large: list[str], small: list[str], monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(build, store, large, small, monkeypatch)


def evicted(setting: Setting) -> str:
    residency = setting.build(room=1.1)
    for digest in setting.large[:2]:
        granted(residency.acquire(digest)).release()
    return setting.large[0]


def evicted_to_the_host_and_deleted_there(setting: Setting) -> str:
    residency = setting.build(room=1.1, host=4)
    first, second = setting.large[:2]
    for digest in (first, second, first, second):
        granted(residency.acquire(digest)).release()
    residency.mark_deleted(first)
    return first


def unreadable(setting: Setting) -> str:
    residency = setting.build(room=1.1)
    setting.store.failing[setting.large[0]] = OSError("disk on fire")
    with pytest.raises(OSError, match="disk on fire"):
        granted(residency.acquire(setting.large[0]))
    return setting.large[0]


def expected_where_the_device_is_taken(setting: Setting) -> str:
    residency = setting.build(room=1.1, host=4)
    held = granted(residency.acquire(setting.large[1]))
    hint = residency.prefetch(setting.large[0])
    wait_for_loads(residency)
    hint.release()
    held.release()
    return setting.large[0]


def copied_in_vain(setting: Setting) -> str:
    residency = setting.build(room=1.1)
    setting.break_copies(residency)
    with pytest.raises(OSError, match="no such device"):
        granted(residency.acquire(setting.large[0]))
    return setting.large[0]


def copied_in_vain_and_kept(setting: Setting) -> str:
    residency = setting.build(room=1.1, host=4)
    setting.break_copies(residency)
    with pytest.raises(OSError, match="no such device"):
        granted(residency.acquire(setting.large[0]))
    return setting.large[0]


def deleted_while_copied(setting: Setting) -> str:
    residency = setting.build(room=1.1, host=4)
    fill = residency.pool.fill

    def deleted_meanwhile(*args: Any) -> None:
        residency.mark_deleted(setting.large[0])
        fill(*args)

    setting.monkeypatch.setattr(residency.pool, "fill", deleted_meanwhile)
    lease = granted(residency.acquire(setting.large[0]))
    residency.check_invariants()
    lease.release()
    return setting.large[0]


def deleted_and_drained_in_vain(setting: Setting) -> str:
    residency = setting.build(room=1.1, max_bypasses=0)
    held = granted(residency.acquire(setting.large[0]))
    residency.mark_deleted(setting.large[0])
    other = residency.acquire(setting.large[1])
    wait_for_loads(residency)
    residency.check_invariants()
    assert other.cancel()
    residency.check_invariants()
    held.release()
    return setting.large[0]


def drained_in_vain_then_deleted_while_draining(setting: Setting) -> str:
    residency = setting.build(room=1.1, max_bypasses=0)
    held = granted(residency.acquire(setting.large[0]))
    other = residency.acquire(setting.large[1])
    wait_for_loads(residency)
    assert other.cancel()
    another = residency.acquire(setting.large[2])
    wait_for_loads(residency)
    residency.mark_deleted(setting.large[0])
    residency.check_invariants()
    held.release()
    granted(another).release()
    return setting.large[0]


def deleted_while_draining_and_awaited(setting: Setting) -> str:
    residency = setting.build(room=1.5, host=8, max_bypasses=0)
    leases = [granted(residency.acquire(digest)) for digest in setting.small]
    leases[3].release()
    overdue = residency.acquire(setting.large[0])
    wait_for_loads(residency)
    late = residency.acquire(setting.small[3])
    residency.mark_deleted(setting.small[3])
    residency.check_invariants()
    assert not late.done()
    for lease in leases[:3]:
        lease.release()
    granted(overdue).release()
    granted(late).release()
    return setting.small[3]


SCENARIOS: list[tuple[Callable[[Setting], str], list[AdapterState]]] = [
    (evicted, [*LOADED, ABSENT]),
    (evicted_to_the_host_and_deleted_there, [*LOADED, ON_HOST, COPYING, RESIDENT, ON_HOST, ABSENT]),
    (unreadable, [ABSENT, READING, ABSENT]),
    (expected_where_the_device_is_taken, [ABSENT, READING, ON_HOST]),
    (copied_in_vain, [ABSENT, READING, COPYING, ABSENT]),
    (copied_in_vain_and_kept, [ABSENT, READING, COPYING, ON_HOST]),
    (deleted_while_copied, [ABSENT, READING, COPYING, DELETED, ABSENT]),
    (deleted_and_drained_in_vain, [*LOADED, DELETED, DRAINING, DELETED, ABSENT]),
    (
        drained_in_vain_then_deleted_while_draining,
        [*LOADED, DRAINING, RESIDENT, DRAINING, DELETED, DRAINING, ABSENT],
    ),
    (deleted_while_draining_and_awaited, [*LOADED, DRAINING, ON_HOST, COPYING, DELETED, ABSENT]),
]


@pytest.mark.parametrize(("scenario", "path"), SCENARIOS, ids=[scenario.__name__ for scenario, _ in SCENARIOS])
def test_an_adapter_goes_through_these_states(
    setting: Setting, scenario: Callable[[Setting], str], path: list[AdapterState]
) -> None:
    digest = scenario(setting)
    until(lambda: setting.paths[digest] == path)


def test_the_scenarios_walk_every_edge() -> None:
    assert {edge for _, path in SCENARIOS for edge in pairwise(path)} == EDGES


@pytest.mark.parametrize(("state", "following"), list(product(AdapterState, AdapterState)))
def test_no_other_edge_can_be_walked(state: AdapterState, following: AdapterState) -> None:
    entry = AdapterEntry("a" * 64, Counter({state: 1}), state)
    if (state, following) in EDGES:
        entry.move_to(following)
        assert entry.state is following and +entry.in_state == Counter({following: 1})
        return
    with pytest.raises(RuntimeError, match=f"cannot go from '{state.value}' to '{following.value}'"):
        entry.move_to(following)
    assert entry.state is state and entry.in_state == Counter({state: 1})
