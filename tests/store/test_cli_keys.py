"""The commands `sera-serve keys`, and `adapters share`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import make_classifier
from click.testing import Result
from typer.testing import CliRunner

from adapters_store import AdapterStore
from sera_serve.access import AccessDatabase, Keys, Shares
from sera_serve.access.keys import is_secret_of
from sera_serve.cli import build_cli

Run = Callable[..., Result]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(root: Path) -> Run:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(build_cli(), [*map(str, arguments), "--store", str(root)])

    return invoke


def fields(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def kept(root: Path) -> list[Any]:
    database = AccessDatabase(root)
    try:
        return Keys(database).all()
    finally:
        database.close()


def log_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "access" / "audit.jsonl").read_text().splitlines()]


def test_create_list_revoke(run: Run, root: Path) -> None:
    made = fields(run("keys", "create", "--tenant", "acme", "--scopes", "publish, infer", "--expires", "90d", "--json"))
    assert set(made) == {"id", "tenant", "scopes", "name", "created_at", "expires_at", "status", "secret"}
    assert (made["tenant"], made["scopes"], made["status"]) == ("acme", ["infer", "publish"], "active")
    (key,) = kept(root)
    assert is_secret_of(made["secret"], key) and round(key.expires_at - key.created_at) == 90 * 86400
    secret = made.pop("secret")
    assert fields(run("keys", "list", "--json")) == {"keys": [made]}
    shown = run("keys", "create", "--tenant", "zoo", "--name", "[bold]x[/] for ants")
    assert shown.exit_code == 0
    last = shown.stdout.splitlines()[-1]
    assert last.startswith("sk-sera-") and is_secret_of(last, kept(root)[1])
    listed = run("keys", "list").stdout
    assert "[bold]x[/] for ants" in listed and "acme" in listed and "active" in listed and "sk-sera" not in listed
    assert [key["tenant"] for key in fields(run("keys", "list", "--tenant", "zoo", "--json"))["keys"]] == ["zoo"]
    assert fields(run("keys", "revoke", made["id"], "--json")) == made | {"status": "revoked"}
    assert f"revoked {made['id']} of tenant acme" in run("keys", "revoke", made["id"]).stdout
    lines = log_of(root)
    assert [line["action"] for line in lines] == ["key.create", "key.create", "key.revoke", "key.revoke"]
    assert {line["source"] for line in lines} == {"command"} and secret not in json.dumps(lines)


def test_a_narrow_terminal_cuts_no_key_and_no_limit(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fields(run("keys", "create", "--tenant", "acme", "--scopes", "infer,publish", "--expires", "90d", "--json"))
    assert run("quotas", "set", "--tenant", "acme", "requests_per_minute=600").exit_code == 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    listed, limits = run("keys", "list").stdout, run("quotas", "show").stdout
    assert made["id"] in listed and made["expires_at"] in listed and "infer, publish" in listed
    assert "requests_per_minute  600" in re.sub("\x1b\\[[0-9;]*m", "", limits)
    assert "\u2026" not in listed + limits
    assert max(map(len, (listed + limits).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    # Room for all columns: a row is a line.
    assert any(made["id"] in line and made["expires_at"] in line for line in run("keys", "list").stdout.splitlines())


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("12h", 43200), ("90d", 7776000)])
def test_lifetimes(run: Run, root: Path, text: str, seconds: int) -> None:
    run("keys", "create", "--tenant", "acme", "--expires", text)
    (key,) = kept(root)
    assert round(key.expires_at - key.created_at) == seconds


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tenant", "Acme"], ["tenant", "'Acme'"]),
        (["--tenant", "acme", "--scopes", "root"], ["'root'", "infer, publish, train, admin"]),
        (["--tenant", "acme", "--scopes", ","], ["at least one scope"]),
        (["--tenant", "acme", "--expires", "90"], ["--expires", "'90'", "90d"]),
        (["--tenant", "acme", "--expires", "0d"], ["--expires", "'0d'", "90d"]),
        (["--tenant", "acme", "--expires", "999999999d"], ["lifetime"]),
        (["--tenant", "acme", "--name", "x" * 101], ["name", "100"]),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(run: Run, root: Path, arguments: list[str], words: list[str]) -> None:
    result = run("keys", "create", *arguments)
    assert result.exit_code == 1 and result.stderr.startswith("sera-serve: ")
    assert len(result.stderr.splitlines()) == 1 and all(word in result.stderr for word in words), result.stderr
    assert not kept(root)


def test_what_does_not_exist_is_refused(run: Run, root: Path, tmp_path: Path) -> None:
    assert run("keys", "list").exit_code == 1
    AdapterStore(root)
    assert "sera-serve keys create" in run("keys", "list").stdout
    assert "there is no key 'none'" in run("keys", "revoke", "none").stderr
    # Bytes that are no text, as Python has them.
    assert r"there is no key '\udcff'" in run("keys", "revoke", "\udcff").stderr
    assert r"tenant is '\udcff'" in run("keys", "list", "--tenant", "\udcff").stderr
    run("keys", "create", "--tenant", "acme")
    assert "has no keys of tenant other;" in run("keys", "list", "--tenant", "other").stdout
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    wrong = CliRunner().invoke(build_cli(), ["keys", "create", "--tenant", "a", "--store", str(tmp_path / "other")])
    assert wrong.exit_code == 1 and "store" in wrong.stderr


def test_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(build_cli(), ["keys", "--help"], env={"COLUMNS": "200"}).output.split())
    for word in ("tenant", "loopback", "infer", "publish", "train", "admin", "create", "list", "revoke"):
        assert word in text
    text = CliRunner().invoke(build_cli(), ["keys", "create", "--help"], env={"COLUMNS": "200"}).output
    assert "--scopes infer,publish" in text and "90d" in text and "shows" not in text


def test_sharing_and_its_end(run: Run, root: Path) -> None:
    AdapterStore(root).publish(make_classifier(), "acme/x")
    assert fields(run("adapters", "share", "acme/x", "--with", "zoo", "--json")) == {
        "adapter": "acme/x",
        "shared_with": ["zoo"],
    }
    assert run("adapters", "share", "acme/x", "--with", "*").stdout == "acme/x: *, zoo\n"
    assert fields(run("adapters", "inspect", "acme/x", "--json"))["shared_with"] == ["*", "zoo"]
    assert "*, zoo" in run("adapters", "inspect", "acme/x").stdout
    assert run("adapters", "share", "acme/x", "--with", "zoo", "--remove").stdout == "acme/x: *\n"
    again = run("adapters", "share", "acme/x", "--with", "zoo", "--remove")
    assert again.exit_code == 1 and "not shared with zoo" in again.stderr
    for adapter, tenant, word in (
        ("acme/none", "zoo", "not in the store"),
        ("acme/x", "acme", "acme's own"),
        ("acme/x", "Zoo", "with"),
        ("acme/x@v1", "zoo", "'x@v1'"),
    ):
        result = run("adapters", "share", adapter, "--with", tenant)
        assert result.exit_code == 1 and word in result.stderr, result.stderr
    run("adapters", "delete", "acme/x")
    database = AccessDatabase(root)
    assert Shares(database).all() == {}
    database.close()
    actions = [line["action"] for line in log_of(root)]
    assert actions == ["share.add", "share.add", "share.remove", "adapter.delete"]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_fault_and_a_full_disk_is(run: Run, root: Path) -> None:
    fields(run("keys", "create", "--tenant", "acme", "--json"))
    listing = [sys.executable, "-c", "from sera_serve.cli import main; main()", "keys", "list", "--store", str(root)]
    for form in ([], ["--json"]):
        read, write = os.pipe()
        os.close(read)
        left = subprocess.run([*listing, *form], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
        os.close(write)
        assert (left.returncode, left.stderr) == (1, b"")
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(listing, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"sera-serve: No space left on device\n")
