"""A disk that is full, read-only or gone: what is refused says so and leaves nothing; deleting works on a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundle_factory import bundle_path, make_bundle
from safetensors import SafetensorError
from store_jobs import ACTIONS, NAME, OTHER, faults
from torch import Tensor

from adapters_store import AdapterNotFound, AdapterStore, StoreError, StoreUnavailable
from adapters_store.backends.interface import Change
from adapters_store.errors import StoreCorrupted, StoreWriteFailed
from support.small_disk import FullDisk, fill_bytes, fill_files, mounted, small_disk

FIRST, SECOND = make_bundle(1), make_bundle(2)
# The tenant has no directory of deleted versions yet, so that a deletion has the most to write.
NAMES = ["acme/one", "acme/two", "beta/one"]


def contents(root: Path) -> dict[str, int]:
    """Sizes of all files of a store by path, and its directories; without locks, which stay."""
    return {
        str(path.relative_to(root)): path.stat().st_size if path.is_file() else -1
        for path in root.rglob("*")
        if path.relative_to(root).parts[0] != "locks"
    }


def published(root: Path) -> AdapterStore:
    store = AdapterStore(root)
    for name in NAMES:
        store.publish(FIRST, name)
        store.publish(SECOND, name)
    return store


def assert_deletes(store: AdapterStore) -> None:
    """A version and then every adapter can be deleted, and the last deletion frees the bundles."""
    store.delete(f"{NAMES[0]}@v2")
    assert store.resolve(NAMES[0]).version == 1
    freed = [digest for name in NAMES for digest in store.delete(name).digests]
    assert sorted(freed) == sorted([FIRST.digest, SECOND.digest])
    assert not list((store.root / "bundles").iterdir())
    assert not list((store.root / "tmp").iterdir())
    assert len(list((store.root / "reserve").iterdir())) == 8


@pytest.fixture(params=[fill_bytes, fill_files])
def full_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterStore]:
    with small_disk(tmp_path / "disk") as disk:
        store = published(disk / "store")
        request.param(disk)
        yield store


def test_a_real_full_disk_refuses_a_version_and_leaves_nothing(full_store: AdapterStore) -> None:
    before = contents(full_store.root)
    for name in (NAMES[0], "acme/new"):
        with pytest.raises(StoreWriteFailed, match="No space left") as refusal:
            full_store.publish(make_bundle(3), name)
        assert refusal.value.status == 507
        assert contents(full_store.root) == before
    assert full_store.check() == "full"
    assert full_store.load(full_store.resolve(NAMES[0]).digest).digest == SECOND.digest
    assert [info.adapter for info in full_store.iter_adapters()] == NAMES


def test_only_deletions_use_the_reserve_of_a_real_full_disk(full_store: AdapterStore) -> None:
    before, backend = contents(full_store.root), full_store._backend
    manifest, record = backend.manifest(NAMES[0]), backend.version(NAMES[0], 2)
    assert record is not None
    third = record.model_copy(update={"version": 3})
    for change in (
        Change(set_aliases={"stable": 1}),
        Change(set_aliases={"latest": 1}),
        # Its bundle is there, and needs no space.
        Change(add=third),
        Change(add=third, remove_versions=(1,)),
    ):
        with pytest.raises(StoreWriteFailed, match="No space left"):
            backend.commit(NAMES[0], change, manifest.revision)
        assert contents(full_store.root) == before


def test_deleting_works_on_a_real_full_disk(full_store: AdapterStore) -> None:
    assert_deletes(full_store)
    assert full_store.publish(make_bundle(3), NAMES[0]).version == 3


@pytest.mark.parametrize("fill", [fill_bytes, fill_files])
def test_collecting_garbage_works_on_a_real_full_disk(fill: Callable[[Path], None], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = published(disk / "store")
        bundle_path(store, "0" * 64).touch()
        (store.root / "locks" / "names").unlink()
        fill(disk)
        assert store.collect_garbage().digests == ("0" * 64,)


def test_deleting_works_on_an_injected_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = published(tmp_path / "store")
    for lock in (store.root / "locks").iterdir():
        if lock.name != "writers":
            lock.unlink()
    disk = FullDisk(monkeypatch)
    assert_deletes(store)
    assert disk.refused > 0


class _Killed(BaseException):
    """Ends a deletion at once, as a kill does; nothing but `finally` runs after it."""


@pytest.mark.parametrize("reference", [NAMES[0], f"{NAMES[0]}@v2"])
def test_a_deletion_on_a_full_disk_can_be_killed_at_any_step(reference: str, tmp_path: Path) -> None:
    def die() -> None:
        raise _Killed

    template = published(tmp_path / "template").root
    for lock in (template / "locks").iterdir():
        lock.unlink()
    (template / "locks" / "writers").touch()
    for call in range(1, 200):
        root = tmp_path / f"store{call}"
        shutil.copytree(template, root)
        store = AdapterStore(root)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch)
            with faults(call, die) as made, contextlib.suppress(_Killed):
                store.delete(reference)
            assert disk.refused > 0
        store = AdapterStore(root)
        store.check_integrity()
        assert len(list((root / "reserve").iterdir())) == 8
        with contextlib.suppress(AdapterNotFound):
            # A version that is seen is whole, and a number is never used again.
            assert store.load(store.resolve(f"{NAMES[0]}@v2").digest).digest == SECOND.digest
        store.collect_garbage()
        assert store.publish(make_bundle(3), NAMES[0]).version == 3
        assert store.load(store.resolve(NAMES[1]).digest).digest == SECOND.digest
        if made() < call:
            return
    pytest.fail("the deletion makes more calls than that")


def test_an_injected_full_disk_refuses_a_version_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = published(tmp_path / "store")
    before = contents(store.root)
    FullDisk(monkeypatch)
    for name in (NAMES[0], "acme/new"):
        with pytest.raises(StoreWriteFailed, match="No space left"):
            store.publish(make_bundle(3), name)
        assert contents(store.root) == before


def test_the_librarys_refusal_of_a_bundle_is_one_of_the_store(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = contents(store.root)
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(StoreWriteFailed, match="No space left on device") as refusal:
        store.publish(FIRST, NAME)
    assert str(store.root) not in refusal.value.message
    assert contents(store.root) == before


def needed(store: AdapterStore) -> set[str]:
    return {
        store.resolve(f"{info.adapter}@v{version}").digest
        for info in store.iter_adapters()
        for version in info.versions
    }


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ["publish a version", "publish a first version"])
def test_a_version_refused_at_any_step_leaves_no_bundle_without_a_version(
    action: str, after: bool, two_versions: Path, tmp_path: Path
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    for call in range(1, 200):
        root = tmp_path / f"store{call}"
        shutil.copytree(two_versions, root)
        store = AdapterStore(root)
        store.collect_garbage()
        with faults(call, fail, after) as made:
            try:
                ACTIONS[action](root)
                refused = False
            except StoreWriteFailed:
                refused = True
        held = {path.stem for path in (root / "bundles").iterdir()}
        assert held == needed(store)
        # Where the removal of an unfinished file fails, it is a second name of a file in place, and takes no space.
        assert all(path.stat().st_nlink == 2 for path in (root / "tmp").iterdir())
        if refused and len(held) == 2:
            # The version is not there: neither are its reference and its name.
            assert {path.name for path in (root / "references").glob("*/*")} == held
            assert not (root / "adapters" / OTHER).exists()
            assert store.count_adapters() == 1
        if made() < call:
            return
    pytest.fail("the action makes more calls than that")


def test_a_refused_version_takes_no_bundle_from_another_adapter(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first publication writes its version, a second one publishes the same content under another name."""
    commit = store._backend.commit
    other = AdapterStore(store.root)

    def refused_after_the_other(*arguments: object) -> object:
        other.publish(FIRST, OTHER)
        raise StoreWriteFailed("the store could not be written: No space left on device", param="store")

    monkeypatch.setattr(store._backend, "commit", refused_after_the_other)
    with pytest.raises(StoreWriteFailed):
        store.publish(FIRST, NAME)
    monkeypatch.setattr(store._backend, "commit", commit)
    assert store.load(store.resolve(OTHER).digest).digest == FIRST.digest


def test_a_damaged_record_that_refuses_a_version_leaves_no_bundle(store: AdapterStore) -> None:
    store.publish(FIRST, NAME)
    (store.root / "adapters" / NAME / "aliases" / "latest.json").write_text("{")
    with pytest.raises(StoreCorrupted):
        store.publish(SECOND, NAME)
    assert not bundle_path(store, SECOND.digest).exists()
    assert bundle_path(store, FIRST.digest).exists()


def assert_read_only(store: AdapterStore) -> None:
    assert store.resolve(NAMES[0]).version == 2
    assert store.load(SECOND.digest).digest == SECOND.digest
    assert [info.adapter for info in store.iter_adapters()] == NAMES
    writes: list[Callable[[], object]] = [
        lambda: store.publish(make_bundle(3), NAMES[0]),
        lambda: store.delete(NAMES[0]),
        lambda: store.set_alias(NAMES[0], "stable", f"{NAMES[0]}@v1"),
    ]
    for write in writes:
        with pytest.raises(StoreWriteFailed, match="Read-only file system") as refusal:
            write()
        assert refusal.value.status == 507


def test_a_real_read_only_store_is_read(tmp_path: Path) -> None:
    published(tmp_path / "store")
    with mounted(tmp_path / "view", "--bind", "-o", "ro", str(tmp_path / "store")) as view:
        for store in (AdapterStore(view), AdapterStore(view, create=False)):
            assert_read_only(store)
            assert store.check() == "read_only"


def test_an_injected_read_only_store_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = published(tmp_path / "store")
    opened = os.open

    def refusing(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert_read_only(store)


READS: dict[str, Callable[[AdapterStore], object]] = {
    "resolve": lambda store: store.resolve(NAMES[0]),
    "resolve a version": lambda store: store.resolve(f"{NAMES[0]}@v1"),
    "resolve an alias": lambda store: store.resolve(f"{NAMES[0]}@stable"),
    "resolve a digest": lambda store: store.resolve(f"{NAMES[0]}@{FIRST.digest[:12]}"),
    "inspect": lambda store: store.inspect(NAMES[0]),
    "list": lambda store: store.list_page(),
    "list a tenant": lambda store: store.list_page("acme"),
    "count": lambda store: store.count_adapters(),
    "load": lambda store: store.load(FIRST.digest),
    "config": lambda store: store.config(FIRST.digest),
    "check": lambda store: store.check(),
    "check the integrity": lambda store: store.check_integrity(),
}
WRITES: dict[str, Callable[[AdapterStore], object]] = {
    "publish": lambda store: store.publish(make_bundle(3), NAMES[0]),
    "publish a first version": lambda store: store.publish(make_bundle(3), "acme/new"),
    "publish the same again": lambda store: store.publish(FIRST, NAMES[0]),
    "delete": lambda store: store.delete(NAMES[0]),
    "set an alias": lambda store: store.set_alias(NAMES[0], "stable", f"{NAMES[0]}@v1"),
    "remove an alias": lambda store: store.remove_alias(NAMES[0], "stable"),
    "collect garbage": lambda store: store.collect_garbage(),
}


def assert_unavailable(store: AdapterStore) -> None:
    for name, use in {**READS, **WRITES}.items():
        with pytest.raises(StoreError) as refusal:
            use(store)
        assert isinstance(refusal.value, StoreUnavailable), name
        assert refusal.value.status == 503
        assert str(store.root) not in refusal.value.message


@pytest.mark.parametrize("left", ["nothing", "an empty directory", "its directories"])
def test_a_store_that_is_gone_is_unavailable_and_nothing_is_made_in_its_place(left: str, tmp_path: Path) -> None:
    store = published(tmp_path / "store")
    for used in (store, AdapterStore(store.root)):
        store.root.rename(tmp_path / "away")
        if left != "nothing":
            store.root.mkdir()
        if left == "its directories":
            # As where a store was begun in the directory that its volume is mounted over.
            for path in (tmp_path / "away").iterdir():
                if path.is_dir():
                    (store.root / path.name).mkdir()
        before = sorted(tmp_path.rglob("*"))
        assert_unavailable(used)
        locks = store.root / "locks" / "writers"
        assert sorted(path for path in tmp_path.rglob("*") if path != locks) == before
        if store.root.exists():
            shutil.rmtree(store.root)
        (tmp_path / "away").rename(store.root)
        assert used.resolve(NAMES[0]).version == 2
        assert used.check() == "writable"


def test_a_real_unmounted_store_is_unavailable_until_it_is_mounted_again(tmp_path: Path) -> None:
    published(tmp_path / "store")
    with mounted(tmp_path / "view", "--bind", str(tmp_path / "store")) as view:
        store = AdapterStore(view)
        subprocess.run(["umount", str(view)], check=True)
        assert_unavailable(store)
        assert not list(view.iterdir())
        subprocess.run(["mount", "--bind", str(tmp_path / "store"), str(view)], check=True)
        assert store.publish(make_bundle(3), NAMES[0]).version == 3


def test_a_store_that_goes_in_the_middle_of_a_publication_is_not_begun_again(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = store._backend._bundles.hold

    def hold_and_go(digest: str, adapter: str) -> bool:
        held = hold(digest, adapter)
        store.root.rename(tmp_path / "away")
        return held

    monkeypatch.setattr(store._backend._bundles, "hold", hold_and_go)
    with pytest.raises(StoreUnavailable):
        store.publish(FIRST, NAME)
    assert not store.root.exists()


def test_what_is_absent_in_a_store_that_is_there_is_not_found(store: AdapterStore) -> None:
    assert store.list_page().adapters == ()
    for use in (READS["resolve"], READS["load"], WRITES["delete"]):
        with pytest.raises(StoreError) as refusal:
            use(store)
        assert refusal.value.code == "adapter_not_found"


def test_a_reserve_that_is_damaged_or_absent_is_made_again_when_the_store_is_opened(store: AdapterStore) -> None:
    reserve = store.root / "reserve"
    (reserve / "3").write_bytes(b"short")
    (reserve / "4").unlink()
    AdapterStore(store.root)
    assert sorted((path.name, path.stat().st_size) for path in reserve.iterdir()) == [
        (str(index), 16 << 10) for index in range(8)
    ]
    shutil.rmtree(reserve)
    AdapterStore(store.root, create=False)
    assert len(list(reserve.iterdir())) == 8
