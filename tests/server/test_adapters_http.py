"""GET and DELETE on /v1/adapters."""

from __future__ import annotations

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from support.answers import refused
from support.stub_engine import StubEngine


@pytest.fixture
def listed(store: AdapterStore, writer: AdapterBundle) -> list[str]:
    for number in range(5):
        store.publish(writer, f"list/a{number}")
    return [f"list/a{number}" for number in range(5)]


def test_a_list_describes_each_adapter(client: httpx.Client, writer: AdapterBundle, sorter: AdapterBundle) -> None:
    answer = client.get("/v1/adapters", params={"tenant": "demo"}).json()
    assert answer["next"] is None
    found = {adapter.pop("adapter"): adapter for adapter in answer["adapters"]}
    created = found["demo/sorter"].pop("created_at")
    assert created.startswith("20")
    assert found["demo/sorter"] == {
        "version": 1,
        "digest": sorter.digest,
        "task": "classify",
        "method": "sera",
        "base": "random-llama",
        "labels": ["spam", "ham"],
        "ranks": [8],
        "splits": [4],
        "modules": 2,
        "has_chat_template": False,
        "parameters": sorter.config.parameters,
        "bytes": sorter.nbytes,
        "tier": "store",
        "pinned": False,
    }
    assert found["demo/writer"]["labels"] is None
    assert found["demo/writer"]["digest"] == writer.digest


def test_pages_follow_each_other(client: httpx.Client, listed: list[str]) -> None:
    seen: list[str] = []
    query: dict[str, str | int] = {"limit": 2, "tenant": "list"}
    for _ in range(3):
        page = client.get("/v1/adapters", params=query).json()
        seen += [adapter["adapter"] for adapter in page["adapters"]]
        query["after"] = page["next"]
    assert seen == listed
    assert page["next"] is None
    # A page may start after an adapter that does not exist any more.
    rest = client.get("/v1/adapters", params={"after": "list/a2x", "tenant": "list"}).json()
    assert [adapter["adapter"] for adapter in rest["adapters"]] == ["list/a3", "list/a4"]


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", "invalid_value", "limit"),
        ("limit=1001", "invalid_value", "limit"),
        ("limit=many", "invalid_value", "limit"),
        ("offset=3", "unknown_field", "offset"),
        ("tenant=..", "invalid_adapter_name", "tenant"),
    ],
)
def test_a_wrong_query_parameter_is_named(client: httpx.Client, query: str, code: str, param: str) -> None:
    error = refused(client.get(f"/v1/adapters?{query}"), 422, code)
    assert error["param"] == param
    if code == "unknown_field":
        assert error["message"] == "'offset' is not a query parameter of this request; leave it out"


def test_inspecting_shows_versions_aliases_and_configuration(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle, sorter: AdapterBundle
) -> None:
    store.publish(writer, "look/me")
    store.publish(sorter, "look/me")
    store.set_alias("look/me", "stable", "look/me@v1")
    answer = client.get("/v1/adapters/look/me").json()
    assert (answer["adapter"], answer["version"], answer["versions"]) == ("look/me", 2, [1, 2])
    assert answer["aliases"] == {"latest": 2, "stable": 1}
    assert answer["config"] == sorter.config.model_dump(mode="json")
    for selector in ("v1", "stable", writer.digest[:12]):
        assert client.get(f"/v1/adapters/look/me@{selector}").json()["digest"] == writer.digest


def test_deleting_a_version_then_the_adapter(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle, sorter: AdapterBundle
) -> None:
    store.publish(writer, "gone/soon")
    store.publish(sorter, "gone/soon")
    answer = client.delete("/v1/adapters/gone/soon@v2")
    assert (answer.status_code, answer.json()) == (200, {"adapter": "gone/soon@v2", "deleted": True})
    assert store.resolve("gone/soon").version == 1
    assert client.delete("/v1/adapters/gone/soon").json() == {"adapter": "gone/soon", "deleted": True}
    refused(client.get("/v1/adapters/gone/soon"), 404, "adapter_not_found")
    refused(client.delete("/v1/adapters/gone/soon"), 404, "adapter_not_found")


def test_a_version_with_an_alias_cannot_be_deleted(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle
) -> None:
    store.publish(writer, "kept/here")
    store.set_alias("kept/here", "stable", "kept/here@v1")
    refused(client.delete("/v1/adapters/kept/here@v1"), 409, "version_in_use")


def test_a_pin_keeps_the_named_version(
    client: httpx.Client, engine: StubEngine, store: AdapterStore, writer: AdapterBundle, sorter: AdapterBundle
) -> None:
    store.publish(writer, "pinned/one")
    store.publish(sorter, "pinned/one")
    answer = client.put("/v1/adapters/pinned/one@v1/pin")
    assert (answer.status_code, answer.json()) == (200, {"adapter": "pinned/one", "version": 1, "pinned": True})
    client.put("/v1/adapters/pinned/one/pin").raise_for_status()
    assert engine.pinned == [writer.digest, sorter.digest]
    answer = client.delete("/v1/adapters/pinned/one@v1/pin")
    assert answer.json() == {"adapter": "pinned/one", "version": 1, "pinned": False}
    assert engine.pinned == [sorter.digest]
    for method in ("PUT", "DELETE"):
        refused(client.request(method, "/v1/adapters/pinned/none/pin"), 404, "adapter_not_found")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("demo/absent", 404, "adapter_not_found"),
        ("demo/sorter@v9", 404, "adapter_not_found"),
        ("..%2f..%2fetc/passwd", 404, "not_found"),
        ("demo/..%2fsorter", 404, "not_found"),
        ("%2e%2e/passwd", 422, "invalid_adapter_name"),
        ("demo/%2e%2e", 422, "invalid_adapter_name"),
        ("demo/%00", 422, "invalid_adapter_name"),
        ("demo/%ff%fe", 422, "invalid_adapter_name"),
        ("demo/%F0%9F%8F%B4", 422, "invalid_adapter_name"),
        ("demo/..%5csorter", 422, "invalid_adapter_name"),
        ("demo/" + "x" * 8_000, 422, "invalid_adapter_name"),
        ("Demo/Sorter", 422, "invalid_adapter_name"),
    ],
)
def test_a_hostile_name_in_the_path(
    client: httpx.Client, store: AdapterStore, method: str, path: str, status: int, code: str
) -> None:
    # A raw path, so that the client library does not normalise the path.
    request = client.build_request(method, "/")
    request.url = request.url.copy_with(raw_path=f"/v1/adapters/{path}".encode())
    refused(client.send(request), status, code)
    assert store.resolve("demo/sorter").version == 1


def test_a_damaged_alias_can_be_pointed_again_and_removed(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle
) -> None:
    store.publish(writer, "worn/c")
    store.set_alias("worn/c", "stable", "worn/c@v1")
    path = store.root / "adapters" / "worn" / "c" / "aliases" / "stable.json"
    path.write_bytes(b"")
    refused(client.get("/v1/adapters/worn/c@stable"), 500, "store_corrupted")
    url = "/v1/adapters/worn/c/aliases/stable"
    assert client.put(url, json={"version": 1}).json()["version"] == 1
    path.write_bytes(b"")
    assert client.delete(url).json() == {"adapter": "worn/c", "alias": "stable", "version": 0}
    assert client.get("/v1/adapters/worn/c").json()["aliases"] == {"latest": 1}
    path.write_bytes(b"")
    assert client.delete("/v1/adapters/worn/c").status_code == 200


def test_a_damaged_record_hides_no_other_adapter_and_can_be_deleted(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle
) -> None:
    for name in ("worn/a", "worn/b"):
        store.publish(writer, name)
    (store.root / "adapters" / "worn" / "a" / "versions" / "v1.json").write_bytes(b"")
    page = client.get("/v1/adapters", params={"tenant": "worn"}).json()
    assert [adapter["adapter"] for adapter in page["adapters"]] == ["worn/b"]
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert "worn/b" in models and "worn/a" not in models
    assert client.get("/v1/quotas/worn").json()["usage"]["adapters"] == 2
    refused(client.get("/v1/adapters/worn/a"), 500, "store_corrupted")
    assert client.delete("/v1/adapters/worn/a").json() == {"adapter": "worn/a", "deleted": True}
    refused(client.get("/v1/adapters/worn/a"), 404, "adapter_not_found")
    assert client.delete("/v1/models/worn/b").status_code == 200
