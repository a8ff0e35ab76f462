"""The audit log: no line is lost or torn, whoever writes; and it fails nobody."""

from __future__ import annotations

import errno
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store import STORE_MARK, AdapterStore
from sera_serve.access import COMMAND, Actor, AuditLog
from support.small_disk import fill_bytes, small_disk

WRITERS, LINES = 4, 60


def test_lines_have_who_what_when_and_where(tmp_path: Path) -> None:
    log = AuditLog(AdapterStore(tmp_path).root)
    actor = Actor("http", "0123456789ab", "10.0.0.1", "req-1")
    log.record("alias.set", actor, tenant="acme", target="acme/x", alias="stable", version=3)
    log.record("key.create", COMMAND, tenant="ü", target="a\nb")
    log.close()
    first, second = (json.loads(line) for line in log.path.read_text("utf-8").splitlines())
    assert first.pop("at").endswith("Z")
    assert first == {
        "action": "alias.set",
        "tenant": "acme",
        "target": "acme/x",
        "source": "http",
        "key_id": "0123456789ab",
        "address": "10.0.0.1",
        "request_id": "req-1",
        "alias": "stable",
        "version": 3,
    }
    assert (second["tenant"], second["target"], second["source"], second["key_id"]) == ("ü", "a\nb", "command", None)
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_no_line_is_lost_where_several_write_and_begin_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writer has the file open on its own, as processes have: the lock is of the open file."""
    monkeypatch.setattr("sera_serve.access.audit._MEBIBYTE", 1 << 10)

    def write(writer: int) -> None:
        log = AuditLog(AdapterStore(tmp_path).root, max_mib=4, keep=100)
        for line in range(LINES):
            log.record("adapter.publish", COMMAND, tenant="acme", target=f"{writer}-{line}")
        log.close()

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    files = sorted((tmp_path / "access").glob("audit.jsonl*"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 5 << 10
    targets = [json.loads(line)["target"] for file in files for line in file.read_text().splitlines()]
    assert sorted(targets) == sorted(f"{writer}-{line}" for writer in range(WRITERS) for line in range(LINES))


def test_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.access.audit._MEBIBYTE", 1)
    log = AuditLog(AdapterStore(tmp_path).root, max_mib=1, keep=2)
    for line in range(9):
        log.record("job.create", COMMAND, tenant="acme", target=str(line))
    log.close()
    found = {file.name: json.loads(file.read_text())["target"] for file in (tmp_path / "access").glob("audit.jsonl*")}
    assert found == {"audit.jsonl": "8", "audit.jsonl.1": "7", "audit.jsonl.2": "6"}
    # A command begins no new file.
    command = AuditLog(AdapterStore(tmp_path).root, max_mib=0)
    command.record("job.create", COMMAND, tenant="acme", target="9")
    command.close()
    assert len(log.path.read_text().splitlines()) == 2


def test_a_failure_is_logged_with_the_line_and_raises_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "access").write_text("no folder")
    (tmp_path / "other" / "access" / "audit.jsonl").mkdir(parents=True)
    for store in (tmp_path, tmp_path / "other"):
        (store / STORE_MARK).touch()
    (tmp_path / "unmounted").mkdir()
    for store in (tmp_path, tmp_path / "other", tmp_path / "unmounted", tmp_path / "nowhere"):
        log = AuditLog(store)
        with caplog.at_level(logging.ERROR, "sera_serve.access"):
            log.record("key.revoke", COMMAND, tenant="acme", target="0123456789ab")
        log.close()
        assert "0123456789ab" in caplog.text and "cannot be written" in caplog.text
        caplog.clear()
    assert not list((tmp_path / "unmounted").iterdir())


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = AdapterStore(tmp_path / "store").root
    with small_disk(store / "access", mib=1) as disk:
        log = AuditLog(store)
        log.record("key.create", COMMAND, tenant="acme", target="before")
        fill_bytes(disk)
        for line in range(40):
            # Some lines still find room in the last block of the file.
            log.record("key.create", COMMAND, tenant="acme", target=f"full{line}", address_of="x" * 300)
        lost = [f"full{line}" for line in range(40) if f'"target": "full{line}"' in caplog.text]
        assert len(lost) > 20
        (disk / "filler").unlink()
        log.record("key.create", COMMAND, tenant="acme", target="after")
        log.close()
        targets = [json.loads(line)["target"] for line in log.path.read_text("utf-8").splitlines()]
    assert targets == ["before", *(f"full{line}" for line in range(40) if f"full{line}" not in lost), "after"]


@pytest.mark.parametrize("taken", [0, 30])
def test_a_refused_write_leaves_no_part_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, taken: int
) -> None:
    """The twin of the full disk. `taken` bytes of the line find room."""
    log = AuditLog(AdapterStore(tmp_path).root)
    log.record("key.create", COMMAND, tenant="acme", target="before")
    write, refused = os.write, list[int]()

    def full(descriptor: int, data: bytes) -> int:
        if b'"refused"' in data and taken:
            return write(descriptor, data[:taken])
        refused.append(len(data))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    log.record("key.create", COMMAND, tenant="acme", target="refused")
    monkeypatch.undo()
    assert refused and "refused" in caplog.text
    log.record("key.create", COMMAND, tenant="acme", target="\ud800 after")
    log.close()
    assert [json.loads(line)["target"] for line in log.path.read_text().splitlines()] == ["before", "\ud800 after"]
