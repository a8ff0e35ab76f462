"""Files and jobs of two tenants on a server with keys: each sees its own alone, and an admin sees all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import AccessDatabase, Shares
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app, training
from sera_serve.server.openai import job_events
from support.answers import refused
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine
from support.tenants import clients, make_key, revoke_key
from support.training import SORTED, STORIES, jsonl

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def users(
    base: FrozenBase, writer: AdapterBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, httpx.Client]]:
    store = AdapterStore(tmp_path_factory.mktemp("tenants") / "store")
    for name in ("acme/own", "acme/shared"):
        store.publish(writer, name)
    secrets = {name: make_key(store.root, name).secret for name in ("acme", "evil")}
    secrets["admin"] = make_key(store.root, "operators", "admin").secret
    secrets["reader"] = make_key(store.root, "acme", "infer").secret
    database = AccessDatabase(store.root)
    Shares(database).add("acme/shared", "evil")
    database.close()
    # The jobs wait: no process is started.
    settings = ServeSettings(
        store=store.root, max_training_jobs=0, quotas={"evil": {"training_jobs": 1}}, max_training_files_mib=1
    )
    with live_server(build_app(StubEngine(base), store, settings)) as url, clients(url, secrets) as made:
        yield made


def send(client: httpx.Client, rows: list[Any]) -> str:
    answer = client.post(FILES, files={"file": ("a.jsonl", jsonl(rows))}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def create(client: httpx.Client, file: str, model: str, **body: Any) -> httpx.Response:
    return client.post(JOBS, json={"model": model, "training_file": file, **body})


@pytest.fixture(scope="module")
def own(users: dict[str, httpx.Client], base: FrozenBase) -> tuple[str, str]:
    """A file and a job of acme."""
    file = send(users["acme"], STORIES)
    return file, str(create(users["acme"], file, base.name).json()["id"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", FILES + "/{file}"),
        ("DELETE", FILES + "/{file}"),
        ("GET", FILES + "/{file}/content"),
        ("GET", FILES + "?after={file}"),
        ("GET", JOBS + "/{job}"),
        ("POST", JOBS + "/{job}/cancel"),
        ("GET", JOBS + "/{job}/events"),
        ("GET", JOBS + "/{job}/events?stream=true"),
        ("GET", JOBS + "/{job}/checkpoints"),
        ("GET", JOBS + "?after={job}"),
    ],
)
def test_what_is_another_tenants_answers_as_if_it_were_not_there(
    users: dict[str, httpx.Client], own: tuple[str, str], method: str, path: str
) -> None:
    def ask(file: str, job: str) -> tuple[int, str, list[str]]:
        answer = users["evil"].request(method, path.format(file=file, job=job))
        names = [name for name in answer.headers if name != "date"]
        return answer.status_code, answer.text.replace(file, "F").replace(job, "J"), names

    found, absent = ask(*own), ask("file-" + "0" * 24, "ftjob-" + "0" * 24)
    assert found == absent and found[0] == 404


def test_lists_have_ones_own_alone(users: dict[str, httpx.Client], own: tuple[str, str]) -> None:
    for path, mine in ((FILES, own[0]), (JOBS, own[1])):
        ids = {
            name: [held["id"] for held in users[name].get(path).json()["data"]] for name in ("acme", "evil", "admin")
        }
        assert mine in ids["acme"] and mine in ids["admin"] and mine not in ids["evil"]
        refused(users["reader"].get(path), 403, "insufficient_scope")


def test_a_job_names_only_what_its_tenant_may_use(
    users: dict[str, httpx.Client], own: tuple[str, str], base: FrozenBase
) -> None:
    evil = users["evil"]
    mine = send(evil, STORIES)
    refused(create(evil, own[0], base.name), 404, "file_not_found")
    error = refused(create(evil, mine, base.name, validation_file=own[0]), 404, "file_not_found")
    assert error["param"] == "validation_file"
    secret = refused(create(evil, mine, "acme/own"), 404, "model_not_found")["message"]
    assert secret.replace("own", "non") == refused(create(evil, mine, "acme/non"), 404, "model_not_found")["message"]
    refused(create(evil, mine, base.name, adapter={"tenant": "acme"}), 403, "not_your_tenant")
    job = create(evil, mine, "acme/shared", suffix="two").json()
    # What comes of a shared adapter is one's own.
    assert job["adapter"]["init_from"] == "acme/shared@v1" and job["adapter"]["name"].startswith("evil/shared-two-")
    assert refused(create(evil, mine, base.name), 429, "quota_exceeded")["param"] == "training_jobs"
    assert users["evil"].get("/v1/quotas/evil").json()["usage"]["training_jobs"] == 1
    assert evil.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"
    assert create(users["admin"], mine, base.name, adapter={"tenant": "evil"}).json()["organization_id"] == "evil"


def test_a_tenants_files_have_a_limit_together(users: dict[str, httpx.Client]) -> None:
    rows = [{"text": "x" * 1000, "label": str(number % 2)} for number in range(600)]
    send(users["evil"], rows)
    answer = users["evil"].post(FILES, files={"file": ("b", jsonl(rows))}, data={"purpose": "fine-tune"})
    assert "1048576 bytes" in refused(answer, 400, "too_many_files")["message"]
    send(users["acme"], SORTED)


def test_the_list_is_filtered_by_metadata(users: dict[str, httpx.Client], base: FrozenBase) -> None:
    mine, other = users["acme"], users["evil"]
    pairs = {f"key {number}": f"ä&=[{number}]" for number in range(16)}
    stories = send(mine, STORIES)
    plain = create(mine, stories, base.name).json()["id"]
    made = create(mine, stories, base.name, metadata=pairs).json()["id"]
    query = {f"metadata[{key}]": value for key, value in pairs.items()}
    assert [job["id"] for job in mine.get(JOBS, params=query | {"limit": 5}).json()["data"]] == [made]
    assert other.get(JOBS, params=query).json()["data"] == []
    without = [job["id"] for job in mine.get(JOBS, params={"metadata": "null"}).json()["data"]]
    assert plain in without and made not in without
    for params, param in (
        ({"metadata": "{}"}, "metadata"),
        ({"metadata[a": "b"}, "metadata[a"),
        ({"metadata": "null", "metadata[a]": "b"}, "metadata"),
        ({"metadata[" + "k" * 65 + "]": "b"}, "metadata"),
        ({"meta": "b"}, "meta"),
        ({"limit": "0", "metadata[a]": "b"}, "limit"),
        ({"limit": "101"}, "limit"),
    ):
        answer = mine.get(JOBS, params=params)
        assert refused(answer, 400, answer.json()["error"]["code"])["param"] == param
    assert mine.get(f"{JOBS}/{made}/checkpoints", params={"metadata[a]": "b"}).status_code == 400


def test_files_are_deleted_page_by_page_by_the_official_client(users: dict[str, httpx.Client]) -> None:
    admin = users["admin"]
    made = {send(admin, SORTED) for _ in range(5)}
    with openai.OpenAI(
        base_url=str(admin.base_url.join("/v1")), api_key=str(admin.headers["authorization"])[7:]
    ) as client:
        gone = {client.files.delete(file.id).id for file in client.files.list(limit=2) if file.id in made}
    assert gone == made


def test_a_share_that_has_ended_begins_no_waiting_job(base: FrozenBase, writer: AdapterBundle, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.publish(writer, "acme/secret")
    secrets = {
        "beta": make_key(store.root, "beta").secret,
        "admin": make_key(store.root, "operators", "admin").secret,
    }
    database = AccessDatabase(store.root)
    Shares(database).add("acme/secret", "beta")
    waiting = ServeSettings(store=store.root, auth="keys", max_training_jobs=0)
    with live_server(build_app(StubEngine(base), store, waiting)) as url, clients(url, secrets) as users:
        made = create(users["beta"], send(users["beta"], STORIES), "acme/secret").json()
    Shares(database).remove("acme/secret", "beta")
    database.close()
    running = ServeSettings(store=store.root, auth="keys", max_training_jobs=1)
    with live_server(build_app(StubEngine(base), store, running)) as url, clients(url, secrets) as users:

        def held(name: str, job: str) -> dict[str, Any]:
            return dict(users[name].get(f"{JOBS}/{job}").json())

        wait_until(lambda: held("beta", made["id"])["status"] not in ("validating_files", "queued"))
        ended = held("beta", made["id"])
        assert ended["status"] == "failed", ended
        # As an adapter that was deleted.
        assert (ended["error"]["code"], ended["error"]["param"]) == ("adapter_not_found", "model")
        assert "'acme/secret' is not in the store" in ended["error"]["message"]
        # An admin needs no share.
        file = send(users["admin"], STORIES)
        other = create(users["admin"], file, "acme/secret", adapter={"tenant": "beta"}).json()
        wait_until(lambda: held("admin", other["id"])["status"] == "running")
        users["admin"].post(f"{JOBS}/{other['id']}/cancel")


def test_events_that_are_there_come_at_once(
    users: dict[str, httpx.Client], base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "_AT_ONCE", 1)
    monkeypatch.setattr(job_events, "_LOOK_S", 60.0)
    job = create(users["acme"], send(users["acme"], STORIES), base.name).json()["id"]
    users["acme"].post(f"{JOBS}/{job}/cancel")
    answer = users["acme"].get(f"{JOBS}/{job}/events?stream=true", timeout=20)
    *events, done, _ = answer.text.split("\n\n")
    assert len(events) == len(users["acme"].get(f"{JOBS}/{job}/events").json()["data"]) > 1
    assert "Created" in events[0] and "cancelled" in events[-1] and done == "data: [DONE]"


def test_events_begin_after_any_of_them(users: dict[str, httpx.Client], base: FrozenBase) -> None:
    acme = users["acme"]
    path = f"{JOBS}/{create(acme, send(acme, STORIES), base.name).json()['id']}/events"
    acme.post(f"{path.removesuffix('/events')}/cancel")
    first, second, *_ = ids = [event["id"] for event in acme.get(path).json()["data"]]
    page = acme.get(path, params={"after": first, "limit": 1}).json()
    assert [event["id"] for event in page["data"]] == [second] and page["has_more"] is (len(ids) > 2)
    assert f'"{first}"' in acme.get(path, params={"after": second, "stream": True}).text
    assert acme.get(path, params={"after": first, "stream": True}).text == "data: [DONE]\n\n"
    for after in ("1", "ftevent-", "ftevent-\u0661", "ftevent-x", f"{first}{'0' * 9}", first.replace("event", "ckpt")):
        assert refused(acme.get(path, params={"after": after}), 400, "invalid_request")["param"] == "after"


def test_streams_of_events_leave_room_for_those_of_others(
    users: dict[str, httpx.Client], own: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_TENANT_STREAMS", 1)
    path = f"{JOBS}/{own[1]}/events?stream=true"
    with users["acme"].stream("GET", path) as held:
        lines = held.iter_lines()
        assert "created" in next(lines)
        refused(users["acme"].get(path), 503, "overloaded")
        # Of another tenant, which has no such job.
        refused(users["evil"].get(path), 404, "job_not_found")


@pytest.mark.parametrize("becomes", ["revoked", "unknown"])
def test_a_stream_of_events_ends_with_its_key(base: FrozenBase, tmp_path: Path, becomes: str) -> None:
    store = AdapterStore(tmp_path / "store")
    kept, revoked = make_key(store.root, "acme"), make_key(store.root, "acme")
    settings = ServeSettings(store=store.root, max_training_jobs=0)
    with (
        live_server(build_app(StubEngine(base), store, settings)) as url,
        clients(url, {"kept": kept.secret, "revoked": revoked.secret}) as users,
    ):
        job = create(users["kept"], send(users["kept"], STORIES), base.name).json()["id"]
        with users["revoked"].stream("GET", f"{JOBS}/{job}/events?stream=true") as answer:
            lines = answer.iter_lines()
            assert "created" in next(lines)
            if becomes == "revoked":
                revoke_key(store.root, revoked.key.id)
            else:
                # As where an older backup was restored.
                database = AccessDatabase(store.root)
                with database.writing() as connection:
                    connection.execute("DELETE FROM keys WHERE id = ?", (revoked.key.id,))
                database.close()
            # The job waits for good: nothing else ends the stream.
            rest = [line for line in lines if line]
        assert f"the key {revoked.key.id} is {becomes}" in rest[-1] and "invalid_api_key" in rest[-1]
        assert users["revoked"].get(f"{JOBS}/{job}").status_code == 401
        assert users["kept"].get(f"{JOBS}/{job}").status_code == 200
