"""A database of keys, files and jobs that cannot be written or read: each route says so in the documented shape."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import AccessDatabase
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.answers import refused
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine
from support.tenants import bearer, make_key
from support.training import STORIES, jsonl

ROWS = {"file": ("a.jsonl", jsonl(STORIES))}
KEY = {"tenant": "acme", "scopes": ["infer"]}
WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/keys", {"json": KEY}),
    ("DELETE", "/v1/keys/{key}", {}),
    ("PUT", "/v1/quotas/acme", {"json": {"adapters": 5}}),
    ("DELETE", "/v1/quotas/acme", {}),
    ("PUT", "/v1/adapters/acme/own/shares/beta", {}),
    ("DELETE", "/v1/adapters/acme/own/shares/beta", {}),
    ("POST", "/v1/files", {"files": ROWS, "data": {"purpose": "fine-tune"}}),
    ("DELETE", "/v1/files/{file}", {}),
    ("POST", "/v1/fine_tuning/jobs", {"json": {"model": "random-llama", "training_file": "{file}"}}),
    ("POST", "/v1/fine_tuning/jobs/{job}/cancel", {}),
    # Last: the adapter goes before its shares do.
    ("DELETE", "/v1/adapters/acme/own", {}),
]
READS = [
    ("GET", "/v1/files", {}),
    ("GET", "/v1/files/{file}", {}),
    ("GET", "/v1/files/{file}/content", {}),
    ("GET", "/v1/fine_tuning/jobs", {}),
    ("GET", "/v1/fine_tuning/jobs/{job}", {}),
    ("GET", "/v1/fine_tuning/jobs/{job}/events", {}),
    ("GET", "/v1/fine_tuning/jobs/{job}/events?stream=true", {}),
    ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints", {}),
    ("GET", "/v1/keys", {}),
]
FAULTS: list[Exception] = [
    sqlite3.OperationalError("database or disk is full"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/srv/secret/access.sqlite3"),
]


class Faulty:
    """A server, its client with an admin's key, and the ids of a key, a file and a job."""

    def __init__(self, client: httpx.Client, store: AdapterStore) -> None:
        self.client = client
        self.store = store
        self.codes: dict[str, str | None] = {}
        client.put("/v1/adapters/acme/own/shares/gamma").raise_for_status()
        file = client.post("/v1/files", files=ROWS, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": "random-llama", "training_file": file, "adapter": {"tenant": "acme"}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        spare = client.post("/v1/files", files=ROWS, data={"purpose": "fine-tune"}).json()["id"]
        self.ids = {"key": client.post("/v1/keys", json=KEY).json()["id"], "file": spare, "job": job}

    def ask(self, method: str, path: str, sent: dict[str, Any]) -> httpx.Response:
        filled = {name: value.format(**self.ids) if isinstance(value, str) else value for name, value in sent.items()}
        if "json" in filled:
            filled["json"] = {
                name: value.format(**self.ids) if isinstance(value, str) else value
                for name, value in filled["json"].items()
            }
        return self.client.request(method, path.format(**self.ids), **filled)


@pytest.fixture(scope="module")
def faulty(base: FrozenBase, writer: AdapterBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    store = AdapterStore(tmp_path_factory.mktemp("faulty") / "store")
    store.publish(writer, "acme/own")
    admin = make_key(store.root, "operators", "admin").secret
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root, max_training_jobs=0))
    with live_server(app) as url, httpx.Client(base_url=url, headers=bearer(admin)) as client:
        made = Faulty(client, store)

        class Codes(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                fields = record.fields  # type: ignore[attr-defined]
                made.codes[fields["request_id"]] = fields.get("code")

        logger, handler = logging.getLogger("sera_serve.requests"), Codes()
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        yield made
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def check(faulty: Faulty, response: httpx.Response) -> None:
    error = refused(response, 503, "access_database_error")
    assert error["message"].startswith("access/access.sqlite3 of the store cannot be used (")
    assert error["message"].endswith("); check the disk, and the file's permissions") and error["param"] == "store"
    assert str(faulty.store.root) not in response.text and "/srv" not in response.text
    request_id = response.headers["x-request-id"]
    wait_until(lambda: request_id in faulty.codes)
    assert faulty.codes[request_id] == "access_database_error"


def broken(fault: Exception, writes_alone: bool) -> Callable[..., sqlite3.Connection]:
    opened = AccessDatabase._open

    def open_or_fail(self: AccessDatabase, create: bool) -> sqlite3.Connection | None:
        if create or not writes_alone:
            raise fault
        return opened(self, create)

    return open_or_fail  # type: ignore[return-value]


@pytest.mark.parametrize("fault", FAULTS, ids=["database", "system"])
def test_a_full_disk_answers_each_change_with_503(
    faulty: Faulty, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = len(list((faulty.store.root / "jobs" / "files").iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr(AccessDatabase, "_open", broken(fault, writes_alone=True))
        # The adapter's deletion is asked for once: nothing is left to delete the second time.
        for method, path, sent in WRITES if fault is FAULTS[-1] else WRITES[:-1]:
            check(faulty, faulty.ask(method, path, sent))
    # What was refused has left nothing, and what there was is still there.
    assert len(list((faulty.store.root / "jobs" / "files").iterdir())) == files
    assert faulty.client.get("/v1/files/{file}".format(**faulty.ids)).status_code == 200
    job = faulty.client.get("/v1/fine_tuning/jobs/{job}".format(**faulty.ids)).json()
    assert job["status"] in ("validating_files", "queued")


@pytest.mark.parametrize("fault", FAULTS, ids=["database", "system"])
def test_a_database_that_cannot_be_read_answers_503(
    faulty: Faulty, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(AccessDatabase, "_open", broken(fault, writes_alone=False))
        for method, path, sent in READS:
            check(faulty, faulty.ask(method, path, sent))


def test_every_route_that_keeps_something_in_the_database_is_here(faulty: Faulty) -> None:
    """By what the routes write: a new one that needs the database must be added above."""
    asked = {(method, path.split("?")[0]) for method, path, _ in [*WRITES, *READS]}
    kept = ("/v1/keys", "/v1/files", "/v1/fine_tuning", "/v1/quotas", "/v1/adapters/{tenant}/{name}/shares")
    document = faulty.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        if not path.startswith(kept):
            continue
        for method in operations:
            # Quotas and shares are read from memory.
            if (method, path.split("/")[2]) in (("get", "quotas"),) or (method == "get" and path.endswith("/shares")):
                continue
            filled = (
                path.replace("{file_id}", "{file}")
                .replace("{job_id}", "{job}")
                .replace("{id}", "{key}")
                .replace("{tenant}/{name}", "acme/own")
                .replace("{with}", "beta")
                .replace("{tenant}", "acme")
            )
            assert (method.upper(), filled) in asked, (method, path)
