"""The database of keys and shares: what it keeps, who may read it, and what it refuses."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapters_store import STORE_MARK, AdapterStore
from adapters_store.errors import InvalidAdapterName
from sera_serve.access import (
    EVERYONE,
    SCOPES,
    AccessControl,
    AccessDatabase,
    AccessDatabaseError,
    KeyNotFound,
    Keys,
    QuotaExceeded,
    Quotas,
    Shares,
)
from sera_serve.access import shares as shares_module
from sera_serve.access.database import MIGRATIONS
from sera_serve.access.keys import is_secret_of, key_id_of
from sera_serve.errors import InvalidRequest
from sera_serve.jobs import JobPaths
from support.live_server import wait_until
from support.small_disk import fill_bytes, mounted, small_disk


@pytest.fixture
def database(tmp_path: Path) -> Iterator[AccessDatabase]:
    database = AccessDatabase(AdapterStore(tmp_path).root)
    yield database
    database.close()


def test_the_secret_is_nowhere_in_the_files(database: AccessDatabase) -> None:
    keys = Keys(database)
    made = [keys.create("acme", ["infer"], name="one") for _ in range(20)]
    assert len({one.secret for one in made}) == len({one.key.id for one in made}) == 20
    content = b"".join(path.read_bytes() for path in database.path.parent.iterdir())
    for one in made:
        assert one.key.id.encode() in content
        random = one.secret.removeprefix(f"sk-sera-{one.key.id}-")
        assert len(random) >= 43 and random.encode() not in content
        assert key_id_of(one.secret) == one.key.id
        assert is_secret_of(one.secret, one.key) and not is_secret_of(one.secret + "x", one.key)
        assert not is_secret_of(one.secret, None)
    assert database.path.stat().st_mode & 0o777 == 0o600
    assert database.path.parent.stat().st_mode & 0o777 == 0o700


def test_keys_are_listed_revoked_and_expire(database: AccessDatabase) -> None:
    keys = Keys(database)
    assert keys.all() == []
    first = keys.create("acme", ["infer", "publish"]).key
    second = keys.create("zoo", ["admin"], lifetime_s=0.05).key
    assert [key.id for key in keys.all()] == [first.id, second.id]
    assert keys.all("acme") == [first] and keys.all("nobody") == []
    assert first.status == "active" and first.may("infer") and not first.may("train")
    assert all(second.may(scope) for scope in SCOPES)
    time.sleep(0.06)
    assert second.status == "expired"
    revoked = keys.revoke(first.id)
    assert revoked.status == "revoked" and keys.revoke(first.id) == revoked
    with pytest.raises(InvalidRequest):
        keys.create("acme", ["infer"], lifetime_s=0)
    with pytest.raises(KeyNotFound):
        keys.revoke("none")
    with pytest.raises(KeyNotFound):
        keys.revoke(second.id, "acme")
    assert keys.all("zoo")[0].revoked_at is None


@pytest.mark.parametrize("tenant", ["", "a/b", "..", "Acme", "_base", "*", "a" * 65])
def test_a_tenant_of_another_form_is_refused(database: AccessDatabase, tenant: str) -> None:
    with pytest.raises(InvalidAdapterName):
        Keys(database).create(tenant, ["infer"])
    assert not database.path.exists()


@pytest.mark.parametrize(("scopes", "word"), [([], "at least one"), (["root"], "'root'"), (["infer", ""], "''")])
def test_scopes_are_those_that_exist(database: AccessDatabase, scopes: list[str], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as caught:
        Keys(database).create("acme", scopes)
    assert caught.value.param == "scopes" and "infer, publish, train, admin" in caught.value.message


def test_shares_are_kept_by_adapter(database: AccessDatabase) -> None:
    shares = Shares(database)
    shares.add("acme/x", "zoo")
    shares.add("acme/x", "zoo")
    shares.add("acme/x", EVERYONE)
    shares.add("acme/y", "zoo")
    assert shares.of("acme/x") == ["*", "zoo"]
    assert shares.all() == {"acme/x": {"*", "zoo"}, "acme/y": {"zoo"}}
    assert shares.remove("acme/x", "zoo") and not shares.remove("acme/x", "zoo")
    shares.remove_all("acme/x")
    assert shares.of("acme/x") == [] and shares.of("acme/y") == ["zoo"]
    for adapter, tenant in (("acme/x", "acme"), ("acme/x", "A"), ("acme", "zoo"), ("acme/x@v1", "zoo")):
        with pytest.raises((InvalidRequest, InvalidAdapterName)):
            shares.add(adapter, tenant)


def test_changes_of_another_process_are_seen_in_time(tmp_path: Path) -> None:
    control = AccessControl(AccessDatabase(AdapterStore(tmp_path).root))
    heard: list[float] = []
    control.on_change(lambda: heard.append(time.monotonic()))
    control.start()
    other = AccessDatabase(AdapterStore(tmp_path).root)
    try:
        assert not control.needs_keys and control.key_of("sk-sera-x") is None
        made = Keys(other).create("acme", ["infer"])
        began = time.monotonic()
        wait_until(lambda: control.needs_keys, 2)
        assert time.monotonic() - began < 0.75
        found = control.key_of(made.secret)
        assert found is not None and found.status == "active"
        Keys(other).revoke(made.key.id)
        wait_until(lambda: (key := control.key_of(made.secret)) is not None and key.status == "revoked", 2)
        Shares(other).add("acme/x", "zoo")
        Shares(other).add("other/y", EVERYONE)
        wait_until(lambda: control.may_use("zoo", "other/y"), 2)
        assert control.shared_with("zoo") == ["acme/x", "other/y"]
        assert control.shared_with("zoo", after="acme/x") == ["other/y"]
        assert control.shared_with("other") == [] and control.shared_with("third") == ["other/y"]
        assert control.may_use("acme", "acme/none") and not control.may_use("third", "acme/x")
        assert len(heard) >= 3
        # Nothing is read again where nothing has changed.
        count = len(heard)
        time.sleep(0.6)
        assert len(heard) == count
    finally:
        control.stop()
        other.close()


def test_a_commit_that_meets_a_reader_is_taken_back(database: AccessDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.access.database._BUSY_SECONDS", 0.1)
    keys = Keys(database)
    kept, other = keys.create("acme", ["infer"]).key, keys.create("bob", ["infer"]).key
    # As a backup, or a shell of SQLite, that reads for longer than a writer waits.
    reader = sqlite3.connect(database.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM keys").fetchall()
    with pytest.raises(AccessDatabaseError, match="locked"):
        keys.revoke(kept.id)
    reader.execute("COMMIT")
    reader.close()
    assert [key.status for key in keys.all()] == ["active", "active"]
    assert Keys(AccessDatabase(database.path.parents[1])).revoke(other.id).status == "revoked"
    assert keys.revoke(kept.id).status == "revoked"
    assert [key.status for key in keys.all()] == ["revoked", "revoked"]


def test_a_listener_that_failed_is_called_again(database: AccessDatabase) -> None:
    control = AccessControl(database)
    heard: list[int] = []

    def listen() -> None:
        heard.append(len(heard))
        if len(heard) == 1:
            raise AccessDatabaseError("the database is locked")

    control.on_change(listen)
    made = Keys(database).create("acme", ["infer"])
    with pytest.raises(AccessDatabaseError):
        control.refresh()
    # What was read is there already.
    assert control.key_of(made.secret) is not None
    control.refresh()
    control.refresh()
    assert heard == [0, 1]


def test_what_jobs_write_lets_no_server_read_its_keys_again(
    tmp_path: Path, database: AccessDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = AccessControl(database)
    heard: list[int] = []
    control.on_change(lambda: heard.append(len(control._view.keys)))
    other = AccessDatabase(database.path.parents[1])
    made = Keys(other).create("acme", ["infer"])
    control.refresh()
    assert heard == [1]
    view = control._view
    with other.writing() as connection:
        connection.execute("INSERT INTO deleted_items (id, tenant, number) VALUES ('file-1', 'acme', 1)")
    with database.writing() as connection:
        connection.execute("INSERT INTO deleted_items (id, tenant, number) VALUES ('file-2', 'acme', 2)")
    control.refresh()
    assert control._view is view and heard == [1]
    changes: list[Callable[[], object]] = [
        lambda: Keys(other).revoke(made.key.id),
        lambda: Shares(other).add("acme/x", "zoo"),
        lambda: Shares(database).remove("acme/x", "zoo"),
        lambda: Quotas(other).set("acme", {"adapters": 3}),
        lambda: Quotas(other).set("acme", {"adapters": 4}),
        lambda: Quotas(other).clear("acme"),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        control.refresh()
        assert len(heard) == count, count
        assert control._view is not view
        view = control._view


def test_an_older_file_keeps_its_keys_and_counts_their_changes(tmp_path: Path) -> None:
    root = AdapterStore(tmp_path / "store").root
    old = AccessDatabase(root)
    old.path.parent.mkdir()
    with closing(sqlite3.connect(old.path)) as connection:
        for script in MIGRATIONS[:6]:
            connection.executescript(script)
        connection.execute("PRAGMA user_version = 6")
        connection.execute("INSERT INTO keys VALUES ('0a', 'acme', 'infer', 'hash', 'old', 1.0, NULL, NULL)")
        connection.commit()
        # A server of the older release that still runs.
        control = AccessControl(old)
        assert [key.name for key in control.keys.all()] == ["old"]
        connection.execute("UPDATE keys SET revoked_at = 2.0")
        connection.commit()
    control.refresh()
    assert [key.status for key in control._view.keys.values()] == ["revoked"]


def test_a_file_that_was_restored_is_read_and_written(tmp_path: Path) -> None:
    by_commands = Keys(AccessDatabase(AdapterStore(tmp_path).root))
    old = by_commands.create("acme", ["infer"])
    backup = tmp_path / "backup"
    database = AccessDatabase(AdapterStore(tmp_path).root)
    shutil.copy(database.path, backup)
    control = AccessControl(database)
    control.start()
    try:
        later = by_commands.create("acme", ["infer"])
        wait_until(lambda: control.key_of(later.secret) is not None)
        backup.replace(database.path)
        wait_until(lambda: control.key_of(later.secret) is None)
        assert control.key_of(old.secret) is not None
        # Both processes now have the same file.
        made = control.keys.create("acme", ["infer"])
        assert {key.id for key in by_commands.all()} == {old.key.id, made.key.id}
        by_commands.revoke(old.key.id)
        wait_until(lambda: (key := control.key_of(old.secret)) is not None and key.status == "revoked")
        # A store that is not there for a while: what was read stays.
        database.path.rename(backup)
        time.sleep(0.6)
        with pytest.raises(AccessDatabaseError):
            control.refresh()
        assert control.key_of(made.secret) is not None
        backup.rename(database.path)
        control.refresh()
    finally:
        control.stop()


def test_a_damaged_file_is_refused_by_name(database: AccessDatabase) -> None:
    Keys(database).create("acme", ["infer"])
    database.close()
    database.path.write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(AccessDatabaseError, match=r"access\.sqlite3") as caught:
        AccessControl(database)
    assert caught.value.param == "store" and caught.value.status == 503


def test_a_file_of_a_newer_release_is_refused(database: AccessDatabase) -> None:
    Keys(database).create("acme", ["infer"])
    database.close()
    with sqlite3.connect(database.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(AccessDatabaseError, match="newer release"):
        AccessControl(database)


def test_a_file_that_another_process_keeps_locked_is_no_fault_of_the_disk(
    database: AccessDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sera_serve.access.database._BUSY_SECONDS", 0.05)
    Keys(database).create("acme", ["infer"])
    database.close()
    with closing(sqlite3.connect(database.path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(AccessDatabaseError, match=r"\(database is locked\); try again, and end the process"):
            Keys(database).create("acme", ["infer"])
    Keys(database).create("acme", ["infer"])


def test_a_database_that_nobody_holds_closes_its_connections(tmp_path: Path) -> None:
    database = AccessDatabase(AdapterStore(tmp_path).root)
    with database.reading() as tables_in_memory:
        pass
    Keys(database).create("acme", ["infer"])
    with database.reading() as file:
        pass
    assert file is not tables_in_memory
    del database
    for connection in (tables_in_memory, file):
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")


def test_an_empty_file_holds_no_keys(database: AccessDatabase) -> None:
    """A full disk may have taken the file and nothing of its content."""
    database.path.parent.mkdir()
    database.path.touch()
    control = AccessControl(database)
    assert not control.needs_keys
    control.keys.create("acme", ["infer"])
    control.refresh()
    assert control.needs_keys


def test_a_full_disk_refuses_a_key_and_serves_the_others(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        control = AccessControl(AccessDatabase(AdapterStore(disk).root))
        fill_bytes(disk)
        with pytest.raises(AccessDatabaseError, match="check the disk"):
            control.keys.create("acme", ["infer"])
        control.refresh()
        assert not control.needs_keys
        (disk / "filler").unlink()
        made = control.keys.create("acme", ["infer"])
        control.refresh()
        fill_bytes(disk)
        with pytest.raises(AccessDatabaseError):
            for _ in range(1000):
                control.keys.create("acme", ["infer"], name="x" * 100)
        control.refresh()
        assert control.key_of(made.secret) == made.key
        control.stop()


def test_shares_are_bounded(database: AccessDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "MAX_SHARES", 3)
    monkeypatch.setattr(shares_module, "MAX_SHARES_OF_TENANT", 5)
    shares = Shares(database)
    for number in range(3):
        shares.add("acme/one", f"t{number}")
    with pytest.raises(QuotaExceeded, match=r"acme/one has 3 shares, .*; end some: one with '\*' is for all"):
        shares.add("acme/one", "t3")
    shares.add("acme/one", "t0")
    assert shares.of("acme/one") == ["t0", "t1", "t2"]
    for number in range(2):
        shares.add("acme/two", f"t{number}")
    with pytest.raises(QuotaExceeded, match="acme has 5 shares"):
        shares.add("acme/three", "t0")
    # Neighbours of the name are other tenants.
    for adapter in ("acm/one", "acme-b/one", "acme0/one"):
        shares.add(adapter, "t0")
    shares.remove("acme/one", "t2")
    shares.add("acme/three", "t0")


def test_nothing_is_written_where_the_store_is_not_there(tmp_path: Path) -> None:
    """Below the mount of a store is an empty directory: a key that is written there is lost."""
    root = AdapterStore(tmp_path / "store").root
    control, paths = AccessControl(AccessDatabase(root)), JobPaths(root)
    mark = root / STORE_MARK
    mark.rename(tmp_path / "away")
    with pytest.raises(AccessDatabaseError, match="No such file"):
        control.keys.create("acme", ["infer"])
    with pytest.raises(FileNotFoundError):
        paths.make()
    assert not (root / "access").exists() and not (root / "jobs").exists()
    (tmp_path / "away").rename(mark)
    made = control.keys.create("acme", ["infer"])
    control.refresh()
    assert control.key_of(made.secret) == made.key
    paths.make()


def test_a_disk_that_becomes_writable_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = AdapterStore(tmp_path / "store").root
    made = Keys(AccessDatabase(root)).create("acme", ["infer"])
    access, is_writable = os.access, False
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (is_writable or mode != os.W_OK))
    keys = Keys(AccessDatabase(root))
    assert [key.id for key in keys.all()] == [made.key.id]
    with pytest.raises(AccessDatabaseError, match="readonly"):
        keys.create("acme", ["infer"])
    is_writable = True
    assert len({keys.create("acme", ["infer"]).key.id, made.key.id, *(key.id for key in keys.all())}) == 2


def test_an_older_file_on_a_read_only_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = AccessDatabase(AdapterStore(tmp_path / "store").root)
    Keys(database).create("acme", ["infer"])
    database.close()
    with closing(sqlite3.connect(database.path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and mode != os.W_OK)
    with pytest.raises(AccessDatabaseError, match="older release, and cannot be written here; run `sera-serve"):
        Keys(database).all()


def test_a_fault_in_the_tables_ends_no_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = AdapterStore(tmp_path / "store").root
    database = AccessDatabase(root)
    made = Keys(database).create("acme", ["infer"])
    control = AccessControl(AccessDatabase(root))
    quotas = Quotas(control.database)
    control.on_change(quotas.refresh)
    failing = [ZeroDivisionError("a listener's own fault")]
    control.on_change(lambda: failing and (_ for _ in ()).throw(failing[0]))
    control.start()
    with database.writing() as connection:
        connection.execute("INSERT INTO quotas (tenant, field, value) VALUES ('acme', 'max_priority', 'high')")
    wait_until(lambda: "max_priority of 'acme'" in caplog.text and "cannot be read" in caplog.text)
    assert quotas.of("acme").max_priority is None
    Keys(database).revoke(made.key.id)
    wait_until(lambda: control._view.keys[made.key.id].status == "revoked")
    assert "can be read again" not in caplog.text
    caplog.set_level("INFO", "sera_serve.access")
    failing.clear()
    with database.writing() as connection:
        connection.execute("DELETE FROM quotas")
    wait_until(lambda: "can be read again" in caplog.text)
    control.stop()


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with small_disk(tmp_path / "disk") as disk:
        database = AccessDatabase(AdapterStore(disk).root)
        with mounted(tmp_path / "store", "--bind", str(disk)) as store:
            control = AccessControl(AccessDatabase(store))
            assert not control.needs_keys
            made = Keys(database).create("acme", ["infer"])
            Keys(database).create("acme", ["infer"])
            database.close()
            with mounted(tmp_path / "store", "-o", "remount,ro,bind"):
                control.refresh()
                assert control.needs_keys and control.key_of(made.secret) == made.key
                with pytest.raises(AccessDatabaseError):
                    control.keys.create("acme", ["infer"])
                control.refresh()
                assert control.key_of(made.secret) == made.key
                empty = AccessDatabase(store / "none")
                with pytest.raises(AccessDatabaseError):
                    Keys(empty).create("acme", ["infer"])
                control.stop()
