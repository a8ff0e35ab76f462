"""Stores of version 1, partial copies, and what kills leave of references."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_factory import bundle_path, make_bundle, make_classifier
from store_jobs import CRASHED, NAME, OTHER, JobServer

from adapters_store import AdapterConfig, AdapterStore
from adapters_store.errors import StoreWriteFailed

SHARED = make_bundle(2)
IDS = [OTHER, NAME, "zoo/sorter"]


@pytest.fixture(scope="session")
def old_store(two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as the release before wrote it: v1 and v2 of NAME, OTHER with the content of v2, a classifier."""
    root = tmp_path_factory.mktemp("old") / "store"
    shutil.copytree(two_versions, root)
    store = AdapterStore(root)
    store.publish(SHARED, OTHER)
    store.publish(make_classifier(7), "zoo/sorter")
    make_old(root)
    return root


def make_old(root: Path) -> None:
    shutil.rmtree(root / "references")
    shutil.rmtree(root / "names")
    (root / "store.json").write_text('{"format":"sera-adapter-store","version":1}\n')
    for path in root.glob("adapters/*/*/versions/*.json"):
        record = json.loads(path.read_text())
        del record["facts"]
        path.write_text(json.dumps(record) + "\n")


def copy(store: Path, target: Path) -> Path:
    shutil.copytree(store, target)
    return target


def assert_works(root: Path) -> None:
    store = AdapterStore(root, create=False)
    store.check_integrity()
    assert json.loads((root / "store.json").read_text())["version"] == 2
    assert [info.adapter for info in store.list_page().adapters] == IDS
    # References are known: the shared bundle stays until its last adapter goes.
    assert store.delete(OTHER).digests == ()
    assert store.load(SHARED.digest).digest == SHARED.digest
    assert store.delete(f"{NAME}@v2").digests == (SHARED.digest,)
    assert not bundle_path(store, SHARED.digest).exists()
    assert store.publish(SHARED, OTHER).version == 2
    assert store.load(SHARED.digest).digest == SHARED.digest
    assert [info.adapter for info in store.iter_adapters("acme")] == [OTHER, NAME]


def test_an_old_store_is_upgraded_when_it_is_opened(old_store: Path, tmp_path: Path) -> None:
    assert_works(copy(old_store, tmp_path / "store"))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_step_of_the_upgrade(old_store: Path, jobs: JobServer, tmp_path: Path, after: bool) -> None:
    for call in range(1, 200):
        root, out = copy(old_store, tmp_path / f"store{call}"), tmp_path / f"out{call}"
        status = jobs.wait(jobs.start("crash_at", out, store=str(root), action="open", call=call, after=after))
        assert status == (0 if out.read_text() else CRASHED)
        assert_works(root)
        if status == 0:
            break
    assert status == 0
    assert call > 10


@pytest.mark.parametrize("lost", ["names", "references", "names/@"])
@pytest.mark.parametrize("action", ["open", "publish a first version"])
def test_an_index_that_a_copy_has_lost_is_written_again(
    old_store: Path, jobs: JobServer, tmp_path: Path, lost: str, action: str
) -> None:
    for call in (1, 3, 5, 7, 9, 11, 200):
        root = copy(old_store, tmp_path / f"store{call}")
        AdapterStore(root)
        shutil.rmtree(root / lost)
        jobs.wait(jobs.start("crash_at", tmp_path / "out", store=str(root), action="open", call=call, after=True))
        assert_works(root)


def test_a_damaged_record_does_not_keep_an_old_store_closed(old_store: Path, tmp_path: Path) -> None:
    root = copy(old_store, tmp_path / "store")
    (root / "adapters" / NAME / "versions" / "v1.json").write_text("{")
    store = AdapterStore(root)
    assert store.resolve(OTHER).version == 1
    assert store.publish(make_bundle(8), OTHER).version == 2


def test_an_old_store_that_must_not_be_written_is_read(
    old_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a file")

    root = copy(old_store, tmp_path / "store")
    with monkeypatch.context() as patched:
        for call in ("replace", "mkdir", "link"):
            patched.setattr(os, call, refuse)
        store = AdapterStore(root, create=False)
        assert [info.adapter for info in store.list_page(limit=2).adapters] == IDS[:2]
        assert [info.adapter for info in store.iter_adapters("acme")] == IDS[:2]
        assert store.load(store.resolve(OTHER).digest).digest == SHARED.digest
        with pytest.raises(StoreWriteFailed):
            store.publish(make_bundle(8), OTHER)
    # The same handle upgrades the store as soon as it may.
    assert store.publish(make_bundle(8), OTHER).version == 2
    assert [info.adapter for info in store.iter_adapters()] == IDS


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ["delete an adapter", "delete a version", "publish a first version"])
def test_a_kill_takes_no_bundle_from_another_adapter(
    action: str, after: bool, two_versions: Path, jobs: JobServer, tmp_path: Path
) -> None:
    third = "zoo/third"
    for call in range(1, 200):
        root, out = copy(two_versions, tmp_path / f"store{call}"), tmp_path / f"out{call}"
        for seed in (1, 2, 3):
            AdapterStore(root).publish(make_bundle(seed), third)
        status = jobs.wait(jobs.start("crash_at", out, store=str(root), action=action, call=call, after=after))
        store = AdapterStore(root)
        for seed in (1, 2, 3):
            assert store.load(make_bundle(seed).digest).digest == make_bundle(seed).digest
        # What the kill left is collected, and nothing else.
        store.collect_garbage()
        store.check_integrity()
        for adapter in [info.adapter for info in store.iter_adapters()]:
            store.delete(adapter)
        assert not list((root / "bundles").iterdir())
        assert not list(root.glob("references/*/*"))
        assert not list(root.glob("names/*/*"))
        if status == 0:
            break
    assert status == 0


def test_resolving_tells_what_a_request_must_know(
    store: AdapterStore, old_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorter = make_classifier(7)
    store.publish(sorter, "zoo/sorter")
    # No bundle is opened.
    bundle_path(store, sorter.digest).unlink()
    old = AdapterStore(copy(old_store, tmp_path / "old"))
    reads: list[str] = []
    config: Callable[[str], AdapterConfig] = old.config
    monkeypatch.setattr(old, "config", lambda digest: reads.append(digest) or config(digest))
    for opened in (store, old, old):
        resolved = opened.resolve("zoo/sorter")
        assert (resolved.task, resolved.labels, resolved.max_length) == ("classify", ("no", "yes"), 64)
        assert resolved.base == sorter.config.base
        assert opened.list_page("zoo").adapters[0].ranks == (4,)
    # Once for a record of store version 1.
    assert reads == [sorter.digest]
    resolved = old.resolve(NAME)
    assert (resolved.task, resolved.labels, resolved.max_length) == ("generate", None, None)


def test_labels_too_long_for_a_record_are_read_from_the_bundle(store: AdapterStore) -> None:
    labels = [f"{number:0500d}" for number in range(200)]
    store.publish(make_classifier(1, labels=labels), NAME)
    assert (store.root / "adapters" / NAME / "versions" / "v1.json").stat().st_size < 1000
    assert store.resolve(NAME).labels == tuple(labels)
    assert store.inspect(NAME).labels == tuple(labels)


def test_facts_in_memory_are_bounded(store: AdapterStore) -> None:
    cache = store._facts
    # Room for two: a label of 500 characters may take 2,060 bytes.
    cache._max_bytes = 600_000
    labels = [f"{number:0500d}" for number in range(140)]
    digests = [store.publish(make_classifier(seed, labels=labels), f"acme/a{seed}").digest for seed in range(3)]
    for used in (0, 1, 0, 2):
        assert store.resolve(f"acme/a{used}").labels == tuple(labels)
        assert cache._bytes <= 600_000
    assert [cache.get(digest) is not None for digest in digests] == [True, False, True]
