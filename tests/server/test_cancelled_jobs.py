"""A job that is cancelled after its process has published: the adapter goes as by `DELETE /v1/adapters`."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import AccessDatabase, Shares
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine
from support.training import STORIES, jsonl

JOBS = "/v1/fine_tuning/jobs"


def audited(store: AdapterStore, action: str) -> list[dict[str, object]]:
    lines = (store.root / "access" / "audit.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["action"] == action]


def published_by_a_job(url: str, store: AdapterStore, base: FrozenBase, writer: AdapterBundle, digest: str) -> str:
    """Publish an adapter of a job, as its process does that is killed before it tells its result. Cancels the job.

    `digest` is what the process has noted.
    """
    with httpx.Client(base_url=url, timeout=30) as client:
        file = client.post("/v1/files", files={"file": ("a", jsonl(STORIES))}, data={"purpose": "fine-tune"}).json()
        body = {"model": base.name, "training_file": file["id"], "adapter": {"tenant": "acme"}}
        made = client.post(JOBS, json=body).json()
        name = str(made["adapter"]["name"])
        run = store.root / "jobs" / "runs" / made["id"]
        run.mkdir()
        (run / "publishing.json").write_text(json.dumps({"name": name, "digest": digest}))
        store.publish(writer, name)
        Shares(AccessDatabase(store.root)).add(name, "beta")
        assert client.post(f"{JOBS}/{made['id']}/cancel").json()["status"] == "cancelled"
        wait_until(lambda: not run.exists())
    return name


def test_the_adapter_of_a_cancelled_job_goes_as_by_a_request(
    base: FrozenBase, writer: AdapterBundle, tmp_path: Path
) -> None:
    store, engine = AdapterStore(tmp_path / "store"), StubEngine(base)
    # The jobs wait: no process is started.
    with live_server(build_app(engine, store, ServeSettings(store=store.root, max_training_jobs=0))) as url:
        name = published_by_a_job(url, store, base, writer, writer.digest)
        assert store.count_adapters() == 0
        assert engine.deleted == [writer.digest] and engine.dropped == 1
        assert Shares(AccessDatabase(store.root)).of(name) == []
        (entry,) = audited(store, "adapter.delete")
        assert (entry["target"], entry["source"], entry["tenant"]) == (name, "job", "acme")


def test_what_somebody_else_has_published_by_then_stays(
    base: FrozenBase, writer: AdapterBundle, tmp_path: Path
) -> None:
    store, engine = AdapterStore(tmp_path / "store"), StubEngine(base)
    with live_server(build_app(engine, store, ServeSettings(store=store.root, max_training_jobs=0))) as url:
        name = published_by_a_job(url, store, base, writer, "0" * 64)
        assert store.count_adapters() == 1 and engine.deleted == []
        assert Shares(AccessDatabase(store.root)).of(name) == ["beta"]
