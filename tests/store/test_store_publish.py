"""Publishing, resolving, aliases, deletion and garbage in a store that nobody kills."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import Q, bundle_path, make_bundle, make_classifier

from adapters_store import (
    AdapterBundle,
    AdapterNotFound,
    AdapterStore,
    BundleLimits,
    InvalidAdapterName,
    InvalidBundle,
    TooManyAliases,
    VersionInUse,
)
from adapters_store.backends.bundle_files import BundleFiles
from adapters_store.errors import AmbiguousDigest
from adapters_store.store import MOST_ALIASES

NAME = "acme/support"


def test_publish_resolve_load(store: AdapterStore) -> None:
    bundle = make_classifier(1)
    published = store.publish(bundle, NAME)
    assert (published.adapter, published.version, published.digest) == (NAME, 1, bundle.digest)
    for ref in (NAME, f"{NAME}@latest", f"{NAME}@v1", f"{NAME}@{bundle.digest[:8]}", f"{NAME}@{bundle.digest}"):
        resolved = store.resolve(ref)
        assert (resolved.adapter, resolved.version, resolved.digest) == (NAME, 1, bundle.digest)
    loaded = store.load(bundle.digest)
    assert loaded.digest == bundle.digest
    assert loaded.config == bundle.config == store.config(bundle.digest)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in bundle.tensors.items())
    store.check_integrity()


def test_versions_count_up_and_latest_follows(store: AdapterStore) -> None:
    digests = [store.publish(make_bundle(seed), NAME).digest for seed in range(3)]
    assert [store.resolve(f"{NAME}@v{version}").digest for version in (1, 2, 3)] == digests
    assert store.resolve(NAME).version == 3
    info = store.inspect(f"{NAME}@v2")
    assert (info.version, info.digest, info.versions) == (2, digests[1], (1, 2, 3))
    assert info.aliases == {"latest": 3}
    assert (info.task, info.method, info.base) == ("generate", "sera", "tiny")
    assert (info.parameters, info.nbytes) == (56, 224)


def test_same_content_keeps_its_version_and_becomes_latest(store: AdapterStore) -> None:
    first = store.publish(make_bundle(1), NAME)
    store.publish(make_bundle(2), NAME)
    again = store.publish(AdapterBundle.from_bytes(make_bundle(1).to_bytes()), NAME)
    assert again == first
    assert store.resolve(NAME).version == 1
    assert store.inspect(NAME).versions == (1, 2)
    other = store.publish(make_bundle(1), "other/name")
    assert (other.version, other.digest) == (1, first.digest)
    assert len(list((store.root / "bundles").iterdir())) == 2


def test_content_of_another_tenant_is_published_with_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tenant publishes must not tell, by its time, whether another tenant has it."""
    work: list[str] = []

    def note(module: object, name: str) -> None:
        call = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            work.append(name if name != "save_file" else f"writes {len(args[0].to_bytes())} bytes")
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    for name in ("fsync", "replace", "mkdir"):
        note(os, name)
    note(AdapterBundle, "save_file")
    note(BundleFiles, "read")

    def published(store: AdapterStore, name: str) -> list[str]:
        work.clear()
        store.publish(make_bundle(7), name)
        return list(work)

    alone, shared = AdapterStore(tmp_path / "alone"), AdapterStore(tmp_path / "shared")
    for store in (alone, shared):
        store.publish(make_bundle(1), NAME)
    shared.publish(make_bundle(7), "other/secret")
    fresh, held = published(alone, NAME), published(shared, NAME)
    assert held == fresh and any(call.startswith("writes") for call in fresh)
    # A new adapter, too.
    assert published(alone, "third/new") == published(shared, "third/new")
    # What the adapter has itself is only read, and the other tenant's version is whole.
    again = published(shared, NAME)
    assert "read" in again and not any(call.startswith("writes") for call in again)
    assert shared.load(shared.resolve("other/secret").digest).digest == make_bundle(7).digest
    shared.check_integrity()
    # Who fails to publish takes nothing away from others.
    monkeypatch.setattr(shared._backend, "commit", lambda *args: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        shared.publish(make_bundle(7), "fourth/new")
    assert shared.load(make_bundle(7).digest).digest == make_bundle(7).digest


def test_refused_bundle_changes_nothing(store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    before = sorted(store.root.rglob("*"))
    bundle = make_bundle(2)
    bundle.tensors[f"{Q}.sera_a"][0, 0] = float("nan")
    with pytest.raises(InvalidBundle) as refusal:
        store.publish(bundle, NAME)
    assert refusal.value.code == "not_finite"
    assert sorted(store.root.rglob("*")) == before


def test_bundle_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, limits=BundleLimits(max_config_bytes=100))
    with pytest.raises(InvalidBundle) as refusal:
        store.publish(make_bundle(), NAME)
    assert refusal.value.code == "bundle_too_large"
    assert list(store.iter_adapters()) == []
    assert not list((store.root / "bundles").iterdir())
    assert not list((store.root / "tmp").iterdir())


def test_aliases(store: AdapterStore) -> None:
    for seed in range(3):
        store.publish(make_bundle(seed), NAME)
    store.set_alias(NAME, "stable", f"{NAME}@v1")
    assert store.inspect(NAME).aliases == {"latest": 3, "stable": 1}
    assert store.resolve(f"{NAME}@stable").version == 1
    store.set_alias(NAME, "stable", NAME)
    assert store.resolve(f"{NAME}@stable").version == 3
    store.set_alias(NAME, "latest", f"{NAME}@v2")
    assert store.resolve(NAME).version == 2
    store.remove_alias(NAME, "stable")
    assert store.inspect(NAME).aliases == {"latest": 2}
    with pytest.raises(AdapterNotFound, match="alias 'stable'"):
        store.remove_alias(NAME, "stable")
    with pytest.raises(InvalidAdapterName):
        store.remove_alias(NAME, "latest")


def test_alias_stays_within_its_adapter(store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    store.publish(make_bundle(2), "other/name")
    with pytest.raises(InvalidAdapterName) as refusal:
        store.set_alias(NAME, "stable", "other/name")
    assert refusal.value.param == "ref"
    with pytest.raises(AdapterNotFound):
        store.set_alias(NAME, "stable", f"{NAME}@v9")


@pytest.mark.parametrize("ref", ["no/body", f"{NAME}@v2", f"{NAME}@stable", f"{NAME}@{'0' * 12}"])
def test_not_found(store: AdapterStore, ref: str) -> None:
    store.publish(make_bundle(1), NAME)
    for use in (store.resolve, store.inspect, store.delete):
        with pytest.raises(AdapterNotFound) as refusal:
            use(ref)
        assert (refusal.value.code, refusal.value.status, refusal.value.param) == (
            "adapter_not_found",
            404,
            "adapter",
        )
    with pytest.raises(AdapterNotFound):
        store.load("0" * 64)
    with pytest.raises(AdapterNotFound):
        store.config("0" * 64)


def test_digest_prefix_of_two_versions_is_ambiguous(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.publish(make_bundle(1), NAME).digest
    second = store.publish(make_bundle(2), NAME).digest
    path = store.root / "adapters" / NAME / "versions" / "v2.json"
    path.write_text(path.read_text().replace(second, first[:8] + second[8:]))
    with pytest.raises(AmbiguousDigest) as refusal:
        store.resolve(f"{NAME}@{first[:8]}")
    assert refusal.value.status == 422
    assert store.resolve(f"{NAME}@{first}").version == 1


def test_delete_version_moves_latest(store: AdapterStore) -> None:
    for seed in range(4):
        store.publish(make_bundle(seed), NAME)
    store.delete(f"{NAME}@latest")
    assert store.resolve(NAME).version == 3
    store.delete(f"{NAME}@v1")
    assert store.inspect(NAME).versions == (2, 3)
    assert store.inspect(NAME).aliases == {"latest": 3}
    store.set_alias(NAME, "latest", f"{NAME}@v2")
    store.delete(f"{NAME}@v3")
    assert store.resolve(NAME).version == 2
    store.delete(f"{NAME}@v2")
    assert list(store.iter_adapters()) == []
    with pytest.raises(AdapterNotFound):
        store.resolve(NAME)


def test_version_numbers_are_never_used_again(store: AdapterStore) -> None:
    for seed in range(3):
        store.publish(make_bundle(seed), NAME)
    store.delete(f"{NAME}@v3")
    assert store.publish(make_bundle(7), NAME).version == 4
    store.delete(NAME)
    assert store.publish(make_bundle(8), NAME).version == 5
    store.delete(f"{NAME}@v5")
    assert store.publish(make_bundle(9), NAME).version == 6
    assert store.inspect(NAME).versions == (6,)


def test_version_behind_an_alias_is_not_deleted(store: AdapterStore) -> None:
    store.publish(make_bundle(1), NAME)
    store.publish(make_bundle(2), NAME)
    store.set_alias(NAME, "stable", f"{NAME}@v1")
    with pytest.raises(VersionInUse) as refusal:
        store.delete(f"{NAME}@v1")
    assert (refusal.value.code, refusal.value.status) == ("version_in_use", 409)
    assert "stable" in refusal.value.message
    assert store.resolve(f"{NAME}@stable").version == 1
    store.delete(NAME)
    assert list(store.iter_adapters()) == []


def test_aliases_are_bounded_and_those_that_are_there_still_move(store: AdapterStore) -> None:
    for seed in (1, 2):
        store.publish(make_bundle(seed), NAME)
    for number in range(MOST_ALIASES):
        store.set_alias(NAME, f"alias-{number}", f"{NAME}@v1")
    with pytest.raises(TooManyAliases) as refusal:
        store.set_alias(NAME, "one-more", f"{NAME}@v1")
    assert (refusal.value.code, refusal.value.status, refusal.value.param) == ("too_many_aliases", 409, "alias")
    assert "100" in refusal.value.message and "remove" in refusal.value.message
    store.set_alias(NAME, "alias-7", f"{NAME}@v2")
    store.set_alias(NAME, "latest", f"{NAME}@v1")
    assert store.resolve(f"{NAME}@alias-7").version == 2
    store.remove_alias(NAME, "alias-8")
    store.set_alias(NAME, "one-more", f"{NAME}@v2")
    assert len(store.inspect(NAME).aliases) == MOST_ALIASES + 1


def test_a_bundle_goes_with_its_last_version_and_not_before(store: AdapterStore) -> None:
    shared, alone = make_bundle(1), make_bundle(2)
    store.publish(shared, NAME)
    store.publish(shared, "other/name")
    store.publish(alone, NAME)
    assert store.collect_garbage().bundles == 0
    size = bundle_path(store, alone.digest).stat().st_size
    freed = store.delete(NAME)
    assert (freed.digests, freed.nbytes) == ((alone.digest,), size)
    assert store.collect_garbage().bundles == 0
    assert store.load(shared.digest).digest == shared.digest
    with pytest.raises(AdapterNotFound):
        store.load(alone.digest)


def test_list(store: AdapterStore) -> None:
    assert list(store.iter_adapters()) == []
    for name in ("b/x", "a/z", "a/y"):
        store.publish(make_bundle(1), name)
    store.publish(make_bundle(2), "a/y")
    assert [(info.adapter, info.version) for info in store.iter_adapters()] == [("a/y", 2), ("a/z", 1), ("b/x", 1)]
    assert [info.adapter for info in store.iter_adapters("a")] == ["a/y", "a/z"]
    assert list(store.iter_adapters("nobody")) == []
    with pytest.raises(InvalidAdapterName):
        list(store.iter_adapters("../a"))
    # Something that a file manager leaves behind is not an adapter.
    (store.root / "adapters" / ".DS_Store").touch()
    (store.root / "adapters" / "a" / ".DS_Store").touch()
    assert len(list(store.iter_adapters())) == 3
    store.check_integrity()


def test_listing_and_resolving_thousands_is_quick(store: AdapterStore) -> None:
    store.publish(make_bundle(1), "t/0")
    template = store.root / "adapters" / "t" / "0"
    for number in range(1, 3000):
        shutil.copytree(template, template.with_name(str(number)))
    # Records that were added by hand are in no index.
    store.collect_garbage()
    started = time.perf_counter()
    assert len(list(store.iter_adapters())) == 3000
    assert time.perf_counter() - started < 5
    started = time.perf_counter()
    for number in range(1000):
        store.resolve(f"t/{number}")
    assert time.perf_counter() - started < 2


def test_two_handles_see_each_other(store: AdapterStore) -> None:
    other = AdapterStore(store.root, create=False)
    store.publish(make_bundle(1), NAME)
    assert other.resolve(NAME).version == 1
    other.delete(NAME)
    assert list(store.iter_adapters()) == []


def test_known_content_leaves_latest_if_asked(store: AdapterStore) -> None:
    first, second = make_bundle(1), make_bundle(2)
    assert store.publish(first, NAME, keep_latest=True).version == 1
    assert store.publish(second, NAME, keep_latest=True).version == 2
    assert store.publish(first, NAME, keep_latest=True).version == 1
    assert store.resolve(NAME).version == 2
    assert store.publish(first, NAME).version == 1
    assert store.resolve(NAME).version == 1
