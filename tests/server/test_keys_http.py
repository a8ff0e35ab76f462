"""Who may call a server: the door, the scopes of each route, and the routes of keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from adapters_store import AdapterStore
from sera_serve.access import SCOPES, AccessDatabase, AccessDatabaseError
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.server.scopes import ROUTES, is_open, needed_scope
from support.answers import openapi_document, refused
from support.live_server import live_server, wait_until
from support.raw_http import RawClient
from support.stub_engine import StubEngine
from support.tenants import bearer, make_key, revoke_key

GENERATE = {"prompt": "a"}
VALUES = {"tenant": "acme", "name": "none", "model": "acme/none", "alias": "stable", "with": "other", "id": "none"}
VALUES |= {"file_id": "file-none", "job_id": "ftjob-none"}


@contextmanager
def serving(base: FrozenBase, root: Path, **settings: Any) -> Iterator[httpx.Client]:
    store = AdapterStore(root)
    app = build_app(StubEngine(base), store, ServeSettings(store=root, **settings))
    with live_server(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "store"


@pytest.fixture(scope="module")
def guarded(base: FrozenBase, root: Path) -> Iterator[httpx.Client]:
    """A server that needs keys, and a client without one."""
    with serving(base, root, auth="keys") as client:
        yield client


@pytest.fixture(scope="module")
def secrets(guarded: httpx.Client, root: Path) -> dict[str, str]:
    """A secret of tenant acme for each scope."""
    found = {scope: make_key(root, "acme", scope).secret for scope in SCOPES}
    wait_until(lambda: guarded.get("/v1/me", headers=bearer(found["admin"])).status_code == 200, 2)
    return found


def operations() -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, ways in openapi_document()["paths"].items() for method in ways]


def path_of(template: str) -> str:
    return re.sub(r"{(\w+)(:path)?}", lambda match: VALUES[match[1]], template)


def table_path(path: str) -> str:
    """A path of the document as the app's routes write it."""
    return path.replace("{model}", "{model:path}")


@pytest.mark.parametrize(("method", "path"), operations(), ids=" ".join)
def test_each_route_asks_for_its_scope(guarded: httpx.Client, secrets: dict[str, str], method: str, path: str) -> None:
    needed = needed_scope(method, table_path(path))
    if needed == "nothing":
        assert guarded.request(method, path_of(path)).status_code in (200, 404)
        return
    error = refused(guarded.request(method, path_of(path)), 401, "invalid_api_key")
    assert "keys create" in error["message"]
    for scope, secret in secrets.items():
        response = guarded.request(method, path_of(path), headers=bearer(secret))
        if needed in ("key", scope) or scope == "admin":
            assert response.status_code not in (401, 403, 500) or path.endswith("_lora_adapter"), response.text
        else:
            error = refused(response, 403, "insufficient_scope")
            assert error["param"] == "Authorization" and needed in error["message"]


def test_every_route_is_in_the_table_or_open(base: FrozenBase, tmp_path: Path) -> None:
    app = build_app(StubEngine(base), AdapterStore(tmp_path / "store"), ServeSettings())
    routes = [route for route in app.state.routes if isinstance(route, APIRoute)]
    found = {(method, route.path) for route in routes for method in route.methods}
    assert {(method, path) for method, path in found if not (method == "GET" and is_open(path))} == set(ROUTES)
    # A route that nobody thought of needs the most.
    assert needed_scope("GET", "/v1/forgotten") == needed_scope("POST", "/healthz") == "admin"


def documented_scope(method: str, path: str) -> str:
    """The scope of a route as docs/http.md has it: what the tests above take from the table, said a second time."""
    if path == "/v1/me" or (method, path) == ("GET", "/v1/quotas/{tenant}"):
        return "key"
    if path.startswith(("/v1/keys", "/v1/quotas", "/v1/stats", "/metrics")):
        return "admin"
    if path.startswith(("/v1/files", "/v1/fine_tuning")):
        return "train"
    if path.startswith(("/v1/adapters", "/v1/models")) or path.endswith("_lora_adapter"):
        return "key" if method == "GET" and not path.endswith("/shares") else "publish"
    return "infer"


def test_the_table_gives_each_route_the_documented_scope() -> None:
    assert {route: needed_scope(*route) for route in ROUTES} == {route: documented_scope(*route) for route in ROUTES}


SECRET = "<secret>"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer \t"],
        [b"Basic YTpi"],
        [b"Bearer none"],
        [b"Bearer sk-sera-"],
        [b"Bearer sk-sera-0123456789ab-x"],
        [b"Bearer \xff\xfe\xe4"],
        [b"Bearer " + b"x" * 20_000],
        [b"Bearer " + b"sk-sera-" * 2_000],
        [SECRET.encode()],
        [b"Bearer <secret>x"],
        [b"Bearer <secret> x"],
        [b"Bearer, <secret>"],
        [b"Bearer <secret>", b"Bearer <secret>"],
        [b"Bearer <secret>", b"Basic YTpi"],
    ],
    ids=range(18),
)
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/adapters", "/nothing"])
def test_other_authorizations_are_refused(
    guarded: httpx.Client, secrets: dict[str, str], headers: list[bytes], path: str
) -> None:
    lines = [b"Authorization: " + value.replace(SECRET.encode(), secrets["infer"].encode()) for value in headers]
    with RawClient(str(guarded.base_url)) as client:
        # The body is announced and never sent: the refusal comes before it is read.
        begin = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n".encode()
        client.send(begin + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
        response = client.response()
    error = json.loads(response.body)["error"]
    assert (response.status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    assert response.headers["www-authenticate"] == "Bearer"
    assert error["param"] == "Authorization" and "sera-serve keys create" in error["message"]
    assert secrets["infer"] not in response.body.decode()


@pytest.mark.parametrize("value", ["Bearer {}", "bearer {}", "BEARER   {}"])
def test_the_scheme_has_any_case_and_any_spaces(guarded: httpx.Client, secrets: dict[str, str], value: str) -> None:
    headers = {"Authorization": value.format(secrets["infer"])}
    assert guarded.post("/v1/generate", json=GENERATE, headers=headers).status_code == 200


def test_the_official_client_raises_its_own_errors(guarded: httpx.Client, secrets: dict[str, str]) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{guarded.base_url}/v1", api_key=key, max_retries=0)

    with client("none") as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key" and caught.value.type == "authentication_error"
    with client(secrets["publish"]) as publisher:
        assert next(iter(publisher.models.list())).owned_by == "sera-serve"
        with pytest.raises(openai.PermissionDeniedError) as denied:
            publisher.completions.create(model="acme/none", prompt="a")
    assert denied.value.code == "insufficient_scope"
    with client(secrets["infer"]) as user:
        assert user.completions.create(model="random-llama", prompt="a").choices[0].text


def test_a_principal_is_that_of_the_key(base: FrozenBase, tmp_path: Path) -> None:
    engine = StubEngine(base)
    store = AdapterStore(tmp_path / "store")
    made = make_key(store.root, "acme", "infer")
    app = build_app(engine, store, ServeSettings(store=store.root))
    with live_server(app) as url, httpx.Client(base_url=url, headers=bearer(made.secret)) as client:
        client.post("/v1/generate", json=GENERATE).raise_for_status()
        client.post("/v1/classify", json={"adapter": "acme/x", "inputs": ["a"]}).raise_for_status()
    for principal in engine.principals:
        assert (principal.tenant, principal.key_id, principal.scopes) == ("acme", made.key.id, frozenset({"infer"}))
    assert len(engine.principals) == 2


def test_the_first_key_closes_an_open_server(base: FrozenBase, tmp_path: Path) -> None:
    with serving(base, tmp_path / "store") as client:
        me = client.get("/v1/me", headers=bearer("whatever")).json()
        assert me == {
            "tenant": None,
            "key_id": None,
            "scopes": list(SCOPES),
            "needs_keys": False,
            "base": {"name": "random-llama", "kind": "decoder"},
        }
        assert client.post("/v1/generate", json=GENERATE).status_code == 200
        made = make_key(tmp_path / "store", "acme", "infer")
        began = time.monotonic()
        wait_until(lambda: client.post("/v1/generate", json=GENERATE).status_code == 401, 2)
        assert time.monotonic() - began < 1
        headers = bearer(made.secret)
        assert client.post("/v1/generate", json=GENERATE, headers=headers).status_code == 200
        me = client.get("/v1/me", headers=headers).json()
        assert (me["tenant"], me["key_id"], me["scopes"]) == ("acme", made.key.id, ["infer"]) and me["needs_keys"]
        revoke_key(tmp_path / "store", made.key.id)
        wait_until(lambda: client.get("/v1/me", headers=headers).status_code == 401, 2)
        error = refused(client.get("/v1/me", headers=headers), 401, "invalid_api_key")
        assert "revoked" in error["message"]
        # It stays closed: a key was made once.
        refused(client.post("/v1/generate", json=GENERATE), 401, "invalid_api_key")


def test_a_key_expires(guarded: httpx.Client, secrets: dict[str, str], root: Path) -> None:
    headers = bearer(make_key(root, "acme", "infer", lifetime_s=1).secret)
    wait_until(lambda: guarded.get("/v1/me", headers=headers).status_code == 200, 1)
    wait_until(lambda: guarded.get("/v1/me", headers=headers).status_code == 401, 3)
    assert "expired" in refused(guarded.get("/v1/me", headers=headers), 401, "invalid_api_key")["message"]


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"host": "0.0.0.0"}, 401),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "127.0.0.1", "auth": "keys"}, 401),
        ({"host": "127.0.0.1", "auth": "off"}, 200),
        ({"host": "0.0.0.0", "auth": "off", "insecure": True}, 200),
    ],
)
def test_who_needs_a_key_without_any(base: FrozenBase, tmp_path: Path, settings: dict[str, Any], status: int) -> None:
    with serving(base, tmp_path / "store", **settings) as client:
        assert client.post("/v1/generate", json=GENERATE).status_code == status
        assert client.get("/healthz").status_code == 200


def test_auth_off_needs_no_key_where_there_are_some(base: FrozenBase, tmp_path: Path) -> None:
    AdapterStore(tmp_path / "store")
    make_key(tmp_path / "store", "acme")
    with serving(base, tmp_path / "store", auth="off") as client:
        assert client.post("/v1/generate", json=GENERATE, headers=bearer("x")).status_code == 200


def test_no_server_is_open_to_others_by_mistake(base: FrozenBase, tmp_path: Path) -> None:
    settings = ServeSettings(store=tmp_path / "store", host="0.0.0.0", auth="off")
    with pytest.raises(InvalidConfiguration, match="--insecure") as caught:
        build_app(StubEngine(base), AdapterStore(tmp_path / "store"), settings)
    assert caught.value.param == "auth"


def test_keys_that_cannot_be_read_stop_the_start(base: FrozenBase, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    make_key(store.root, "acme")
    AccessDatabase(store.root).path.write_bytes(b"no database" * 1000)
    with pytest.raises(AccessDatabaseError, match="cannot be used") as caught:
        build_app(StubEngine(base), store, ServeSettings(store=store.root))
    assert caught.value.param == "store"


def test_keys_that_become_unreadable_stay_as_they_were(base: FrozenBase, tmp_path: Path) -> None:
    AdapterStore(tmp_path / "store")
    headers = bearer(make_key(tmp_path / "store", "acme", "infer", "admin").secret)
    with serving(base, tmp_path / "store") as client:
        client.get("/v1/me", headers=headers).raise_for_status()
        path = AccessDatabase(tmp_path / "store").path
        path.write_bytes(b"x" * path.stat().st_size)
        time.sleep(0.6)
        client.post("/v1/generate", json=GENERATE, headers=headers).raise_for_status()
        refused(client.post("/v1/generate", json=GENERATE), 401, "invalid_api_key")
        body = {"tenant": "acme", "scopes": ["infer"]}
        error = refused(client.post("/v1/keys", json=body, headers=headers), 503, "access_database_error")
        assert "permissions" in error["message"]


def test_admins_make_list_and_revoke_keys(guarded: httpx.Client, secrets: dict[str, str], root: Path) -> None:
    admin = bearer(secrets["admin"])
    body = {"tenant": "zoo", "scopes": ["publish", "infer"], "name": "for ☠ ants", "expires_in_s": 3600}
    answer = guarded.post("/v1/keys", json=body, headers=admin)
    made = answer.json()
    assert answer.status_code == 201
    secret = made.pop("secret")
    assert secret.startswith(f"sk-sera-{made['id']}-") and len(secret) > 60
    assert {name: made[name] for name in ("tenant", "scopes", "name", "status")} == {
        "tenant": "zoo",
        "scopes": ["infer", "publish"],
        "name": "for ☠ ants",
        "status": "active",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["expires_at"])
    # At once, on the server that made it.
    assert guarded.get("/v1/me", headers=bearer(secret)).json()["tenant"] == "zoo"
    assert guarded.get("/v1/keys?tenant=zoo", headers=admin).json() == {"keys": [made]}
    every = guarded.get("/v1/keys", headers=admin)
    assert made in every.json()["keys"] and len(every.json()["keys"]) > 4
    assert not any(held in every.text for held in (*secrets.values(), secret, "secret", "sha256"))
    revoked = guarded.delete(f"/v1/keys/{made['id']}", headers=admin).json()
    assert revoked == made | {"status": "revoked"}
    refused(guarded.get("/v1/me", headers=bearer(secret)), 401, "invalid_api_key")
    assert guarded.delete(f"/v1/keys/{made['id']}", headers=admin).json() == revoked
    assert refused(guarded.delete("/v1/keys/none", headers=admin), 404, "key_not_found")["param"] == "id"
    lines = [json.loads(line) for line in (root / "access" / "audit.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["target"] == made["id"]]
    assert [line["action"] for line in mine] == ["key.create", "key.revoke", "key.revoke"]
    assert {(line["source"], line["tenant"], line["address"]) for line in mine} == {("http", "zoo", "127.0.0.1")}
    assert mine[0]["key_id"] == guarded.get("/v1/me", headers=admin).json()["key_id"]
    assert mine[0]["request_id"] == answer.headers["x-request-id"]
    assert secret not in json.dumps(lines)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"tenant": "a/b", "scopes": ["infer"]}, "invalid_adapter_name", "tenant"),
        ({"tenant": "Acme", "scopes": ["infer"]}, "invalid_adapter_name", "tenant"),
        ({"tenant": "", "scopes": ["infer"]}, "invalid_value", "tenant"),
        ({"tenant": "acme", "scopes": []}, "invalid_value", "scopes"),
        ({"tenant": "acme", "scopes": ["root"]}, "invalid_value", "scopes[0]"),
        ({"tenant": "acme", "scopes": "infer"}, "invalid_value", "scopes"),
        ({"tenant": "acme", "scopes": ["infer"], "expires_in_s": 0}, "invalid_value", "expires_in_s"),
        ({"tenant": "acme", "scopes": ["infer"], "expires_in_s": 1e300}, "invalid_value", "expires_in_s"),
        ({"tenant": "acme", "scopes": ["infer"], "name": "a\nb"}, "invalid_request", "name"),
        ({"tenant": "acme", "scopes": ["infer"], "name": "a" * 101}, "invalid_value", "name"),
        ({"tenant": "acme", "scopes": ["infer"], "secret": "mine"}, "unknown_field", "secret"),
        ({"scopes": ["infer"]}, "missing_field", "tenant"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_wrong_key_is_refused_by_field(
    guarded: httpx.Client, secrets: dict[str, str], body: dict[str, Any], code: str, param: str
) -> None:
    response = guarded.post("/v1/keys", json=body, headers=bearer(secrets["admin"]))
    assert refused(response, 422, code)["param"] == param


def test_a_page_of_an_allowed_origin_may_read_that_it_needs_a_key(base: FrozenBase, tmp_path: Path) -> None:
    with serving(base, tmp_path / "store", auth="keys", allowed_origins=["https://a.example"]) as client:
        response = client.get("/v1/models", headers={"Origin": "https://a.example"})
        refused(response, 401, "invalid_api_key")
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
        asked["Access-Control-Request-Headers"] = "authorization"
        assert "authorization" in client.options("/v1/models", headers=asked).headers["access-control-allow-headers"]
