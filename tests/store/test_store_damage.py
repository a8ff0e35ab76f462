"""Stores that are damaged, foreign, copied or left unfinished."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundle_factory import MODULE, Q, bundle_path, config_fields, make_bundle

from adapters_store import AdapterBundle, AdapterConfig, AdapterNotFound, AdapterStore, StoreError
from adapters_store.backends import bundle_files
from adapters_store.backends.adapter_directory import AdapterDirectory
from adapters_store.errors import NotAStore, StoreCorrupted, StoreWriteFailed, UnsupportedStore, VersionInUse

NAME = "acme/support"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_last_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(make_bundle(99).to_bytes()),
    ],
    ids=["bit", "cut", "empty", "another bundle"],
)
def test_damaged_bundle_is_never_served_and_publishing_heals_it(
    store: AdapterStore, damage: Callable[[Path], object]
) -> None:
    bundle = make_bundle(1)
    store.publish(bundle, NAME)
    path = bundle_path(store, bundle.digest)
    damage(path)
    for use in (lambda: store.load(bundle.digest), store.check_integrity):
        with pytest.raises(StoreCorrupted) as refusal:
            use()
        assert (refusal.value.code, refusal.value.status) == ("store_corrupted", 500)
        assert str(path) in refusal.value.message
    assert store.publish(bundle, NAME).version == 1
    store.check_integrity()


def test_a_copy_without_the_newest_version_is_mended(store: AdapterStore, tmp_path: Path) -> None:
    """A copy that was made while an adapter was published has the alias, and lacks the version."""
    for seed in (1, 2, 3):
        store.publish(make_bundle(seed), NAME)
    shutil.copytree(store.root, tmp_path / "copy")
    copy = AdapterStore(tmp_path / "copy")
    (copy.root / "adapters" / NAME / "versions" / "v3.json").unlink()
    with pytest.raises(AdapterNotFound, match="its alias latest names; name another one of v1, v2"):
        copy.resolve(NAME)
    copy.collect_garbage()
    assert copy.resolve(NAME).version == 2
    assert [info.adapter for info in copy.iter_adapters()] == [NAME]
    copy.check_integrity()


@pytest.mark.parametrize("width", [8, 1 << 17], ids=["small", "hashed on a thread"])
def test_work_on_a_damaged_bundle_ends_in_that_error(store: AdapterStore, width: int) -> None:
    modules = {Q: dict(MODULE, d_in=width)}
    small = make_bundle(1)
    config = AdapterConfig.model_validate(config_fields(modules=modules))
    bundle = AdapterBundle(config, {**small.tensors, f"{Q}.sera_a": torch.zeros(width, 2)})
    store.publish(bundle, NAME)
    with store.loading(bundle.digest) as read:
        assert torch.equal(read.tensors[f"{Q}.sera_b"], bundle.tensors[f"{Q}.sera_b"])
    with pytest.raises(ZeroDivisionError), store.loading(bundle.digest):
        _ = 1 // 0
    flip_last_byte(bundle_path(store, bundle.digest))
    begun = []
    with pytest.raises(StoreCorrupted, match="is damaged"), store.loading(bundle.digest) as read:
        begun.append(read)
    # The damage may have caused it.
    with pytest.raises(StoreCorrupted, match="is damaged"), store.loading(bundle.digest) as read:
        begun.append(read)
        _ = 1 // 0
    assert len(begun) == 2


def test_missing_bundle_and_lost_alias_target_are_found(store: AdapterStore) -> None:
    digest = store.publish(make_bundle(1), NAME).digest
    store.publish(make_bundle(2), NAME)
    bundle_path(store, digest).rename(bundle_path(store, "0" * 64))
    with pytest.raises(StoreCorrupted, match="bundle of acme/support@v1 is missing"):
        store.check_integrity()
    bundle_path(store, "0" * 64).rename(bundle_path(store, digest))
    store.set_alias(NAME, "stable", f"{NAME}@v1")
    (store.root / "adapters" / NAME / "versions" / "v1.json").unlink()
    with pytest.raises(StoreCorrupted, match="acme/support@stable points to v1"):
        store.check_integrity()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', "\xff", '{"version": 1}' + 70_000 * " "])
@pytest.mark.parametrize("file", ["versions/v1.json", "aliases/latest.json"])
def test_damaged_record_is_named(store: AdapterStore, file: str, text: str) -> None:
    store.publish(make_bundle(1), NAME)
    path = store.root / "adapters" / NAME / file
    path.write_bytes(text.encode("latin-1"))
    if (file, text) == ("aliases/latest.json", '{"version": 2}'):
        with pytest.raises(AdapterNotFound):
            store.resolve(NAME)
        return
    with pytest.raises(StoreCorrupted) as refusal:
        store.resolve(NAME)
    assert str(path) in refusal.value.message


def test_absent_adapter_has_an_empty_directory(store: AdapterStore) -> None:
    directory = AdapterDirectory(str(store.root), "acme/support")
    assert directory.versions() == []
    assert directory.aliases() == {}
    assert directory.manifest().next_version == 1


@pytest.mark.parametrize(
    ("mark", "error"),
    [
        ('{"format": "sera-adapter-store", "version": 3}', UnsupportedStore),
        ('{"format": "something else", "version": 1}', NotAStore),
        ("not JSON", NotAStore),
        ('{"format": "sera-adapter-store"}', NotAStore),
    ],
)
def test_other_stores_are_refused(tmp_path: Path, mark: str, error: type[StoreError]) -> None:
    (tmp_path / "store.json").write_text(mark)
    with pytest.raises(error) as refusal:
        AdapterStore(tmp_path)
    assert refusal.value.param == "store"
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_paths_that_are_no_stores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(NotAStore):
            AdapterStore(path)
    with pytest.raises(NotAStore):
        AdapterStore(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_place_where_no_store_can_be_made_is_named() -> None:
    with pytest.raises(StoreError, match=r"no store can be made at /proc/x: .*; name another directory") as refusal:
        AdapterStore("/proc/x")
    assert refusal.value.code == "store_write_failed"


def test_new_volume_and_unfinished_creation_are_accepted(tmp_path: Path) -> None:
    for name in ("lost+found", "bundles", "tmp"):
        (tmp_path / name).mkdir()
    AdapterStore(tmp_path).publish(make_bundle(), NAME)
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": "sera-adapter-store", "version": 2}


def test_store_copied_without_empty_folders_works(store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    for folder in ("tmp", "locks", "retired"):
        shutil.rmtree(store.root / folder)
    AdapterStore(store.root, create=False).publish(make_bundle(2), NAME)


def test_opening_clears_leftovers_only_when_nobody_writes(store: AdapterStore) -> None:
    leftover = store.root / "tmp" / "unfinished"
    (store.root / "tmp" / "trash" / "versions").mkdir(parents=True)
    leftover.write_bytes(b"half a bundle")
    with store._backend._root.writing():
        AdapterStore(store.root)
        assert leftover.exists()
    AdapterStore(store.root)
    assert not list((store.root / "tmp").iterdir())


def damage_record(store: AdapterStore, adapter: str, version: int = 1) -> Path:
    path = store.root / "adapters" / adapter / "versions" / f"v{version}.json"
    path.write_bytes(b"")
    return path


def test_lists_leave_a_damaged_record_out_and_name_it_once(
    store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c", "zoo/d")):
        store.publish(make_bundle(seed), name)
    path = damage_record(store, "acme/b")
    for _ in range(3):
        first = store.list_page(limit=2)
        assert [info.adapter for info in first.adapters] == ["acme/a", "acme/c"] and first.next == "acme/c"
        assert [info.adapter for info in store.list_page("acme").adapters] == ["acme/a", "acme/c"]
        assert [info.adapter for info in store.iter_adapters()] == ["acme/a", "acme/c", "zoo/d"]
        assert store.count_adapters() == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "acme/b is left out of lists" in caplog.text and str(path) in caplog.text
    damage_record(store, "zoo/d")
    assert [info.adapter for info in store.iter_adapters()] == ["acme/a", "acme/c"]
    assert len(caplog.records) == 2 and "zoo/d" in caplog.records[1].getMessage()


def test_lists_leave_out_a_name_of_another_form(store: AdapterStore) -> None:
    """As someone makes it by hand in the index."""
    store.publish(make_bundle(1), NAME)
    for name in ("acme@a..b", f"acme@{'a' * 65}"):
        (store.root / "names" / "@" / name).touch()
    assert [info.adapter for info in store.iter_adapters()] == [NAME]
    assert [info.adapter for info in store.list_page().adapters] == [NAME]
    store.check_integrity()


def test_an_adapter_with_a_damaged_record_can_be_deleted(store: AdapterStore) -> None:
    digests = [store.publish(make_bundle(seed), NAME).digest for seed in (1, 2)]
    damage_record(store, NAME)
    # Nobody knows what it refers to: no bundle is garbage.
    with pytest.raises(StoreCorrupted):
        store.collect_garbage()
    assert all(map(store.has, digests))
    freed = store.delete(NAME)
    assert freed.adapter_gone and freed.digests == (digests[1],)
    assert list(store.iter_adapters()) == [] and store.count_adapters() == 0
    with pytest.raises(AdapterNotFound):
        store.delete(NAME)
    assert store.collect_garbage().digests == (digests[0],)
    assert store.publish(make_bundle(3), NAME).version == 3


def test_a_version_with_a_damaged_record_can_be_deleted_by_its_number(store: AdapterStore) -> None:
    for seed in (1, 2):
        store.publish(make_bundle(seed), NAME)
    damage_record(store, NAME, 2)
    with pytest.raises(StoreCorrupted):
        store.resolve(NAME)
    assert not store.delete(f"{NAME}@v2").adapter_gone
    assert store.resolve(NAME).version == 1
    with pytest.raises(AdapterNotFound, match="v2"):
        store.delete(f"{NAME}@v2")
    store.collect_garbage()
    store.check_integrity()


def test_an_adapter_whose_latest_version_is_missing_can_be_deleted(store: AdapterStore) -> None:
    for seed in (1, 2):
        store.publish(make_bundle(seed), NAME)
    (store.root / "adapters" / NAME / "versions" / "v2.json").unlink()
    assert store.delete(NAME).adapter_gone
    assert list(store.iter_adapters()) == []


def test_every_fault_is_found(store: AdapterStore) -> None:
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c", "acme/d", "acme/e")):
        store.publish(make_bundle(seed), name)
    store.publish(make_bundle(7), "acme/c")
    for name in ("acme/a@v1", "acme/c@v1", "acme/c@v2"):
        bundle_path(store, store.resolve(name).digest).unlink()
    damage_record(store, "acme/b")
    store.set_alias("acme/d", "stable", "acme/d@v1")
    (store.root / "adapters/acme/d/aliases/stable.json").write_text('{"version": 8}')
    (store.root / "adapters/acme/e/aliases/latest.json").write_text("{")
    found = list(store.faults())
    words = ["bundle of acme/a@v1 is missing", "acme/b/versions/v1.json is damaged", "bundle of acme/c@v1", "acme/c@v2"]
    words += ["alias acme/d@stable points to v8", "acme/e/aliases/latest.json is damaged"]
    messages = [fault.message for faults in found for fault in faults]
    assert len(messages) == len(words) and all(map(str.__contains__, messages, words))
    assert [len(faults) for faults in found] == [1, 1, 2, 1, 1]
    assert [len(faults) for faults in store.faults(latest_only=True)] == [1, 1, 1, 1, 1]


def with_deleted_version(store: AdapterStore) -> None:
    """Versions 1 and 3, of which `stable` names the first; version 2 was deleted."""
    for seed in (1, 2, 3):
        store.publish(make_bundle(seed), NAME)
    store.delete(f"{NAME}@v2")
    store.set_alias(NAME, "stable", f"{NAME}@v1")


@pytest.mark.parametrize("alias", ["stable", "latest"])
@pytest.mark.parametrize("text", ["", "{", '{"version": 0}'])
def test_a_damaged_alias_can_be_pointed_again_removed_and_deleted(store: AdapterStore, alias: str, text: str) -> None:
    with_deleted_version(store)
    path = store.root / "adapters" / NAME / "aliases" / f"{alias}.json"

    def damage() -> None:
        path.write_text(text)
        # No alias, as an editor leaves one.
        (path.parent / f"{alias}.json~").write_text(text)

    damage()
    [[fault]] = store.faults()
    remedy = f"point alias '{alias}' again" + (", or remove it" if alias == "stable" else "")
    assert str(path) in fault.message and fault.message.endswith(f"; {remedy}")
    for read in (lambda: store.resolve(f"{NAME}@{alias}"), lambda: store.inspect(f"{NAME}@v1")):
        with pytest.raises(StoreCorrupted, match="aliases"):
            read()
    assert store.resolve(f"{NAME}@v3").version == 3 and store.held("acme").nbytes > 0
    assert store.collect_garbage().digests == ()
    store.set_alias(NAME, alias, f"{NAME}@v1")
    assert store.inspect(NAME).aliases[alias] == 1
    store.check_integrity()
    damage()
    if alias == "stable":
        # It may point to any version.
        with pytest.raises(VersionInUse, match="'stable' is damaged, and may point to v3"):
            store.delete(f"{NAME}@v3")
        assert store.remove_alias(NAME, alias) == 0
        assert store.publish(make_bundle(4), NAME).version == 4
    else:
        store.delete(f"{NAME}@v3")
        with pytest.raises(StoreCorrupted, match="latest"):
            store.resolve(NAME)
    damage()
    assert store.delete(NAME).adapter_gone
    assert list(store.iter_adapters()) == []
    assert store.publish(make_bundle(5), NAME).version == (5 if alias == "stable" else 4)


@pytest.mark.parametrize("text", ["", "{", '{"highest_version": 0}'])
def test_a_damaged_record_of_deleted_versions_stops_new_numbers_and_nothing_else(
    store: AdapterStore, text: str
) -> None:
    with_deleted_version(store)
    path = store.root / "retired" / f"{NAME}.json"
    path.write_text(text)
    [[fault]] = store.faults()
    assert str(path) in fault.message and '; write {"highest_version": N} to it' in fault.message
    assert store.publish(make_bundle(1), NAME).version == 1
    with pytest.raises(StoreCorrupted, match="retired"):
        store.publish(make_bundle(4), NAME)
    assert not store.has(make_bundle(4).digest)
    store.set_alias(NAME, "stable", f"{NAME}@v1")
    store.delete(f"{NAME}@v3")
    assert store.inspect(NAME).versions == (1,)
    assert store.delete(NAME).adapter_gone
    # A number that a deleted version had would bring other content to those who name that version.
    with pytest.raises(StoreCorrupted, match="retired"):
        store.publish(make_bundle(4), NAME)
    path.write_text('{"highest_version": 3}')
    assert store.publish(make_bundle(4), NAME).version == 4


def test_an_alias_that_the_system_does_not_read_is_a_fault(store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    path = store.root / "adapters" / NAME / "aliases" / "stable.json"
    path.symlink_to(path)
    [[fault]] = store.faults()
    reason = f"Too many levels of symbolic links: {path}"
    assert fault.message.startswith(f"{NAME} cannot be read ({reason}); check the disk")


def test_a_disk_that_does_not_read_a_bundle_is_a_fault(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

    store.publish(make_bundle(1), NAME)
    monkeypatch.setattr(bundle_files, "open", lambda path, mode: Unreadable(), raising=False)
    [[fault]] = store.faults()
    path = store.root / "bundles" / f"{make_bundle(1).digest}.safetensors"
    assert fault.message.startswith(f"{NAME}@v1 cannot be read (Input/output error: {path}); check the disk")


@pytest.mark.parametrize("file", ["versions/v1.json", "aliases/latest.json", "aliases/stable.json"])
def test_a_directory_in_the_place_of_a_record_damages_its_adapter_alone(store: AdapterStore, file: str) -> None:
    """As `mkdir` in the wrong window, or a copy that went wrong, leaves one."""
    for seed, name in enumerate(("acme/a", NAME, "acme/z")):
        store.publish(make_bundle(seed), name)
        store.set_alias(name, "stable", f"{name}@v1")
    path = store.root / "adapters" / NAME / file
    path.unlink()
    path.mkdir()
    others = ["acme/a", "acme/z"]
    assert [info.adapter for info in store.iter_adapters()] == others
    # A page names the alias `latest` alone.
    listed = others if "stable" not in file else ["acme/a", NAME, "acme/z"]
    assert [info.adapter for info in store.list_page().adapters] == listed
    assert store.held("acme").adapters == 3
    with pytest.raises(StoreCorrupted, match=r"\(it is a directory: remove the directory first\); "):
        store.resolve(f"{NAME}@stable" if "latest" not in file else NAME)
    assert [len(faults) for faults in store.faults()] == [0, 1, 0]
    if "aliases" in file:
        with pytest.raises(StoreWriteFailed, match=rf"Is a directory \(adapters/{NAME}/{file}\)"):
            store.set_alias(NAME, Path(file).stem, f"{NAME}@v1")
    assert AdapterStore(store.root).delete(NAME).adapter_gone
    assert [info.adapter for info in store.list_page().adapters] == others
    store.check_integrity()


def test_a_directory_in_the_place_of_a_record_of_deleted_versions_stops_new_numbers(store: AdapterStore) -> None:
    with_deleted_version(store)
    path = store.root / "retired" / f"{NAME}.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreCorrupted, match="retired"):
        store.publish(make_bundle(4), NAME)
    assert store.delete(NAME).adapter_gone
    path.rmdir()
    path.write_text('{"highest_version": 3}')
    assert store.publish(make_bundle(4), NAME).version == 4
