"""Small adapters in host memory: copied at once on a CPU, by whoever asks."""

from __future__ import annotations

from typing import Any

import pytest
from slow_store import Build, Store, granted, until

from sera_serve.residency import pool as pool_module


def in_host_memory(build: Build, large: list[str], **settings: Any) -> Any:
    """A residency whose host cache holds the first two adapters, and whose pool has room for the second alone."""
    residency = build(room=1.1, host=4, **settings)
    for digest in large[:2]:
        granted(residency.acquire(digest)).release()
    assert residency.resident_digests() == [large[1]]
    return residency


def test_a_small_adapter_in_host_memory_is_there_when_asked_for(build: Build, large: list[str], store: Store) -> None:
    residency = in_host_memory(build, large)
    lease = residency.acquire(large[0])
    assert lease.done() and residency.resident_digests() == [large[0]]
    lease.result().release()
    stats = residency.stats()
    assert store.asked == large[:2] and stats.granted == {"device": 0, "host": 1, "store": 2}
    assert stats.loads["host"].seconds > 0 and stats.evictions == 2


@pytest.mark.parametrize("hindrance", ["large", "no room", "copy fails"])
def test_otherwise_a_loader_thread_copies_it(
    build: Build, large: list[str], monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    residency = in_host_memory(build, large)
    held = granted(residency.acquire(large[1]))
    if hindrance == "large":
        monkeypatch.setattr(pool_module, "_COPIED_AT_ONCE", 1)
    fill, failures = residency.pool.fill, iter([OSError("once")] if hindrance == "copy fails" else [])

    def fill_at_second_try(*args: Any) -> None:
        for failure in failures:
            raise failure
        fill(*args)

    monkeypatch.setattr(residency.pool, "fill", fill_at_second_try)
    if hindrance != "no room":
        held.release()
    lease = residency.acquire(large[0])
    if hindrance == "no room":
        assert not lease.done()
        held.release()
    granted(lease).release()
    residency.check_invariants()


def test_an_adapter_from_the_host_bypasses_none_that_waits(build: Build, large: list[str]) -> None:
    residency = in_host_memory(build, large)
    held = granted(residency.acquire(large[1]))
    first = residency.acquire(large[2])
    until(lambda: residency.stats().waiting == 1)
    second = residency.acquire(large[0])
    assert not second.done()
    held.release()
    granted(first).release()
    granted(second).release()
