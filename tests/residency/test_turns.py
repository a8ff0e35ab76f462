"""Owners that take turns."""

from __future__ import annotations

from sera_serve.residency.turns import TurnQueue


def test_items_come_in_rounds_of_owners() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.add(item[0], item)
    assert list(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert list(queue.firsts()) == ["a1", "b1", "c1"]


def test_an_owner_goes_behind_the_others_with_its_turn_and_only_then() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "a2", "a3", "b1", "c1"):
        queue.add(item[0], item)
    queue.remove("a2", is_turn=False)
    assert list(queue) == ["a1", "b1", "c1", "a3"]
    queue.remove("a1", is_turn=True)
    assert list(queue) == ["b1", "c1", "a3"]
    queue.remove("b1", is_turn=True)
    queue.add("b", "b2")
    assert list(queue) == ["c1", "a3", "b2"]
    assert len(queue) == 3


def test_a_shared_item_takes_the_first_turn_of_any_owner_and_no_other() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "a2", "b1", "c1"):
        queue.add(item[0], item)
    queue.share("a", "shared")
    assert list(queue) == ["a1", "b1", "c1", "a2", "shared"]
    queue.share("ad", "shared")
    assert list(queue) == ["a1", "b1", "c1", "shared", "a2"]
    assert len(queue) == 5
    queue.add("d", "d1")
    queue.remove("a1", is_turn=True)
    queue.remove("shared", is_turn=True)
    # It was before a2 in the turn of d, which is over, and behind it in that of a.
    assert list(queue) == ["b1", "c1", "a2", "d1"]


def test_an_owner_leaves_a_shared_item() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in ("a1", "b1", "a2"):
        queue.add(item[0], item)
    queue.share("ab", "a2")
    queue.share("b", "a2")
    assert list(queue) == ["a1", "b1", "a2"]
    assert queue.owners("a2") == {"b"}
    queue.remove("b1", is_turn=False)
    queue.remove("a2", is_turn=True)
    assert list(queue) == ["a1"]
