"""What a job's process publishes, under the limits that hold when it publishes."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.errors import StoreWriteFailed
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, AccessDatabaseError, QuotaExceeded, Quotas, Shares
from sera_serve.jobs import Job, JobPaths, JobProcesses, JobSpec, worker
from sera_serve.jobs.process import LIMITS, read_limits
from sera_serve.jobs.worker import JobPublisher
from support.factories import random_adapter, random_decoder


@pytest.fixture(scope="module")
def bundle() -> AdapterBundle:
    return random_adapter(random_decoder(), SeraConfig(2, 1, 4, ("q_proj",)), 1)


def started(root: Path) -> tuple[AdapterStore, Quotas, JobPublisher]:
    store = AdapterStore(root / "store")
    run = root / "run"
    run.mkdir()
    database = AccessDatabase(store.root)
    quotas = Quotas(database)
    return store, quotas, JobPublisher(run, store, quotas, Shares(database))


def test_limits_that_were_set_while_the_job_trained_hold(bundle: AdapterBundle, tmp_path: Path) -> None:
    store, _, publisher = started(tmp_path)
    operator = Quotas(AccessDatabase(store.root))
    operator.set("eve", {"adapters": 0})
    with pytest.raises(QuotaExceeded):
        publisher.publish(bundle, "eve/job")
    operator.set("eve", {"adapters": 1})
    assert publisher.publish(bundle, "eve/job").version == 1


def test_a_settings_file_that_is_read_again_while_the_job_trains_holds(bundle: AdapterBundle, tmp_path: Path) -> None:
    store, _, publisher = started(tmp_path)
    server = Quotas(AccessDatabase(store.root), {"eve": {"adapters": 0}, "bob": {"adapters": 7}})
    processes = JobProcesses("base", store.root, "cpu", "auto", 1, 0.1, 1 << 20, server.of_settings)
    spec = JobSpec("base", "eve/job", "text", "classify", 1, 4, 1.0, 0, 12)
    job = Job(*("j", "eve", "running", spec, {}, "file-1", None, None), *[None] * 12)  # type: ignore[arg-type]
    run = processes.prepare(job, JobPaths(store.root))
    assert "bob" not in (run / LIMITS).read_text()
    publisher = JobPublisher(run, store, Quotas(AccessDatabase(store.root), read_limits(run)), publisher._shares)
    with pytest.raises(QuotaExceeded):
        publisher.publish(bundle, "eve/job")
    server.reload({"eve": {"adapters": 1}})
    processes.tell_limits(job, run)
    assert publisher.publish(bundle, "eve/job").version == 1


def test_a_busy_database_loses_no_training(
    bundle: AdapterBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, quotas, publisher = started(tmp_path)

    def busy() -> None:
        raise AccessDatabaseError("the database is locked")

    monkeypatch.setattr(quotas, "refresh", busy)
    assert publisher.publish(bundle, "eve/job").version == 1


REFUSALS = [
    AccessDatabaseError("the database is locked"),
    StoreWriteFailed("the disk is full", param="store"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: type(refusal).__name__)
def test_a_refusal_that_passes_loses_no_training(
    refusal: Exception, bundle: AdapterBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, publisher = started(tmp_path)
    monkeypatch.setattr(worker, "_RETRY_S", 0.0)
    of_kind = {AccessDatabaseError: (Shares, "remove_all"), StoreWriteFailed: (AdapterStore, "publish")}
    owner, name = of_kind.get(type(refusal), (worker, "write_json"))
    act, refusals = getattr(owner, name), [refusal] * 3

    def refused(*arguments: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return act(*arguments)

    monkeypatch.setattr(owner, name, refused)
    assert publisher.publish(bundle, "eve/job").version == 1
    assert store.inspect("eve/job").versions == (1,)
    refusals += [refusal] * 3
    monkeypatch.setattr(worker, "_PATIENCE_S", -1.0)
    with pytest.raises(type(refusal)):
        publisher.publish(bundle, "bob/job")


def test_a_first_version_begins_without_shares(bundle: AdapterBundle, tmp_path: Path) -> None:
    store, _, publisher = started(tmp_path)
    shares = Shares(AccessDatabase(store.root))
    shares.add("eve/job", "bob")
    publisher.publish(bundle, "eve/job")
    assert shares.of("eve/job") == []
