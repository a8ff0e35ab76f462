"""Quotas over HTTP: limits of a minute and their headers, adapters and bytes, priorities, and the routes of quotas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import RATE_HEADERS, AccessDatabase, Keys
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.answers import refused
from support.live_server import live_server, wait_until
from support.stub_engine import CRASHES, ENDS_BEGUN, FAILS_LATER, OTHERS_SHED, SLOW, TEXTS, StubEngine

ORIGIN = "https://console.example.com"
QUOTAS: dict[str, dict[str, Any]] = {
    # Each test has a tenant of its own.
    **{f"two{index}": {"requests_per_minute": 2} for index in range(16)},
    **{f"tok{index}": {"tokens_per_minute": 60} for index in range(16)},
    "both": {"requests_per_minute": 100, "tokens_per_minute": 1000},
    "calm": {"max_priority": "low"},
    "few": {"adapters": 1},
    "slim": {"bytes": 10},
    "_base": {"requests_per_minute": 1},
}


@pytest.fixture(scope="module")
def quota_stub(base: FrozenBase) -> StubEngine:
    return StubEngine(base)


@pytest.fixture(scope="module")
def quota_url(quota_stub: StubEngine, tmp_path_factory: pytest.TempPathFactory, writer: AdapterBundle) -> Iterator[str]:
    store = AdapterStore(tmp_path_factory.mktemp("quotas") / "store")
    for tenant in DETOKENIZING:
        store.publish(writer, f"{tenant}/a")
    settings = ServeSettings(store=store.root, quotas=QUOTAS, allowed_origins=[ORIGIN])
    with live_server(build_app(quota_stub, store, settings)) as address:
        yield address


@pytest.fixture
def open_client(quota_url: str, quota_stub: StubEngine) -> Iterator[httpx.Client]:
    quota_stub.begin_record()
    with httpx.Client(base_url=quota_url, timeout=10) as client:
        yield client


def usage(client: httpx.Client, tenant: str) -> dict[str, int]:
    found: dict[str, int] = client.get(f"/v1/quotas/{tenant}").json()["usage"]
    return found


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/generate", {"adapter": "TENANT/a", "prompt": "a"}),
    ("/v1/generate", {"adapter": "TENANT/a", "prompt": "a", "stream": True}),
    ("/v1/classify", {"adapter": "TENANT/a", "inputs": ["a"]}),
    ("/v1/classify", {"adapters": ["TENANT/a", "TENANT/b"], "inputs": ["a"]}),
    ("/v1/completions", {"model": "TENANT/a", "prompt": "a"}),
    ("/v1/completions", {"model": "TENANT/a", "prompt": "a", "stream": True}),
    ("/v1/embeddings", {"model": "TENANT/a", "input": "a"}),
    ("/detokenize", {"model": "TENANT/a", "tokens": [1]}),
]
# The last route looks its adapter up. The stub engine, which serves the others, does not.
DETOKENIZING = (f"two{len(ROUTES) - 1}", "free")


def of(tenant: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body of a request, for a tenant's adapters."""
    return {
        field: [one.replace("TENANT", tenant) for one in value]
        if isinstance(value, list) and isinstance(value[0], str)
        else value.replace("TENANT", tenant)
        if isinstance(value, str)
        else value
        for field, value in body.items()
    }


@pytest.mark.parametrize(("index", "path", "body"), [(i, *route) for i, route in enumerate(ROUTES)])
def test_every_inference_route_is_limited_and_says_what_is_left(
    open_client: httpx.Client, index: int, path: str, body: dict[str, Any]
) -> None:
    body = of(f"two{index}", body)
    for left in ("1", "0"):
        answer = open_client.post(path, json=body)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        assert "x-ratelimit-limit-tokens" not in answer.headers
    answer = open_client.post(path, json=body)
    error = refused(answer, 429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Another tenant does not notice, and has no such headers.
    other = open_client.post(path, json=of("free", ROUTES[index][1]))
    assert other.status_code == 200
    assert not set(RATE_HEADERS) & set(other.headers)


@pytest.mark.parametrize(
    ("index", "path", "body"),
    [
        (11, "/v1/chat/completions", {"model": "two11/a", "messages": [{"role": "user", "content": "a"}]}),
        (12, "/v1/responses", {"model": "two12/a", "input": "a"}),
        (13, "/tokenize", {"model": "two13/a", "prompt": "a"}),
    ],
)
def test_conversations_are_limited_before_their_adapter_is_looked_for(
    open_client: httpx.Client, index: int, path: str, body: dict[str, Any]
) -> None:
    for left in ("1", "0"):
        answer = open_client.post(path, json=body)
        assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (404, left)
    refused(open_client.post(path, json=body), 429, "rate_limit_exceeded")


def test_a_request_that_fails_is_charged_and_says_what_is_left(open_client: httpx.Client) -> None:
    failed = open_client.post("/v1/generate", json={"adapter": "two9/a", "prompt": CRASHES})
    assert (failed.status_code, failed.headers["x-ratelimit-remaining-requests"]) == (500, "1")


def test_requests_to_the_base_model_without_keys_are_of_one_tenant(open_client: httpx.Client) -> None:
    assert open_client.post("/v1/generate", json={"prompt": "a"}).status_code == 200
    refused(open_client.post("/v1/generate", json={"prompt": "a"}), 429, "rate_limit_exceeded")


def test_the_official_client_raises_its_own_error(quota_url: str, open_client: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{quota_url}/v1", api_key="none", max_retries=0)
    for _ in range(2):
        client.completions.create(model="two10/a", prompt="a")
    with pytest.raises(openai.RateLimitError) as limited:
        client.completions.create(model="two10/a", prompt="a")
    assert limited.value.code == "rate_limit_exceeded"
    raw = client.completions.with_raw_response.create(model="both/a", prompt="a")
    assert [raw.headers[name] for name in RATE_HEADERS[:2]] == ["100", "99"]


def test_pages_of_allowed_origins_may_read_the_headers(open_client: httpx.Client) -> None:
    answer = open_client.post("/v1/classify", json={"adapter": "both/a", "inputs": ["a"]}, headers={"Origin": ORIGIN})
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {*RATE_HEADERS, "Retry-After"}
    assert set(answer.headers) >= set(RATE_HEADERS)


@pytest.mark.parametrize(
    ("index", "path", "body", "tokens"),
    [
        # The stub's prompts have 5 tokens, and its answers 3. Of a text to classify, each letter is a token.
        (0, "/v1/generate", {"adapter": "TENANT/a", "prompt": "a"}, 8),
        (1, "/v1/generate", {"adapter": "TENANT/a", "prompt": "a", "stream": True}, 8),
        (2, "/v1/completions", {"model": "TENANT/a", "prompt": "a", "n": 2}, 16),
        (3, "/v1/classify", {"adapter": "TENANT/a", "inputs": ["four", "more"]}, 8),
        (4, "/v1/classify", {"adapters": ["TENANT/a", "TENANT/b"], "inputs": ["four"]}, 8),
        (5, "/v1/embeddings", {"model": "TENANT/a", "input": ["four", "more"]}, 8),
        (6, "/v1/generate", {"adapter": "TENANT/a", "prompt": FAILS_LATER, "stream": True}, 6),
    ],
)
def test_tokens_are_charged(
    open_client: httpx.Client, index: int, path: str, body: dict[str, Any], tokens: int
) -> None:
    tenant = f"tok{index}"
    assert open_client.post(path, json=of(tenant, body)).status_code == 200
    # One token a second comes back.
    assert tokens - 1 <= usage(open_client, tenant)["tokens_this_minute"] <= tokens
    assert usage(open_client, tenant)["requests_this_minute"] == 1


@pytest.mark.parametrize(("tenant", "prompt", "tokens"), [("tok12", ENDS_BEGUN, 15), ("tok13", OTHERS_SHED, 5)])
def test_what_ran_before_a_refusal_is_charged(
    open_client: httpx.Client, quota_stub: StubEngine, tenant: str, prompt: str, tokens: int
) -> None:
    answer = open_client.post("/v1/generate", json={"adapter": f"{tenant}/a", "prompt": prompt, "n": 3})
    assert answer.status_code in (429, 504)
    # Some of the answer's tokens may have come.
    assert tokens - 1 <= usage(open_client, tenant)["tokens_this_minute"] <= tokens + len(TEXTS)
    assert quota_stub.open_streams == 0


def test_used_tokens_refuse_the_next_request(open_client: httpx.Client) -> None:
    body = {"adapter": "tok8/a", "inputs": ["x" * 90]}
    first = open_client.post("/v1/classify", json=body)
    assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "0")
    answer = open_client.post("/v1/classify", json=body)
    assert "60 tokens a minute" in refused(answer, 429, "rate_limit_exceeded")["message"]
    assert answer.headers["x-ratelimit-reset-tokens"].startswith("1m")
    assert 28 <= int(answer.headers["retry-after"]) <= 31


def test_a_stream_that_goes_on_counts_before_its_end(open_client: httpx.Client, quota_stub: StubEngine) -> None:
    body = {"adapter": "tok9/a", "prompt": SLOW, "stream": True}
    with open_client.stream("POST", "/v1/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        # The stub's slow generation counts as its prompt's 5 tokens. They are charged when the next request comes.
        other = open_client.post("/v1/classify", json={"adapter": "tok9/a", "inputs": ["a"]})
        assert other.headers["x-ratelimit-remaining-tokens"] in ("54", "55")
    wait_until(lambda: quota_stub.open_streams == 0)
    # The stream's tokens are charged once.
    assert 4 <= usage(open_client, "tok9")["tokens_this_minute"] <= 6


def test_priorities_above_the_ceiling_are_refused_by_name(open_client: httpx.Client, quota_stub: StubEngine) -> None:
    generate = {"adapter": "calm/a", "prompt": "a"}
    for path, body in (
        ("/v1/generate", generate),
        ("/v1/classify", {"adapter": "calm/a", "inputs": ["a"]}),
        ("/v1/completions", {"model": "calm/a", "prompt": "a"}),
        ("/v1/embeddings", {"model": "calm/a", "input": "a"}),
    ):
        error = refused(open_client.post(path, json=body | {"priority": "normal"}), 403, "priority_not_allowed")
        assert (error["param"], error["type"]) == ("priority", "permission_error")
        assert open_client.post(path, json=body | {"priority": "low"}).status_code == 200
        assert open_client.post(path, json=body).status_code == 200
    assert {params.priority for params in quota_stub.asked} == {"low"}
    assert {priority for priority, _ in quota_stub.classified} == {"low"}
    open_client.post("/v1/generate", json=generate | {"adapter": "free/a"})
    assert quota_stub.asked[-1].priority == "normal"


def upload(client: httpx.Client, bundle: AdapterBundle, name: str) -> httpx.Response:
    return client.post("/v1/adapters", data={"name": name}, files={"bundle": bundle.to_bytes()})


def test_adapters_and_bytes_are_limited(
    open_client: httpx.Client, writer: AdapterBundle, sorter: AdapterBundle
) -> None:
    assert upload(open_client, writer, "few/a").status_code == 201
    error = refused(upload(open_client, writer, "few/b"), 403, "quota_exceeded")
    assert error["param"] == "name"
    # A version, and content that is there already, are no new adapter.
    assert upload(open_client, sorter, "few/a").status_code == 201
    assert upload(open_client, writer, "few/a").json()["version"] == 1
    found = open_client.get("/v1/quotas/few").json()
    assert found["limits"]["adapters"] == found["usage"]["adapters"] == 1
    assert found["usage"]["bytes"] == writer.file_bytes + sorter.file_bytes
    # What is deleted makes room at once.
    assert open_client.delete("/v1/adapters/few/a").status_code == 200
    assert upload(open_client, writer, "few/b").status_code == 201
    assert refused(upload(open_client, writer, "slim/a"), 403, "quota_exceeded")["param"] == "bundle"


def test_an_operator_sets_and_clears_limits(open_client: httpx.Client) -> None:
    path, ask = "/v1/quotas/new", {"adapter": "new/a", "inputs": ["a"]}
    assert set(open_client.get(path).json()["limits"].values()) == {None}
    made = open_client.put(path, json={"requests_per_minute": 1, "max_priority": "low"}).json()
    assert made["limits"]["requests_per_minute"] == 1
    assert "new" in [quota["tenant"] for quota in open_client.get("/v1/quotas").json()["quotas"]]
    assert open_client.post("/v1/classify", json=ask).status_code == 200
    refused(open_client.post("/v1/classify", json=ask), 429, "rate_limit_exceeded")
    # What is left out stays.
    assert open_client.put(path, json={"requests_per_minute": None}).json()["limits"]["max_priority"] == "low"
    assert open_client.post("/v1/classify", json=ask).status_code == 200
    assert set(open_client.delete(path).json()["limits"].values()) == {None}


@pytest.mark.parametrize(
    ("tenant", "body", "param"),
    [
        ("acme", {"adapters": -1}, "adapters"),
        ("acme", {"adapters": 1 << 53}, "adapters"),
        ("acme", {"adapters": True}, "adapters"),
        ("acme", {"adapters": 1.5}, "adapters"),
        ("acme", {"max_priority": "top"}, "max_priority"),
        ("acme", {"speed": 1}, "speed"),
        ("Acme", {"adapters": 1}, "tenant"),
    ],
)
def test_wrong_limits_are_refused_by_name(
    open_client: httpx.Client, tenant: str, body: dict[str, Any], param: str
) -> None:
    answer = open_client.put(f"/v1/quotas/{tenant}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_tenant_that_there_cannot_be_has_no_quota(open_client: httpx.Client, method: str) -> None:
    answer = open_client.request(method, "/v1/quotas/_x", json={} if method == "PUT" else None)
    assert refused(answer, 422, "invalid_configuration")["param"] == "tenant"


def test_with_keys_a_request_is_charged_to_its_key_before_its_body_is_read(
    base: FrozenBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = AdapterStore(tmp_path_factory.mktemp("keys") / "store")
    keys = Keys(AccessDatabase(store.root))
    acme = {"Authorization": f"Bearer {keys.create('acme', ['infer']).secret}"}
    zoo = {"Authorization": f"Bearer {keys.create('zoo', ['infer']).secret}"}
    admin = {"Authorization": f"Bearer {keys.create('ops', ['admin']).secret}"}
    settings = ServeSettings(store=store.root, quotas={"acme": {"requests_per_minute": 3}})
    with live_server(build_app(StubEngine(base), store, settings)) as address, httpx.Client(base_url=address) as client:
        # A body that is no JSON, another tenant's adapter, and the base model: all count.
        wrong = client.post("/v1/generate", content=b"{", headers=acme | {"Content-Type": "application/json"})
        assert (wrong.status_code, wrong.headers["x-ratelimit-remaining-requests"]) == (400, "2")
        absent = client.post("/v1/generate", json={"adapter": "zoo/a", "prompt": "a"}, headers=acme)
        assert (absent.status_code, absent.headers["x-ratelimit-remaining-requests"]) == (404, "1")
        assert client.post("/v1/generate", json={"prompt": "a"}, headers=acme).status_code == 200
        answer = client.post("/v1/generate", content=b"{", headers=acme)
        refused(answer, 429, "rate_limit_exceeded")
        # Other routes, and other tenants, go on.
        assert client.get("/v1/adapters", headers=acme).status_code == 200
        assert client.post("/v1/generate", json={"prompt": "a"}, headers=zoo).status_code == 200
        # Each tenant sees its own quota; who operates the server sees and sets all.
        own = client.get("/v1/quotas/acme", headers=acme).json()
        assert (own["limits"]["requests_per_minute"], own["usage"]["requests_this_minute"]) == (3, 3)
        for tenant in ("acme", "nobody"):
            refused(client.get(f"/v1/quotas/{tenant}", headers=zoo), 403, "not_your_tenant")
        refused(client.get("/v1/quotas", headers=acme), 403, "insufficient_scope")
        refused(client.put("/v1/quotas/acme", json={}, headers=acme), 403, "insufficient_scope")
        assert client.put("/v1/quotas/acme", json={"bytes": 5}, headers=admin).json()["limits"]["bytes"] == 5
        assert client.put("/v1/quotas/*", json={"adapters": 9}, headers=admin).json()["usage"]["adapters"] == 0
        listed = client.get("/v1/quotas", headers=admin).json()["quotas"]
        assert {quota["tenant"] for quota in listed} == {"*", "acme"}
        for _ in range(3):
            client.delete("/v1/quotas/*", headers=admin).raise_for_status()
    audit = (store.root / "access/audit.jsonl").read_text()
    # What is cleared already is no change.
    assert (audit.count('"action": "quota.set"'), audit.count('"action": "quota.clear"')) == (2, 1)
    assert keys.all("ops")[0].id in audit
