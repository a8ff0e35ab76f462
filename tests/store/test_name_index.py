"""The index of names: pages at any size, kept whole by splits, kills and other writers."""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from bundle_factory import make_bundle
from store_jobs import faults

from adapters_store import AdapterStore
from adapters_store.backends.local import LocalBackend
from adapters_store.backends.name_index import NameIndex
from adapters_store.errors import StoreCorrupted

LIMIT = 8


@pytest.fixture
def index(tmp_path: Path) -> NameIndex:
    (tmp_path / "names" / "@").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    return NameIndex(str(tmp_path / "names"), str(tmp_path / "tmp"), nullcontext, LIMIT)


def everything(index: NameIndex) -> list[str]:
    return index.page(None, "", 1 << 30)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_sorted_set(index: NameIndex, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    ids = [f"{tenant}/{name}" for tenant in ("a", "a-b", "a0", "b") for name in range(60)]
    held: set[str] = set()
    for _ in range(300):
        some = sorted(rng.sample(ids, rng.choice([1, 1, 20])))
        if rng.random() < 0.6:
            index.add(some)
            held |= set(some)
        else:
            index.remove(some)
            held -= set(some)
        after, limit = rng.choice(["", *ids]), rng.randint(1, 30)
        assert index.page(None, after, limit) == sorted(name for name in held if name > after)[:limit]
        assert index.page("a", after, limit) == sorted(n for n in held if n > after and n.startswith("a/"))[:limit]
    assert all(len(list(segment.iterdir())) <= LIMIT for segment in (tmp_path / "names").iterdir())
    keep = sorted(rng.sample(ids, 5))
    index.repair(keep)
    assert everything(index) == keep
    # No segment stays empty but the first.
    assert len(list((tmp_path / "names").iterdir())) <= 6


def test_a_page_reads_its_own_segments(index: NameIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add(f"t/{number:05d}" for number in range(1000))
    read = []
    entries = index._entries
    monkeypatch.setattr(index, "_entries", lambda bounds, bound: read.append(bound) or entries(bounds, bound))
    assert index.page("t", "t/00700", 10) == [f"t/{number:05d}" for number in range(701, 711)]
    assert len(read) <= 4


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_step_of_a_split_loses_no_name(index: NameIndex, tmp_path: Path, after: bool) -> None:
    def strike() -> None:
        raise Killed

    ids = [f"t/{number}" for number in range(LIMIT)]
    for call in range(1, 100):
        index.repair([])
        index.add(ids)
        try:
            with faults(call, strike, after) as made:
                index.add(["t/99"])
        except Killed:
            assert set(ids) <= set(everything(index)) <= {*ids, "t/99"}
            # The next writer goes on, whatever was left.
            index.add(["t/99", "t/0a"])
            assert everything(index) == sorted([*ids, "t/0a", "t/99"])
            index.remove(ids)
            assert everything(index) == ["t/0a", "t/99"]
        if made() < call:
            break
    assert call > LIMIT // 2
    assert everything(index) == sorted([*ids, "t/99"])


def test_a_reader_beside_splits_misses_nothing(index: NameIndex) -> None:
    early = [f"t/{number:04d}" for number in range(0, 1000, 10)]
    index.add(early)
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            seen = everything(index)
            if not set(early) <= set(seen) or seen != sorted(set(seen)):
                wrong.append(seen)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1000):
        index.add([f"t/{number:04d}"])
    stop.set()
    reader.join()
    assert not wrong
    assert len(everything(index)) == 1000


def test_a_lost_index_is_named(index: NameIndex, tmp_path: Path) -> None:
    (tmp_path / "names" / "@").rmdir()
    with pytest.raises(StoreCorrupted, match="lacks its first segment"):
        everything(index)


def test_pages_of_a_store_of_many_segments(tmp_path: Path) -> None:
    store = AdapterStore.over(LocalBackend(str(tmp_path / "store"), create=True, segment_limit=4))
    names = [f"{tenant}/{number}" for tenant in "abc" for number in range(7)]
    for name in names:
        store.publish(make_bundle(1), name)
    other = AdapterStore(tmp_path / "store")
    for tenant, expected in ((None, names), ("b", names[7:14])):
        seen: list[str] = []
        after = None
        while True:
            page = other.list_page(tenant, after, limit=3)
            seen += [info.adapter for info in page.adapters]
            if page.next is None:
                break
            assert len(page.adapters) == 3
            after = page.next
        assert seen == expected
    assert other.count_adapters() == 21
    # A page that ends with the last adapter is the last page.
    assert other.list_page("c", limit=7).next is None
    with pytest.raises(ValueError, match="limit"):
        other.list_page(limit=0)
