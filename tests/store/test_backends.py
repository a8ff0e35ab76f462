"""What every backend promises: one suite for the local directory and for the smallest backend in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundle_factory import make_bundle, make_classifier
from memory_backend import MemoryBackend

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, InvalidBundle
from adapters_store.backends.interface import Backend, Change, CommitResult, Outcome
from adapters_store.backends.local import LocalBackend
from adapters_store.records import VersionRecord

NAME, OTHER = "acme/support", "acme/other"
LIMITS = BundleLimits()
FIRST, SECOND = make_bundle(1), make_bundle(2)


@pytest.fixture(params=["local", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return LocalBackend(str(tmp_path / "store"), create=True) if request.param == "local" else MemoryBackend()


def record(bundle: AdapterBundle, version: int) -> VersionRecord:
    return VersionRecord(
        version=version,
        digest=bundle.digest,
        created_at="2026-01-01T00:00:00Z",
        nbytes=bundle.nbytes,
        parameters=bundle.config.parameters,
        task=bundle.config.task,
        method=bundle.config.method,
        base=bundle.config.base.name,
    )


def add(backend: Backend, adapter: str, bundle: AdapterBundle, **aliases: int) -> None:
    backend.put_bundle(bundle, LIMITS)
    manifest = backend.manifest(adapter)
    change = Change(add=record(bundle, manifest.next_version), set_aliases=aliases)
    assert backend.commit(adapter, change, manifest.revision).outcome is Outcome.COMMITTED


def remove(backend: Backend, adapter: str, *versions: int) -> CommitResult:
    return backend.commit(adapter, Change(remove_versions=versions), backend.manifest(adapter).revision)


def test_an_absent_adapter_has_an_empty_manifest(backend: Backend) -> None:
    manifest = backend.manifest(NAME)
    assert (manifest.versions, manifest.aliases, manifest.highest_deleted) == ((), {}, 0)
    assert manifest.next_version == 1
    assert backend.alias(NAME, "latest") is None
    assert backend.version(NAME, 1) is None
    assert backend.list_page(None, "", 10) == []


def test_a_commit_is_seen_as_a_whole(backend: Backend) -> None:
    add(backend, NAME, FIRST, stable=1)
    assert backend.version(NAME, 1) == record(FIRST, 1)
    # `latest` is there whether it was set or not.
    assert backend.manifest(NAME).aliases == {"latest": 1, "stable": 1}
    assert (backend.alias(NAME, "latest"), backend.alias(NAME, "stable"), backend.alias(NAME, "no")) == (1, 1, None)
    add(backend, NAME, SECOND, latest=2)
    assert backend.manifest(NAME).versions == (1, 2)
    assert backend.alias(NAME, "latest") == 2
    backend.commit(NAME, Change(remove_aliases=("stable",)), backend.manifest(NAME).revision)
    assert backend.manifest(NAME).aliases == {"latest": 2}


@pytest.mark.parametrize(
    "between",
    [
        Change(add=record(SECOND, 2)),
        Change(set_aliases={"stable": 1}),
        Change(remove_versions=(1,)),
    ],
    ids=["version", "alias", "removal"],
)
def test_a_commit_on_an_old_revision_changes_nothing(backend: Backend, between: Change) -> None:
    backend.put_bundle(SECOND, LIMITS)
    absent = backend.manifest(NAME).revision
    add(backend, NAME, FIRST)
    assert backend.commit(NAME, Change(add=record(SECOND, 1)), absent).outcome is Outcome.CONFLICT
    assert backend.version(NAME, 1) == record(FIRST, 1)
    old = backend.manifest(NAME).revision
    assert backend.commit(NAME, between, old).outcome is Outcome.COMMITTED
    now = backend.manifest(NAME)
    change = Change(add=record(SECOND, 3), set_aliases={"latest": 3, "new": 1}, remove_versions=(1,))
    assert backend.commit(NAME, change, old) == CommitResult(Outcome.CONFLICT)
    assert backend.manifest(NAME) == now


def test_a_revision_does_not_come_back(backend: Backend) -> None:
    before = backend.manifest(NAME).revision
    add(backend, NAME, FIRST)
    remove(backend, NAME, 1)
    assert backend.manifest(NAME).revision != before
    assert backend.manifest(NAME).next_version == 2


def test_a_version_without_its_bundle_is_refused(backend: Backend) -> None:
    manifest = backend.manifest(NAME)
    change = Change(add=record(FIRST, 1), set_aliases={"latest": 1})
    assert backend.commit(NAME, change, manifest.revision).outcome is Outcome.BUNDLE_MISSING
    assert backend.manifest(NAME) == manifest
    assert backend.version(NAME, 1) is None


def test_numbers_of_removed_versions_are_kept(backend: Backend) -> None:
    for bundle in (FIRST, SECOND, make_bundle(3)):
        add(backend, NAME, bundle)
    remove(backend, NAME, 2)
    manifest = backend.manifest(NAME)
    assert (manifest.versions, manifest.highest_deleted, manifest.next_version) == ((1, 3), 2, 4)
    remove(backend, NAME, 1, 3)
    manifest = backend.manifest(NAME)
    assert (manifest.versions, manifest.aliases, manifest.next_version) == ((), {}, 4)
    add(backend, NAME, FIRST)
    assert backend.manifest(NAME).versions == (4,)
    assert backend.manifest(NAME).aliases == {"latest": 4}


def test_a_bundle_goes_with_its_last_reference(backend: Backend) -> None:
    add(backend, NAME, FIRST)
    add(backend, NAME, SECOND)
    add(backend, OTHER, FIRST)
    size = backend.bundle_bytes(SECOND.digest)
    freed = remove(backend, NAME, 1, 2).freed
    assert (freed.digests, freed.nbytes) == ((SECOND.digest,), size)
    assert backend.bundle_bytes(SECOND.digest) is None
    assert backend.bundle_bytes(FIRST.digest)
    assert remove(backend, OTHER, 1).freed.digests == (FIRST.digest,)
    assert backend.bundle_bytes(FIRST.digest) is None
    assert backend.collect_garbage().digests == ()


def test_a_bundle_that_one_adapter_uses_twice_stays_for_the_second_version(backend: Backend) -> None:
    add(backend, NAME, FIRST)
    add(backend, NAME, FIRST)
    assert remove(backend, NAME, 1).freed.digests == ()
    assert backend.bundle_bytes(FIRST.digest)
    assert remove(backend, NAME, 2).freed.digests == (FIRST.digest,)


def test_a_collection_takes_what_no_version_refers_to(backend: Backend) -> None:
    add(backend, NAME, FIRST)
    backend.put_bundle(SECOND, LIMITS)
    size = backend.bundle_bytes(SECOND.digest)
    freed = backend.collect_garbage()
    assert (freed.digests, freed.nbytes) == ((SECOND.digest,), size)
    assert backend.bundle_bytes(FIRST.digest)


def test_bundles_are_read_whole_or_from_the_beginning(backend: Backend) -> None:
    backend.put_bundle(FIRST, LIMITS)
    data = FIRST.to_bytes()
    assert backend.bundle_bytes(FIRST.digest) == len(data)
    for nbytes in (0, 16, len(data), len(data) + 10):
        read = backend.read_bundle(FIRST.digest, nbytes)
        assert read is not None and bytes(read) == data[:nbytes]
        assert not read.readonly
    assert backend.read_bundle(SECOND.digest, 16) is None
    assert backend.bundle_bytes(SECOND.digest) is None
    assert FIRST.digest in backend.bundle_location(FIRST.digest)


def test_a_bundle_beyond_a_readers_limits_is_not_stored(backend: Backend) -> None:
    with pytest.raises(InvalidBundle):
        backend.put_bundle(FIRST, BundleLimits(max_config_bytes=100))
    assert backend.bundle_bytes(FIRST.digest) is None


def test_pages_follow_the_order_of_ids(backend: Backend) -> None:
    # "-" and "." come before "/", and "0" after it.
    ids = ["a-b/x", "a.b/x", "a/x", "a/x-y", "a/x.y", "a/y", "a0/x", "b/x"]
    assert ids == sorted(ids)
    for adapter in reversed(ids):
        add(backend, adapter, FIRST)
    assert backend.list_page(None, "", 100) == ids
    for after in ["", "a", "a/", *ids, "a/x-", "a/xx", "zzz"]:
        rest = [adapter for adapter in ids if adapter > after]
        for limit in (1, 3, 100):
            assert backend.list_page(None, after, limit) == rest[:limit]
            own = [adapter for adapter in rest if adapter.startswith("a/")]
            assert backend.list_page("a", after, limit) == own[:limit]
    assert backend.list_page("nobody", "", 10) == []
    remove(backend, "a/x", 1)
    assert backend.manifest("a/x").versions == ()
    listed = backend.list_page(None, "", 100)
    assert [adapter for adapter in listed if backend.manifest(adapter).versions] == [i for i in ids if i != "a/x"]


def test_one_of_many_writers_wins_each_revision(backend: Backend) -> None:
    bundles = [make_bundle(seed) for seed in range(24)]

    def publish(bundle: AdapterBundle) -> int:
        while True:
            backend.put_bundle(bundle, LIMITS)
            manifest = backend.manifest(NAME)
            change = Change(add=record(bundle, manifest.next_version))
            if backend.commit(NAME, change, manifest.revision).outcome is Outcome.COMMITTED:
                return manifest.next_version

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(publish, bundles))
    assert sorted(versions) == list(range(1, 25))
    for version, bundle in zip(versions, bundles, strict=True):
        assert backend.version(NAME, version) == record(bundle, version)


def test_deleting_and_publishing_one_content_at_once_loses_no_bundle(backend: Backend) -> None:
    """Two adapters take turns to publish and delete the same content: whoever has a version has its bundle."""
    store = AdapterStore.over(backend)

    def publish_and_delete(name: str) -> None:
        for _ in range(25):
            published = store.publish(FIRST, name)
            assert store.load(published.digest).digest == FIRST.digest
            store.delete(name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(publish_and_delete, ["a/x", "b/x", "c/x"]))
    assert backend.bundle_bytes(FIRST.digest) is None
    assert store.collect_garbage().digests == ()


def test_a_store_over_any_backend(backend: Backend) -> None:
    store = AdapterStore.over(backend)
    bundle = make_classifier(1)
    assert store.publish(bundle, NAME).version == 1
    assert store.load(store.resolve(NAME).digest).digest == bundle.digest
    assert store.config(bundle.digest) == bundle.config
    store.check_integrity()
