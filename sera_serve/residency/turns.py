"""Items of several owners, who take turns: no owner waits for all items of another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TurnQueue(Generic[T]):
    """Owners in the order of their turns, and the items of each owner in order of arrival.

    An owner whose item was taken goes behind the other owners. So does an owner that had no item, when one comes.
    Several owners may share an item: it comes with the first turn of any of them, and takes that turn alone.
    Not thread-safe: the caller holds a lock.
    """

    def __init__(self) -> None:
        """Begin empty."""
        # Dictionaries, because items leave from the middle.
        self._items: dict[Hashable, dict[T, None]] = {}
        self._owners: dict[T, set[Hashable]] = {}

    def __len__(self) -> int:
        """How many items there are; a shared one counts once."""
        return len(self._owners)

    def __iter__(self) -> Iterator[T]:
        """All items: the first of each owner in the order of turns, then the second of each, and so on."""
        # The first round makes the others, so that whoever looks at a few items does not pay for all owners.
        rounds: deque[Iterator[T]] = deque()
        seen: set[T] = set()
        for items in chain(map(iter, self._items.values()), _taken_from(rounds)):
            for item in items:
                if item not in seen:
                    seen.add(item)
                    yield item
                    rounds.append(items)
                    break

    def firsts(self) -> Iterator[T]:
        """The first item of each owner, in the order of turns."""
        for items in self._items.values():
            yield next(iter(items))

    def owners(self, item: T) -> frozenset[Hashable]:
        """The owners that share an item that is here."""
        return frozenset(self._owners[item])

    def add(self, owner: Hashable, item: T) -> None:
        """Put an item behind the other items of an owner; where the owner has it already, it stays where it is."""
        self._items.setdefault(owner, {})[item] = None
        self._owners.setdefault(item, set()).add(owner)

    def share(self, owners: Sequence[Hashable], item: T) -> None:
        """Have exactly these owners, one at least, share an item; the new ones have it behind their other items."""
        for owner in owners:
            self.add(owner, item)
        for owner in self._owners[item].difference(owners):
            self._drop(owner, item)
        self._owners[item].intersection_update(owners)

    def remove(self, item: T, is_turn: bool) -> None:
        """Take an item out; with `is_turn` the first of its owners has had its turn, and goes behind the others."""
        owners = self._owners.pop(item)
        first = next(owner for owner in self._items if owner in owners) if is_turn else None
        for owner in owners:
            self._drop(owner, item)
        if is_turn and first in self._items:
            self._items[first] = self._items.pop(first)

    def _drop(self, owner: Hashable, item: T) -> None:
        del self._items[owner][item]
        if not self._items[owner]:
            del self._items[owner]


def _taken_from(rounds: deque[Iterator[T]]) -> Iterator[Iterator[T]]:
    while rounds:
        yield rounds.popleft()
