"""Items of several owners, who take turns: no owner waits for all items of another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TurnQueue(Generic[T]):
    """Owners in the order of their turns, and the items of each owner in order of arrival.

    An owner whose item was taken goes behind the other owners. So does an owner that had no item, when one comes.
    Not thread-safe: the caller holds a lock.
    """

    def __init__(self) -> None:
        """Begin empty."""
        # Dictionaries, because items leave from the middle.
        self._items: dict[Hashable, dict[T, None]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        """All items: the first of each owner in the order of turns, then the second of each, and so on."""
        rounds = deque(iter(items) for items in self._items.values())
        while rounds:
            items = rounds.popleft()
            for item in items:
                yield item
                rounds.append(items)
                break

    def firsts(self) -> Iterator[tuple[Hashable, T]]:
        """Each owner with its first item, in the order of turns."""
        for owner, items in self._items.items():
            yield owner, next(iter(items))

    def add(self, owner: Hashable, item: T) -> None:
        """Put an item behind the other items of its owner; an item comes once."""
        self._items.setdefault(owner, {})[item] = None
        self._length += 1

    def remove(self, owner: Hashable, item: T, is_turn: bool) -> None:
        """Take an item out; with `is_turn` its owner has had its turn, and goes behind the others."""
        items = self._items[owner]
        del items[item]
        self._length -= 1
        if not items:
            del self._items[owner]
        elif is_turn:
            self._items[owner] = self._items.pop(owner)
