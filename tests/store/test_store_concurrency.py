"""Many processes and threads on one store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundle_factory import make_bundle
from store_jobs import NAME, OTHER, JobServer

from adapters_store import AdapterBundle, AdapterNotFound, AdapterStore
from adapters_store.backends.adapter_directory import AdapterDirectory
from adapters_store.backends.durable import file_lock, try_file_lock
from adapters_store.backends.store_root import StoreRoot
from adapters_store.errors import NotAStore
from support.live_server import wait_until

WRITERS, EACH = 4, 15


def acknowledged(out: Path) -> list[tuple[int, str]]:
    return [(int(line.split()[1]), line.split()[2]) for line in out.read_text().splitlines()]


def test_processes_publishing_to_one_name(jobs: JobServer, tmp_path: Path) -> None:
    """Distinct versions, complete, none lost; garbage collection beside them takes nothing that is needed."""
    root, stop = tmp_path / "store", tmp_path / "stop"
    outs = [tmp_path / f"out{writer}" for writer in range(WRITERS)]
    collector = jobs.start("collect_until", tmp_path / "collector", store=str(root), stop=str(stop))
    writers = []
    for writer, out in enumerate(outs):
        seeds = list(range(writer * 100, writer * 100 + EACH))
        writers.append(jobs.start("publish_some", out, store=str(root), name=NAME, seeds=seeds))
    assert [jobs.wait(process) for process in writers] == [0] * WRITERS
    stop.touch()
    assert jobs.wait(collector) == 0
    assert int((tmp_path / "collector").read_text()) > 0
    versions = [entry for out in outs for entry in acknowledged(out)]
    assert sorted(version for version, _ in versions) == list(range(1, WRITERS * EACH + 1))
    store = AdapterStore(root, create=False)
    store.check_integrity()
    for version, digest in versions:
        assert store.resolve(f"{NAME}@v{version}").digest == digest
    assert store.resolve(NAME).version == WRITERS * EACH


def test_processes_publishing_the_same_content(jobs: JobServer, tmp_path: Path) -> None:
    root = tmp_path / "store"
    outs = [tmp_path / f"out{writer}" for writer in range(WRITERS)]
    writers = [jobs.start("publish_some", out, store=str(root), name=NAME, seeds=list(range(EACH))) for out in outs]
    assert [jobs.wait(process) for process in writers] == [0] * WRITERS
    distinct = {entry for out in outs for entry in acknowledged(out)}
    assert sorted(version for version, _ in distinct) == list(range(1, EACH + 1))
    assert len({digest for _, digest in distinct}) == EACH
    AdapterStore(root).check_integrity()


def test_reading_while_another_process_publishes_and_deletes(jobs: JobServer, tmp_path: Path) -> None:
    """A reader gets a whole bundle or "not found", never anything else."""
    root = tmp_path / "store"
    store = AdapterStore(root)
    store.publish(make_bundle(0), OTHER)
    expected = {make_bundle(seed).digest for seed in range(40)}
    writer = jobs.start("publish_and_delete", tmp_path / "out", store=str(root), name=NAME, seeds=list(range(40)))
    collector = jobs.start("collect_until", tmp_path / "collector", store=str(root), stop=str(tmp_path / "out"))
    found = missed = 0
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text():
        try:
            resolved = store.resolve(NAME)
            assert resolved.digest in expected
            assert store.load(resolved.digest).digest == resolved.digest
            found += 1
        except AdapterNotFound:
            missed += 1
        assert OTHER in [info.adapter for info in store.iter_adapters()]
    assert jobs.wait(writer) == jobs.wait(collector) == 0
    assert found
    assert missed
    store.collect_garbage()
    assert [info.adapter for info in store.iter_adapters()] == [OTHER]
    assert len(list((root / "bundles").iterdir())) == 1


def test_threads_publishing_to_one_name(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda seed: store.publish(make_bundle(seed), NAME), range(40)))
    assert sorted(one.version for one in published) == list(range(1, 41))
    for one in published:
        assert store.resolve(f"{NAME}@v{one.version}").digest == one.digest
    store.check_integrity()


def test_versions_and_aliases_are_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path / "store")
    for seed in range(2):
        store.publish(make_bundle(seed), NAME)
    aliases, others = (
        AdapterDirectory.aliases,
        [lambda: store.publish(make_bundle(2), NAME), lambda: store.delete(NAME)],
    )

    def met_by_a_writer(directory: AdapterDirectory) -> dict[str, int]:
        if others:
            monkeypatch.setattr(AdapterDirectory, "aliases", aliases)
            others.pop(0)()
        return aliases(directory)

    monkeypatch.setattr(AdapterDirectory, "aliases", met_by_a_writer)
    info = store.inspect(NAME)
    assert (info.version, info.versions, info.aliases) == (3, (1, 2, 3), {"latest": 3})
    monkeypatch.setattr(AdapterDirectory, "aliases", met_by_a_writer)
    with pytest.raises(AdapterNotFound):
        store.inspect(NAME)


def test_what_is_deleted_while_everything_is_read_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path / "store")
    for seed in range(3):
        store.publish(make_bundle(seed), NAME)
    load, deleted = AdapterStore.load, [f"{NAME}@v1", NAME]

    def after_a_deletion(read: AdapterStore, digest: str) -> AdapterBundle:
        if deleted:
            store.delete(deleted.pop(0))
        return load(read, digest)

    monkeypatch.setattr(AdapterStore, "load", after_a_deletion)
    store.check_integrity()
    assert not deleted


def test_a_collector_waits_only_for_the_writes_under_way(store: AdapterStore) -> None:
    """flock lets new sharers pass a waiter: writers that follow each other without a gap would starve the collector."""
    root, order = store._backend._root, list[str]()
    begun, end = threading.Event(), threading.Event()

    def write_long() -> None:
        with root.writing():
            begun.set()
            assert end.wait(20)
            order.append("write")

    def collect() -> None:
        with root.exclusive():
            order.append("collect")

    def write_later() -> None:
        with root.writing():
            order.append("later write")

    with ThreadPoolExecutor(3) as pool:
        works = [pool.submit(write_long)]
        assert begun.wait(20)
        works.append(pool.submit(collect))
        wait_until(lambda: is_held(store, "gate"))
        works.append(pool.submit(write_later))
        time.sleep(0.3)
        assert order == []
        end.set()
        for work in works:
            work.result(20)
    assert order == ["write", "collect", "later write"]
    assert not is_held(store, "gate")


def test_the_gate_is_free_while_a_write_or_a_collection_is_under_way(store: AdapterStore) -> None:
    root = store._backend._root
    with root.writing():
        assert not is_held(store, "gate")
        # A release that knows no gate.
        with file_lock(f"{store.root}/locks/writers", shared=True):
            assert is_held(store, "writers")
    with root.exclusive():
        assert is_held(store, "writers") and not is_held(store, "gate")


def test_a_store_whose_gate_cannot_be_made_works_without_it(store: AdapterStore) -> None:
    gate = store.root / "locks" / "gate"
    gate.unlink()
    gate.mkdir()
    opened = AdapterStore(store.root)
    digest = opened.publish(make_bundle(1), NAME).digest
    opened.collect_garbage()
    assert opened.delete(NAME).digests == (digest,)


def is_held(store: AdapterStore, lock: str) -> bool:
    """Whether anyone holds a lock of the store."""
    with try_file_lock(f"{store.root}/locks/{lock}") as was_free:
        return not was_free


def test_a_store_that_another_process_makes_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = StoreRoot.version
    looks: list[int] = []

    def before_the_other(self: StoreRoot) -> int | None:
        looks.append(1)
        if len(looks) > 1:
            return version(self)
        # The other process makes the store after this look, and writes what is no part of one.
        with monkeypatch.context() as other:
            other.setattr(StoreRoot, "version", version)
            AdapterStore(tmp_path)
        (tmp_path / "access").mkdir()
        return None

    monkeypatch.setattr(StoreRoot, "version", before_the_other)
    assert AdapterStore(tmp_path).count_adapters() == 0
    monkeypatch.setattr(StoreRoot, "version", version)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "access").mkdir()
    with pytest.raises(NotAStore, match="it holds 'access'"):
        AdapterStore(tmp_path / "other")
