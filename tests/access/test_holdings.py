"""Adapters and bytes of tenants are counted from the store, and limited at publishing."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from adapters_store import RETIRED_BYTES, AdapterBundle, AdapterStore, Held
from adapters_store.counting import HeldCounter
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, Holdings, QuotaExceeded, Quotas
from sera_serve.base import FrozenBase
from support.factories import random_adapter, random_decoder
from support.live_server import wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def bundles(base: FrozenBase) -> list[AdapterBundle]:
    return [random_adapter(base, SeraConfig(2, 1, 4, ("q_proj",)), seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def limited(store: AdapterStore, clock: Clock | None = None, **limits: int) -> Holdings:
    quotas = Quotas(AccessDatabase(store.root), {"acme": limits})
    return Holdings(store, quotas, clock or Clock())


def publish(holdings: Holdings, store: AdapterStore, bundle: AdapterBundle, name: str) -> None:
    added = holdings.check_publish(name, bundle.digest, bundle.file_bytes)
    store.publish(bundle, name)
    holdings.note_published(name, added)


def test_the_store_counts_every_version(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    assert store.held("acme") == Held()
    size = bundles[0].file_bytes
    store.publish(bundles[0], "acme/a")
    store.publish(bundles[1], "acme/a")
    store.publish(bundles[0], "acme/b")
    store.publish(bundles[2], "acme2/a")
    assert store.held("acme") == Held(2, 3 * size)
    # Content that the adapter already has is no new version.
    store.publish(bundles[0], "acme/a")
    assert store.held("acme") == Held(2, 3 * size)
    # Another process deletes.
    AdapterStore(store.root).delete("acme/a@v1")
    assert store.held("acme") == Held(2, 2 * size)
    AdapterStore(store.root).delete("acme/b")
    assert store.held("acme") == AdapterStore(store.root).held("acme") == Held(1, size + RETIRED_BYTES)


def test_a_deleted_adapter_counts_its_record_until_it_is_back(
    store: AdapterStore, bundles: list[AdapterBundle]
) -> None:
    size = bundles[0].file_bytes
    holdings = limited(store, bytes=size + 3 * RETIRED_BYTES)
    # Publications and deletions without end would leave files without end.
    for number in range(3):
        publish(holdings, store, bundles[0], f"acme/n{number}")
        store.delete(f"acme/n{number}")
        holdings.note_deleted(f"acme/n{number}")
    store.publish(bundles[0], "acme2/n0")
    store.delete("acme2/n0")
    assert store.held("acme") == AdapterStore(store.root).held("acme") == Held(0, 3 * RETIRED_BYTES)
    publish(holdings, store, bundles[0], "acme/n3")
    store.delete("acme/n3")
    holdings.note_deleted("acme/n3")
    with pytest.raises(QuotaExceeded, match="name of each deleted adapter counts 4096") as refusal:
        publish(holdings, store, bundles[0], "acme/n4")
    assert refusal.value.param == "bundle"
    # A deleted version of an adapter that is there counts nothing, as before.
    for bundle in bundles[:2]:
        store.publish(bundle, "acme/n0")
    store.delete("acme/n0@v2")
    assert store.held("acme") == Held(1, size + 3 * RETIRED_BYTES)


def test_only_what_has_changed_is_read_again(
    store: AdapterStore, bundles: list[AdapterBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        store.publish(bundles[0], f"acme/{name}")
    read: list[str] = []
    count = HeldCounter._sizes
    monkeypatch.setattr(HeldCounter, "_sizes", lambda self, adapter: read.append(adapter) or count(self, adapter))
    # Changes within a tick of the file system's clock cannot be told apart: settled is what is older.
    monkeypatch.setattr("adapters_store.backends.adapter_directory._TICK_NS", 0)
    assert store.held("acme").adapters == 3
    read.clear()
    assert store.held("acme").adapters == 3
    assert read == []
    store.publish(bundles[1], "acme/b")
    assert store.held("acme") == Held(3, 4 * bundles[0].file_bytes)
    assert read == ["acme/b"]


def test_a_count_during_which_something_was_deleted_refuses_once(
    store: AdapterStore, bundles: list[AdapterBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    holdings = limited(store, adapters=2)
    for name in "ab":
        publish(holdings, store, bundles[0], f"acme/{name}")
    holdings.note_deleted("acme/gone")
    held = store.held

    def then_deleted(tenant: str) -> Held:
        found = held(tenant)
        store.delete("acme/a")
        holdings.note_deleted("acme/a")
        return found

    with monkeypatch.context() as patch, pytest.raises(QuotaExceeded):
        patch.setattr(store, "held", then_deleted)
        publish(holdings, store, bundles[0], "acme/c")
    publish(holdings, store, bundles[0], "acme/c")


def test_an_adapter_too_many_is_refused(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    holdings = limited(store, adapters=2)
    publish(holdings, store, bundles[0], "acme/a")
    publish(holdings, store, bundles[0], "acme/b")
    with pytest.raises(QuotaExceeded, match="has 2 adapters, and may have 2") as refused:
        publish(holdings, store, bundles[0], "acme/c")
    assert (refused.value.status, refused.value.code, refused.value.param) == (403, "quota_exceeded", "name")
    # New versions, and other tenants, are another matter.
    publish(holdings, store, bundles[1], "acme/a")
    publish(holdings, store, bundles[0], "zoo/c")


def test_bytes_too_many_are_refused_and_known_content_adds_none(
    store: AdapterStore, bundles: list[AdapterBundle]
) -> None:
    size = bundles[0].file_bytes
    holdings = limited(store, bytes=2 * size + 1)
    publish(holdings, store, bundles[0], "acme/a")
    publish(holdings, store, bundles[1], "acme/a")
    with pytest.raises(QuotaExceeded, match=f"has {2 * size} bytes") as refused:
        publish(holdings, store, bundles[2], "acme/a")
    assert refused.value.param == "bundle"
    publish(holdings, store, bundles[0], "acme/a")
    assert store.held("acme") == Held(1, 2 * size)


def test_the_configuration_counts(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    holdings = limited(store, bytes=200_000)
    config = bundles[0].config.model_copy(update={"training": {"description": "\u4e00" * 100_000}})
    with pytest.raises(QuotaExceeded, match="has 0 bytes of adapters, this one has 3"):
        publish(holdings, store, AdapterBundle(config, bundles[0].tensors), "acme/a")
    store.publish(AdapterBundle(config, bundles[0].tensors), "acme/a")
    file = store.root / "bundles" / f"{store.resolve('acme/a').digest}.safetensors"
    assert store.held("acme") == Held(1, file.stat().st_size)
    # What an adapter shows are its tensors.
    assert store.summary("acme/a").nbytes == bundles[0].nbytes
    with pytest.raises(QuotaExceeded):
        publish(limited(store, bytes=200_000), store, bundles[1], "acme/b")


def test_a_restart_forgets_nothing(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    publish(limited(store, adapters=1), store, bundles[0], "acme/a")
    with pytest.raises(QuotaExceeded):
        publish(limited(AdapterStore(store.root), adapters=1), store, bundles[0], "acme/b")


def test_what_was_deleted_makes_room_at_once(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    holdings = limited(store, adapters=1)
    publish(holdings, store, bundles[0], "acme/a")
    with pytest.raises(QuotaExceeded):
        publish(holdings, store, bundles[0], "acme/b")
    store.delete("acme/a")
    holdings.note_deleted("acme/a")
    publish(holdings, store, bundles[0], "acme/b")


def test_a_refusal_sees_what_commands_deleted_a_second_ago(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    clock = Clock()
    holdings = limited(store, clock, adapters=1)
    publish(holdings, store, bundles[0], "acme/a")
    AdapterStore(store.root).delete("acme/a")
    clock.now += 1.1
    publish(holdings, store, bundles[0], "acme/b")


def test_an_old_count_is_renewed_beside_the_publication(store: AdapterStore, bundles: list[AdapterBundle]) -> None:
    clock = Clock()
    holdings = limited(store, clock, adapters=4)
    publish(holdings, store, bundles[0], "acme/a")
    other = AdapterStore(store.root)
    for name in "bcd":
        other.publish(bundles[0], f"acme/{name}")
    clock.now += 10
    # The count of before allows this one, and another one begins.
    holdings.check_publish("acme/e", bundles[0].digest, bundles[0].file_bytes)

    def is_refused() -> bool:
        try:
            holdings.check_publish("acme/e", bundles[0].digest, bundles[0].file_bytes)
        except QuotaExceeded:
            return True
        return False

    wait_until(is_refused)


def test_the_store_is_counted_no_more_often_than_it_must(
    store: AdapterStore, bundles: list[AdapterBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A count reads what all processes have changed, and the publishing thread serves every tenant.
    clock, held, gate = Clock(), store.held, threading.Event()
    counts: list[float] = []

    def counted(tenant: str) -> Held:
        counts.append(clock.now)
        assert gate.wait(20)
        return held(tenant)

    def asks(holdings: Holdings) -> None:
        holdings.check_publish("acme/b", bundles[1].digest, bundles[1].file_bytes)

    def is_counted() -> bool:
        return not any(thread.name == "holdings" for thread in threading.enumerate())

    monkeypatch.setattr(store, "held", counted)
    gate.set()
    full = limited(store, clock, adapters=1)
    publish(full, store, bundles[0], "acme/a")
    for _ in range(2):
        with pytest.raises(QuotaExceeded):
            asks(full)
        clock.now += 1.0
    assert counts == [1000.0], "a refusal may be by a count of a second"
    free = limited(store, clock, adapters=4)
    asks(free)
    clock.now += 5.0
    asks(free)
    wait_until(is_counted)
    assert counts == [1000.0, 1002.0], "a count of five seconds is not old"
    gate.clear()
    clock.now += 0.1
    for _ in range(3):
        asks(free)
    gate.set()
    wait_until(is_counted)
    assert counts == [1000.0, 1002.0, 1007.1], "one count at a time"


def test_a_count_beside_a_publication_that_the_disk_refuses_is_made_again(
    store: AdapterStore, bundles: list[AdapterBundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    holdings = limited(store, clock, adapters=2)
    publish(holdings, store, bundles[0], "acme/a")
    refused = threading.Event()

    def refuse(tenant: str) -> Held:
        monkeypatch.undo()
        refused.set()
        raise PermissionError(errno.EACCES, "Permission denied", "versions")

    monkeypatch.setattr(store, "held", refuse)
    clock.now += 10
    holdings.check_publish("acme/b", bundles[1].digest, bundles[1].file_bytes)
    assert refused.wait(10)
    wait_until(lambda: "what tenant acme holds cannot be counted" in caplog.text)
    AdapterStore(store.root).publish(bundles[2], "acme/c")
    with pytest.raises(QuotaExceeded, match="has 2 adapters"):
        holdings.check_publish("acme/b", bundles[1].digest, bundles[1].file_bytes)


def test_a_damaged_record_counts_as_the_largest_other_version(
    store: AdapterStore,
    base: FrozenBase,
    bundles: list[AdapterBundle],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every stamp is settled.
    monkeypatch.setattr("adapters_store.backends.adapter_directory._TICK_NS", 0)
    large = random_adapter(base, SeraConfig(8, 1, 8, ("q_proj",)), 9)
    small, large_size = bundles[0].file_bytes, large.file_bytes
    assert large_size > small
    store.publish(bundles[0], "acme/a")
    store.publish(large, "acme/b")
    record = store.root / "adapters" / "acme" / "a" / "versions" / "v1.json"
    record.write_bytes(b"")
    # As after a restart: a count that was made before stays.
    store = AdapterStore(store.root)
    for _ in range(2):
        assert store.held("acme") == Held(2, 2 * large_size)
    assert len(caplog.records) == 1 and "acme/a is counted with an unknown size" in caplog.text
    # No quota is passed by, and the tenant may go on within its quota.
    holdings = limited(store, adapters=2)
    with pytest.raises(QuotaExceeded, match="has 2 adapters"):
        publish(holdings, store, bundles[1], "acme/c")
    publish(holdings, store, bundles[1], "acme/b")
    store.delete("acme/a")
    holdings.note_deleted("acme/a")
    publish(holdings, store, bundles[2], "acme/c")
    # A file that is restored in place is read again.
    other = AdapterStore(store.root)
    other.publish(bundles[0], "acme2/a")
    record = store.root / "adapters" / "acme2" / "a" / "versions" / "v1.json"
    whole = record.read_bytes()
    record.write_bytes(b"")
    assert store.held("acme2") == Held(1, 0)
    record.write_bytes(whole)
    assert store.held("acme2") == Held(1, small)
