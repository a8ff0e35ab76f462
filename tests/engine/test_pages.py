"""The page pool against a plain model of it, and faults that its own check must notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sera_serve.engine.loop.pages import PagePool
from support.plan_world import is_writable


@dataclass
class PlainPool:
    """What a page pool does, told by sets and lists alone.

    Attributes:
        users: How many requests use each page.
        key_of: The keys of published pages.
        idle: Published pages without a user, the one that is idle for longest first.
    """

    count: int
    users: dict[int, int] = field(default_factory=dict)
    key_of: dict[int, bytes] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)

    def free(self) -> set[int]:
        return {page for page in range(1, self.count + 1) if not self.users.get(page) and page not in self.key_of}

    def taken(self, pages: list[int]) -> None:
        """Note what `take` gave, after a check that it was right to give these."""
        expected_idle = self.idle[: max(0, len(pages) - len(self.free()))]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= self.free() | set(expected_idle)
        assert [page for page in pages if page in self.key_of] == expected_idle, "idle for longest goes first"
        for page in pages:
            self.users[page] = 1
            if self.key_of.pop(page, None) is not None:
                self.idle.remove(page)

    def find(self, key: bytes) -> int | None:
        page = next((page for page, own in self.key_of.items() if own == key), None)
        if page is not None:
            if not self.users[page]:
                self.idle.remove(page)
            self.users[page] += 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        if key not in self.key_of.values() and page not in self.key_of:
            self.key_of[page] = key

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page] and page in self.key_of:
                self.idle.append(page)


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_do_what_a_plain_model_does(seed: int) -> None:
    dice = random.Random(seed)
    pool, plain = PagePool(dice.randint(1, 24)), PlainPool(0)
    plain.count = pool.count
    holders: list[list[int]] = []
    keys = [bytes([number]) for number in range(2 * pool.count)]
    found = reused = 0
    for _ in range(1000):
        act = dice.choice(["take", "find", "publish", "publish", "release"])
        if act == "take" and (room := pool.available()):
            had_key = set(plain.key_of)
            pages = pool.take(dice.randint(0, min(room, 5)))
            plain.taken(pages)
            reused += len(had_key & set(pages))
            holders.append(pages)
        elif act == "find":
            key = dice.choice(keys)
            page = pool.find(key)
            assert page == plain.find(key)
            if page is not None:
                found += 1
                holders.append([page])
        elif act == "publish" and any(holders):
            page, key = dice.choice([page for pages in holders for page in pages]), dice.choice(keys)
            pool.publish(page, key)
            plain.publish(page, key)
        elif act == "release" and holders:
            pages = holders.pop(dice.randrange(len(holders)))
            pool.release(pages)
            plain.release(pages)
        pool.check_invariants(holders)
        assert pool.available() == len(plain.free()) + len(plain.idle)
        halves: tuple[list[list[int]], list[list[int]]] = ([], [])
        for pages in holders:
            halves[dice.random() < 0.5].append(pages)
        kept, leaving = ({page for pages in half for page in pages} for half in halves)
        assert pool.freed(halves[1]) == len(leaving - kept)
        for page in range(1, pool.count + 1):
            assert is_writable(pool, page) == (plain.users.get(page) == 1 and page not in plain.key_of)
    assert pool.count < 4 or (found and reused), "the operations were too tame"
    for pages in holders:
        pool.release(pages)
    pool.check_invariants([])
    assert pool.available() == pool.count


def test_idle_pages_are_taken_oldest_first_and_a_chains_end_before_its_beginning() -> None:
    pool = PagePool(6)
    old, young = pool.take(3), pool.take(3)
    for name, pages in (("old", old), ("young", young)):
        for position, page in enumerate(pages):
            pool.publish(page, f"{name}{position}".encode())
    pool.release(old)
    pool.release(young)
    # Used again: idle for a shorter time than the others from now on.
    again = pool.find(b"old0")
    assert again == old[0]
    pool.release([again])
    assert [pool.take(1)[0] for _ in range(6)] == [old[2], old[1], young[2], young[1], young[0], old[0]]
    assert pool.find(b"old0") is None, "a page that was taken back is not found"


def test_free_pages_are_taken_before_idle_ones() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1)
    pool.publish(page, b"key")
    pool.release([page])
    assert page not in pool.take(2)
    assert pool.find(b"key") == page


def test_a_key_and_a_page_are_published_once() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")
    assert pool.find(b"a") == first and pool.find(b"b") is None
    assert is_writable(pool, second) and not is_writable(pool, first)
    pool.check_invariants([[first, second], [first]])


def lose_a_free_page(pool: PagePool) -> None:
    pool._free.popleft()


def free_a_used_page(pool: PagePool) -> None:
    pool._free.append(1)


def free_a_page_twice(pool: PagePool) -> None:
    pool._free.append(pool._free[0])


def count_one_user_too_many(pool: PagePool) -> None:
    pool._users[1] += 1


def count_one_user_too_few(pool: PagePool) -> None:
    pool._users[1] -= 1


def have_an_idle_page_free_too(pool: PagePool) -> None:
    pool._free.append(next(iter(pool._idle)))


def swap_keys(pool: PagePool) -> None:
    pool._page_of[b"used"], pool._page_of[b"idle"] = pool._page_of[b"idle"], pool._page_of[b"used"]


def forget_where_a_key_is(pool: PagePool) -> None:
    del pool._page_of[b"idle"]


def forget_a_pages_key(pool: PagePool) -> None:
    pool._key_of[1] = None


@pytest.mark.parametrize(
    "fault",
    [
        lose_a_free_page,
        free_a_used_page,
        free_a_page_twice,
        count_one_user_too_many,
        count_one_user_too_few,
        have_an_idle_page_free_too,
        swap_keys,
        forget_where_a_key_is,
        forget_a_pages_key,
    ],
    ids=lambda fault: fault.__name__,
)
def test_check_invariants_notices_a_planted_fault(fault: Callable[[PagePool], None]) -> None:
    pool = PagePool(5)
    used, idle = pool.take(2), pool.take(1)
    pool.publish(used[0], b"used")
    pool.publish(idle[0], b"idle")
    pool.release(idle)
    pool.check_invariants([used])
    fault(pool)
    with pytest.raises(RuntimeError, match="page"):
        pool.check_invariants([used])


def test_check_invariants_notices_a_user_that_is_not_counted() -> None:
    pool = PagePool(3)
    pages = pool.take(1)
    with pytest.raises(RuntimeError, match="counts 1 users and has 2"):
        pool.check_invariants([pages, pages])
