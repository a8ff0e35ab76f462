"""Quotas: which limits hold for a tenant, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters_store import AdapterStore
from sera_serve.access import AccessControl, AccessDatabase, PriorityNotAllowed, Quota, Quotas, TrainingQuotaExceeded
from sera_serve.cli import build_cli
from sera_serve.config import load_settings
from sera_serve.errors import InvalidConfiguration


@pytest.fixture
def database(tmp_path: Path) -> AccessDatabase:
    return AccessDatabase(AdapterStore(tmp_path / "store").root)


def test_the_first_source_of_each_limit_decides(database: AccessDatabase) -> None:
    file = {"*": {"adapters": 1, "bytes": 2, "training_jobs": 3}, "acme": {"bytes": 20, "training_jobs": 30}}
    quotas = Quotas(database, file)
    assert quotas.of("other") == Quota(adapters=1, bytes=2, training_jobs=3)
    assert quotas.of("acme") == Quota(adapters=1, bytes=20, training_jobs=30)
    quotas.set("*", {"adapters": 4, "bytes": 5})
    assert quotas.set("acme", {"training_jobs": 300}) == Quota(adapters=4, bytes=20, training_jobs=300)
    assert quotas.of("other") == Quota(adapters=4, bytes=5, training_jobs=3)
    assert quotas.tenants() == ["*", "acme"]


def test_none_is_no_limit_where_others_have_one(database: AccessDatabase) -> None:
    quotas = Quotas(database, {"*": {"adapters": 1}, "zoo": {"adapters": None}})
    quotas.set("acme", {"adapters": None})
    assert quotas.of("acme").adapters is quotas.of("zoo").adapters is None
    assert quotas.clear("acme")
    assert not quotas.clear("acme")
    with pytest.raises(InvalidConfiguration):
        quotas.clear("Acme")
    assert quotas.of("acme").adapters == 1


def test_limits_survive_a_restart_and_reach_other_processes(database: AccessDatabase) -> None:
    access = AccessControl(database)
    quotas = Quotas(database)
    access.on_change(quotas.refresh)
    # Another connection is as good as another process.
    elsewhere = AccessDatabase(database.path.parent.parent)
    Quotas(elsewhere).set("acme", {"requests_per_minute": 6, "max_priority": "low"})
    access.refresh()
    expected = Quota(requests_per_minute=6, max_priority="low")
    assert quotas.of("acme") == Quotas(database).of("acme") == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_priority", '"urgent"'), ("bytes", '"many"'), ("adapters", "-1"), ("adapters", "[]"), ("adapters", "{")],
)
def test_a_damaged_limit_does_not_count_and_is_told(
    database: AccessDatabase, caplog: pytest.LogCaptureFixture, field: str, value: str
) -> None:
    with database.writing() as connection:
        for row in (("acme", field, value), ("acme", "training_jobs", "3"), ("acme", "of_a_later_release", "{")):
            connection.execute("INSERT INTO quotas VALUES (?, ?, ?)", row)
    quotas = Quotas(database, {"*": {field: None}})
    assert quotas.of("acme") == Quota(training_jobs=3)
    assert quotas.priority("acme", "high") == "high"
    quotas.refresh()
    (record,) = caplog.records
    assert f"the limit {field} of 'acme' in the database cannot be {value!r}" in record.getMessage()


def test_a_file_that_is_read_again_replaces_the_one_before(database: AccessDatabase) -> None:
    quotas = Quotas(database, {"acme": {"adapters": 1}})
    quotas.set("acme", {"bytes": 5})
    quotas.reload({"*": {"adapters": 7}})
    assert quotas.of("acme") == Quota(adapters=7, bytes=5)


@pytest.mark.parametrize(
    ("tenant", "limits", "named"),
    [
        ("acme", {"request_per_minute": 1}, "request_per_minute"),
        ("acme", {"bytes": -1}, "bytes"),
        ("acme", {"bytes": 1 << 53}, "bytes"),
        ("acme", {"bytes": 1.5}, "bytes"),
        ("acme", {"bytes": True}, "bytes"),
        ("acme", {"bytes": "9"}, "bytes"),
        ("acme", {"max_priority": "highest"}, "max_priority"),
        ("acme/x", {"bytes": 1}, "tenant"),
        ("", {"bytes": 1}, "tenant"),
    ],
)
def test_a_wrong_limit_is_refused_by_name(
    database: AccessDatabase, tenant: str, limits: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidConfiguration) as refused:
        Quotas(database).set(tenant, limits)
    assert refused.value.param == named
    assert not database.path.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("quotas: {acme: {bytes: many}}", ("acme", "bytes")),
        ("quotas: {acme: 5}", ("acme", "mapping")),
        ("quotas: [acme]", ("quotas", "mapping")),
        ("quotas: {acme: {speed: 5}}", ("acme", "speed", "requests_per_minute")),
        ("quotas: {Acme: {bytes: 5}}", ("Acme", "tenant")),
        ("quotas: {5: {bytes: 5}}", ("5", "tenant")),
    ],
)
def test_a_wrong_settings_file_names_tenant_and_limit(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(InvalidConfiguration) as refused:
        load_settings(file, {})
    assert all(word in refused.value.message for word in words)
    assert refused.value.param == "quotas"


def test_the_settings_file_has_quotas(tmp_path: Path, database: AccessDatabase) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text('quotas: {"*": {requests_per_minute: 60}, acme: {requests_per_minute: null, max_priority: high}}')
    quotas = Quotas(database, load_settings(file, {}).quotas)
    assert quotas.of("other") == Quota(requests_per_minute=60)
    assert quotas.of("acme") == Quota(max_priority="high")


def test_a_priority_has_a_ceiling(database: AccessDatabase) -> None:
    quotas = Quotas(database, {"low": {"max_priority": "low"}, "high": {"max_priority": "high"}})
    assert [quotas.priority(tenant, None) for tenant in ("low", "high", "other")] == ["low", "normal", "normal"]
    assert [quotas.priority(tenant, "high") for tenant in ("high", "other")] == ["high", "high"]
    assert quotas.priority("low", "low") == "low"
    with pytest.raises(PriorityNotAllowed, match="'low' at most"):
        quotas.priority("low", "normal")


def test_training_jobs_have_a_limit(database: AccessDatabase) -> None:
    quotas = Quotas(database, {"acme": {"training_jobs": 2}})
    quotas.check_training_jobs("acme", 1)
    quotas.check_training_jobs("other", 100)
    with pytest.raises(TrainingQuotaExceeded) as refused:
        quotas.check_training_jobs("acme", 2)
    assert (refused.value.status, refused.value.code) == (429, "quota_exceeded")


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(build_cli(), ["quotas", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_commands_set_show_and_clear(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run("set", "--store", store, "--tenant", "acme", "bytes=10", "max_priority=low", "adapters=none")
    run("set", "--store", store, "--tenant", "*", "adapters=3")
    listed: Mapping[str, Any] = json.loads(run("show", "--store", store, "--json"))
    assert [quota["tenant"] for quota in listed["quotas"]] == ["*", "acme"]
    own = json.loads(run("show", "--store", store, "--tenant", "acme", "--json"))["quotas"][0]
    assert own["limits"] == asdict(Quota(bytes=10, max_priority="low"))
    assert own["usage"] == {"adapters": 0, "bytes": 0}
    assert "acme" in run("show", "--store", store)
    assert json.loads(run("clear", "--store", store, "--tenant", "acme", "--json")) == {
        "tenant": "acme",
        "cleared": True,
    }
    assert json.loads(run("show", "--store", store, "--json"))["quotas"][0]["tenant"] == "*"
    audit = [json.loads(line) for line in (tmp_path / "store/access/audit.jsonl").read_text().splitlines()]
    assert [(line["action"], line["tenant"]) for line in audit] == [
        ("quota.set", "acme"),
        ("quota.set", "*"),
        ("quota.clear", "acme"),
    ]
    assert (audit[0]["bytes"], audit[0]["max_priority"], audit[0]["adapters"]) == (10, "low", None)


@pytest.mark.parametrize("limit", ["bytes", "bytes=", "bytes=-1", "bytes=1e3", "speed=1", "max_priority=top", "=1"])
def test_a_command_refuses_what_is_no_limit(tmp_path: Path, limit: str) -> None:
    run("set", "--store", str(tmp_path / "store"), "--tenant", "acme", limit, status=1)
    assert not (tmp_path / "store/access").exists()


@pytest.mark.parametrize("field", ["bytes", "max_priority"])
def test_a_refusal_says_how_a_command_names_no_limit(tmp_path: Path, field: str) -> None:
    arguments = ("set", "--store", str(tmp_path / "store"), "--tenant", "acme")
    assert "in a command: none" in run(*arguments, f"{field}=null", status=1)
    run(*arguments, f"{field}=none")


def test_a_command_sets_a_limit_once(tmp_path: Path) -> None:
    twice = ["adapters=1", "bytes=2", "adapters=3"]
    assert "adapters is given twice" in run("set", "--store", str(tmp_path / "s"), "--tenant", "acme", *twice, status=1)
    assert not (tmp_path / "s/access").exists()
