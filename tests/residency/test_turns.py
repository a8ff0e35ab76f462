"""Owners that take turns."""

from __future__ import annotations

from sera_serve.residency.turns import TurnQueue


def test_items_come_in_rounds_of_owners() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.add(item[0], item)
    assert list(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert list(queue.firsts()) == [("a", "a1"), ("b", "b1"), ("c", "c1")]


def test_an_owner_goes_behind_the_others_with_its_turn_and_only_then() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "a2", "a3", "b1", "c1"):
        queue.add(item[0], item)
    queue.remove("a", "a2", is_turn=False)
    assert list(queue) == ["a1", "b1", "c1", "a3"]
    queue.remove("a", "a1", is_turn=True)
    assert list(queue) == ["b1", "c1", "a3"]
    queue.remove("b", "b1", is_turn=True)
    queue.add("b", "b2")
    assert list(queue) == ["c1", "a3", "b2"]
    assert len(queue) == 3
