"""Two tenants with keys on one server: another tenant's adapter answers as one that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.backends.local import LocalBackend
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.answers import refused
from support.factories import random_adapter
from support.live_server import live_server, wait_until
from support.tenants import clients, make_key

Ask = Callable[[httpx.Client, str], httpx.Response]
Clients = dict[str, httpx.Client]
SHAPE = SeraConfig(8, 4, 16, ("q_proj",))
SECRET, ABSENT, OWN_ABSENT = "acme/secret", "acme/absent", "rival/absent"
SELECTORS = ["", "@latest", "@stable", "@v1", "@v7", "@digest"]
# Of a response, these differ from one request to the next.
CHANGING = {"x-request-id", "date"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, base: FrozenBase, sorter: AdapterBundle) -> Path:
    """A store of two tenants; acme's `secret` exists, and its `absent` does not."""
    store = AdapterStore(tmp_path_factory.mktemp("tenants") / "store")
    store.publish(sorter, SECRET)
    store.set_alias(SECRET, "stable", f"{SECRET}@v1")
    for name in ("rival/sorter", "acme/shared", "acme/for-all", "other/for-all"):
        store.publish(sorter, name)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    writer = random_adapter(base, SHAPE, seed=3, chat_template=template)
    for name in ("rival/writer", "acme/writer"):
        store.publish(writer, name)
    return store.root


@pytest.fixture(scope="module")
def lora_paths(sorter: AdapterBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each tenant, and an adapter of none."""
    top = tmp_path_factory.mktemp("lora_paths")
    for path in ("acme/ad", "acme-2/ad", "rival/ad", "common"):
        sorter.save(top / path)
    (top / "rival" / "link").symlink_to(top / "acme" / "ad")
    (top / "rival" / "split").mkdir()
    for file in (top / "acme" / "ad").iterdir():
        (top / "rival" / "split" / file.name).symlink_to(file)
    (top / "acme" / "out").symlink_to("/etc")
    return top


@pytest.fixture(scope="module")
def people(root: Path, base: FrozenBase, lora_paths: Path) -> Iterator[Clients]:
    """Clients with keys of acme, of rival, and of an admin who belongs to a tenant of its own."""
    store = AdapterStore(root)
    settings = ServeSettings(store=root, pool_mib=2, kv_cache_tokens=512, cpu_threads=1, lora_path_root=lora_paths)
    secrets = {name: make_key(root, name).secret for name in ("acme", "rival")}
    secrets["admin"] = make_key(root, "ops", "admin").secret
    engine = ServingEngine(base, store, settings)
    with live_server(build_app(engine, store, settings)) as url, clients(url, secrets) as found:
        for name, adapter in (("rival", "acme/shared"), ("*", "acme/for-all"), ("*", "other/for-all")):
            path = f"/v1/adapters/{adapter}/shares/{name}"
            assert found["admin"].put(path).json() == {"adapter": adapter, "shared_with": [name]}
        yield found


def post(path: str, **body: Any) -> Ask:
    """A request whose body has `REF` where the adapter's name goes."""
    text = json.dumps(body)

    def ask(client: httpx.Client, reference: str) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return client.post(path, content=text.replace("REF", reference), headers=headers)

    return ask


def call(method: str, suffix: str = "", json: Any = None) -> Ask:
    return lambda client, reference: client.request(method, f"/v1/adapters/{reference}{suffix}", json=json)


def parts(*names: str) -> list[dict[str, Any]]:
    return [{"adapter": name, "weight": 0.5} for name in names]


MESSAGES = [{"role": "user", "content": "a"}]
# By what a request does; each names an adapter with any selector.
NAMING: dict[str, Ask] = {
    "generate": post("/v1/generate", adapter="REF", prompt="a", max_new_tokens=1),
    "generate, streamed": post("/v1/generate", adapter="REF", prompt="a", stream=True),
    "generate, several": post("/v1/generate", adapter="REF", prompt="a", n=2),
    "a sum": post("/v1/generate", adapter=parts("REF"), prompt="a"),
    "a sum with its own": post("/v1/generate", adapter=parts("rival/writer", "REF"), prompt="a"),
    "classify": post("/v1/classify", adapter="REF", inputs=["a"]),
    "classify by a sum": post("/v1/classify", adapter=parts("rival/sorter", "REF"), inputs=["a"]),
    "classify by each": post("/v1/classify", adapters=["rival/sorter", "REF"], inputs=["a"]),
    "classify by one of them": post("/v1/classify", adapters=["REF"], inputs=["a"]),
    "embeddings": post("/v1/embeddings", model="REF", input="a"),
    "completions": post("/v1/completions", model="REF", prompt="a"),
    "completions, streamed": post("/v1/completions", model="REF", prompt="a", stream=True),
    "chat": post("/v1/chat/completions", model="REF", messages=MESSAGES),
    "chat, streamed": post("/v1/chat/completions", model="REF", messages=MESSAGES, stream=True),
    "responses": post("/v1/responses", model="REF", input="a"),
    "tokenize": post("/tokenize", model="REF", prompt="a"),
    "tokenize a chat": post("/tokenize", model="REF", messages=MESSAGES),
    "model": lambda client, reference: client.get(f"/v1/models/{reference}"),
    "delete a model": lambda client, reference: client.delete(f"/v1/models/{reference}"),
    "inspect": call("GET"),
    "delete": call("DELETE"),
    "pin": call("PUT", "/pin"),
    "unpin": call("DELETE", "/pin"),
}
# Each names a whole adapter.
WHOLE: dict[str, Ask] = {
    "versions": call("GET", "/versions"),
    "alias": call("PUT", "/aliases/next", {"version": 1}),
    "alias of a version that is not there": call("PUT", "/aliases/next", {"version": 9}),
    "remove alias": call("DELETE", "/aliases/stable"),
    "shares": call("GET", "/shares"),
    "share": call("PUT", "/shares/rival"),
    "share with all": call("PUT", "/shares/*"),
    "end share": call("DELETE", "/shares/zoo"),
    "unload": post("/v1/unload_lora_adapter", lora_name="REF"),
}
CASES = [(name, ask, selector) for name, ask in NAMING.items() for selector in SELECTORS]
CASES += [(name, ask, "") for name, ask in WHOLE.items()]


def answer(response: httpx.Response, name: str) -> tuple[int, str, dict[str, str]]:
    """Status, body without the adapter's name, and headers of a response."""
    headers = {key: value for key, value in response.headers.items() if key not in CHANGING}
    return response.status_code, response.text.replace(name, "NAME"), headers


@pytest.mark.parametrize(("what", "ask", "selector"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_foreign_adapter_answers_as_one_that_does_not_exist(
    people: Clients,
    root: Path,
    sorter: AdapterBundle,
    what: str,
    ask: Ask,
    selector: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selector = selector.replace("digest", sorter.digest[:12])
    asked: list[str] = []
    for method in ("manifest", "alias", "version", "bundle_bytes", "read_bundle", "commit", "list_page"):
        original = getattr(LocalBackend, method)

        def counted(self: LocalBackend, *args: Any, _original: Any = original, _method: str = method) -> Any:
            asked.append(_method)
            return _original(self, *args)

        monkeypatch.setattr(LocalBackend, method, counted)
    exists = answer(ask(people["rival"], SECRET + selector), SECRET)
    absent = answer(ask(people["rival"], ABSENT + selector), ABSENT)
    assert exists == absent
    assert exists[0] == 404 and "'NAME' is not in the store" in exists[1], exists
    # The same work: none of the store's.
    assert asked == []
    own = answer(ask(people["rival"], OWN_ABSENT + selector), OWN_ABSENT)
    for headers in (own[2], exists[2]):
        del headers["content-length"]
    assert own == exists
    assert asked
    assert AdapterStore(root).inspect(SECRET).aliases == {"latest": 1, "stable": 1}


def test_publishing_under_a_foreign_name_is_forbidden(people: Clients, root: Path, sorter: AdapterBundle) -> None:
    for name in (SECRET, ABSENT, "nobody/here", "acme/shared"):
        files = {"bundle": ("a.safetensors", sorter.to_bytes())}
        uploaded = people["rival"].post("/v1/adapters", files=files, data={"name": name})
        loaded = people["rival"].post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "x"})
        for response, field in ((uploaded, "name"), (loaded, "lora_name")):
            error = refused(response, 403, "not_your_tenant")
            assert error["param"] == field
            assert "rival/" in error["message"] and error["message"].count(name) == 1
    assert AdapterStore(root).inspect(SECRET).versions == (1,)
    with pytest.raises(Exception, match="not in the store"):
        AdapterStore(root).inspect(ABSENT)


def test_paths_of_another_tenant_are_not_there(people: Clients, lora_paths: Path) -> None:
    def load(who: str, path: object) -> httpx.Response:
        body = {"lora_name": f"{'acme' if who == 'admin' else who}/by-path", "lora_path": str(path)}
        return people[who].post("/v1/load_lora_adapter", json=body)

    def message(path: object) -> str:
        return str(refused(load("rival", path), 422, "missing_file")["message"]).replace(str(path), "PATH")

    absent = message("rival/absent")
    relative = ["acme/ad", "acme/absent", "acme/out", "rival/../acme/ad", "rival/link", "acme", ".", "..", "common"]
    for path in [*relative, lora_paths / "acme" / "ad", "/etc", "/etc/absent"]:
        assert message(path) == absent, path
    # A tenant's name that begins another one's.
    assert "is not there" in refused(load("acme", "acme-2/ad"), 422, "missing_file")["message"]
    refused(load("rival", "rival/split"), 422, "missing_file")
    for who, paths in {"rival": ["rival/ad", lora_paths / "rival" / "ad"], "admin": ["acme/ad", "common"]}.items():
        for path in paths:
            assert load(who, path).status_code == 200, path
    refused(load("admin", "acme/out"), 403, "path_not_allowed")
    for who in ("rival", "admin"):
        name = "rival/by-path" if who == "rival" else "acme/by-path"
        assert people[who].post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


def test_a_shared_adapter_is_used_and_not_changed(people: Clients) -> None:
    rival = people["rival"]
    for name in ("acme/shared", "acme/for-all@v1", "other/for-all@latest"):
        body = {"adapter": name, "inputs": ["a"]}
        assert rival.post("/v1/classify", json=body).json()["adapter"] == name.partition("@")[0]
        assert rival.get(f"/v1/models/{name}").json()["id"] == name
    # Of two tenants, in one request: the request is the key's tenant's.
    each = rival.post("/v1/classify", json={"adapters": ["rival/sorter", "acme/shared"], "inputs": ["a"]})
    assert [one["adapter"] for one in each.json()["adapters"]] == ["rival/sorter", "acme/shared"]
    assert rival.get("/v1/adapters/acme/shared/versions").json()["versions"][0]["version"] == 1
    for method, suffix, body in (
        ("DELETE", "", None),
        ("DELETE", "@v1", None),
        ("PUT", "/pin", None),
        ("DELETE", "/pin", None),
        ("PUT", "/aliases/mine", {"version": 1}),
        ("DELETE", "/aliases/latest", None),
        ("GET", "/shares", None),
        ("PUT", "/shares/zoo", None),
        ("DELETE", "/shares/rival", None),
    ):
        response = rival.request(method, f"/v1/adapters/acme/shared{suffix}", json=body)
        refused(response, 403, "not_your_tenant")
    refused(rival.delete("/v1/models/acme/shared"), 403, "not_your_tenant")
    unloaded = rival.post("/v1/unload_lora_adapter", json={"lora_name": "acme/shared"})
    assert refused(unloaded, 403, "not_your_tenant")["param"] == "lora_name"


def pages(client: httpx.Client, path: str, limit: int, **query: str) -> list[str]:
    """The ids of all pages of a list. Each page but the last one is full."""
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        content = client.get(path, params={"limit": limit, **query, **after}).raise_for_status().json()
        if path == "/v1/adapters":
            found, following = [item["adapter"] for item in content["adapters"]], content["next"]
        else:
            found = [item["id"] for item in content["data"] if "/" in item["id"]]
            following = content["last_id"] if content["has_more"] else None
        seen += found
        if following is None:
            return seen
        assert len(found) == limit
        after = {"after": following}


RIVALS = ["acme/for-all", "acme/shared", "other/for-all", "rival/sorter", "rival/writer"]


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/models"])
def test_lists_have_the_own_adapters_and_those_shared(people: Clients, path: str) -> None:
    for limit in range(1, 8):
        assert pages(people["rival"], path, limit) == RIVALS
        assert pages(people["acme"], path, limit) == [
            *("acme/for-all", "acme/secret", "acme/shared", "acme/writer"),
            "other/for-all",
        ]
        assert SECRET in pages(people["admin"], path, limit)


def test_lists_begin_anywhere_and_filter_by_tenant(people: Clients) -> None:
    def listed(**query: str) -> list[str]:
        return pages(people["rival"], "/v1/adapters", 2, **query)

    assert listed(tenant="acme") == ["acme/for-all", "acme/shared"]
    assert listed(tenant="rival") == ["rival/sorter", "rival/writer"]
    assert listed(tenant="nobody") == listed(tenant="other-one") == []
    # Whether an `after` exists tells nothing.
    for after, then in ((SECRET, "acme/shared"), ("acme/secreu", "acme/shared"), (ABSENT, "acme/for-all")):
        first = people["rival"].get("/v1/adapters", params={"after": after, "limit": 1}).json()
        assert [item["adapter"] for item in first["adapters"]] == [then]


def test_a_share_begins_and_ends_at_once(people: Clients, root: Path, sorter: AdapterBundle) -> None:
    store = AdapterStore(root)
    store.publish(sorter, "acme/lent")
    acme, rival = people["acme"], people["rival"]
    ask = NAMING["classify"]
    refused(ask(rival, "acme/lent"), 404, "adapter_not_found")
    for _ in range(2):
        assert acme.put("/v1/adapters/acme/lent/shares/rival").json()["shared_with"] == ["rival"]
    assert ask(rival, "acme/lent").status_code == 200
    assert acme.put("/v1/adapters/acme/lent/shares/*").json()["shared_with"] == ["*", "rival"]
    assert acme.delete("/v1/adapters/acme/lent/shares/rival").json()["shared_with"] == ["*"]
    assert ask(rival, "acme/lent").status_code == 200
    for _ in range(2):
        assert acme.delete("/v1/adapters/acme/lent/shares/*").json()["shared_with"] == []
    refused(ask(rival, "acme/lent"), 404, "adapter_not_found")
    # A share ends with its adapter.
    acme.put("/v1/adapters/acme/lent/shares/rival").raise_for_status()
    acme.delete("/v1/adapters/acme/lent").raise_for_status()
    store.publish(sorter, "acme/lent")
    refused(ask(rival, "acme/lent"), 404, "adapter_not_found")
    assert acme.get("/v1/adapters/acme/lent/shares").json()["shared_with"] == []
    for other, code in (("acme", "invalid_request"), ("A", "invalid_adapter_name")):
        response = acme.put(f"/v1/adapters/acme/lent/shares/{other}")
        assert refused(response, 422, code)["param"] == "with"
    acme.delete("/v1/adapters/acme/lent").raise_for_status()


@pytest.mark.parametrize("last", ["@v2", "@latest", "@stable", ""])
def test_shares_end_with_the_last_version(last: str, people: Clients, root: Path, sorter: AdapterBundle) -> None:
    store, acme = AdapterStore(root), people["acme"]
    name = f"acme/last-{last.removeprefix('@') or 'whole'}"
    for seed in (1, 2):
        store.publish(
            AdapterBundle(sorter.config.model_copy(update={"training": {"seed": seed}}), sorter.tensors), name
        )
    acme.put(f"/v1/adapters/{name}/shares/rival").raise_for_status()
    acme.delete(f"/v1/adapters/{name}@v1").raise_for_status()
    assert acme.get(f"/v1/adapters/{name}/shares").json()["shared_with"] == ["rival"]
    if last == "@stable":
        # A version with an alias stays, and so do the shares.
        acme.put(f"/v1/adapters/{name}/aliases/stable", json={"version": 2}).raise_for_status()
        refused(acme.delete(f"/v1/adapters/{name}{last}"), 409, "version_in_use")
        assert acme.get(f"/v1/adapters/{name}/shares").json()["shared_with"] == ["rival"]
        last = ""
    acme.delete(f"/v1/adapters/{name}{last}").raise_for_status()
    store.publish(sorter, name)
    refused(NAMING["classify"](people["rival"], name), 404, "adapter_not_found")
    assert acme.get(f"/v1/adapters/{name}/shares").json()["shared_with"] == []
    acme.delete(f"/v1/adapters/{name}").raise_for_status()


def test_a_first_version_begins_without_shares(people: Clients, root: Path, sorter: AdapterBundle) -> None:
    store, acme, name = AdapterStore(root), people["acme"], "acme/again"
    files = {"bundle": ("a.safetensors", sorter.to_bytes())}
    acme.post("/v1/adapters", files=files, data={"name": name}).raise_for_status()
    acme.put(f"/v1/adapters/{name}/shares/rival").raise_for_status()
    # A further version keeps them.
    other = AdapterBundle(sorter.config.model_copy(update={"training": {"seed": 7}}), sorter.tensors)
    acme.post(
        "/v1/adapters", files={"bundle": ("a.safetensors", other.to_bytes())}, data={"name": name}
    ).raise_for_status()
    assert NAMING["classify"](people["rival"], name).status_code == 200
    # As a command leaves it that is killed before the end of the shares.
    store.delete(name)
    acme.post("/v1/adapters", files=files, data={"name": name}).raise_for_status()
    refused(NAMING["classify"](people["rival"], name), 404, "adapter_not_found")
    assert acme.get(f"/v1/adapters/{name}/shares").json()["shared_with"] == []
    acme.delete(f"/v1/adapters/{name}").raise_for_status()


def test_a_share_of_an_adapter_that_is_gone_breaks_no_list(people: Clients, root: Path, sorter: AdapterBundle) -> None:
    store = AdapterStore(root)
    store.publish(sorter, "acme/going")
    people["acme"].put("/v1/adapters/acme/going/shares/*").raise_for_status()
    # Not by the command, which ends the share.
    store.delete("acme/going")
    assert pages(people["rival"], "/v1/adapters", 2) == RIVALS
    refused(people["acme"].delete("/v1/adapters/acme/going"), 404, "adapter_not_found")
    store.publish(sorter, "acme/going")
    assert pages(people["rival"], "/v1/adapters", 2) == RIVALS
    store.delete("acme/going")


def test_admins_act_for_every_tenant(people: Clients, sorter: AdapterBundle) -> None:
    admin = people["admin"]
    files = {"bundle": ("a.safetensors", sorter.to_bytes())}
    admin.post("/v1/adapters", files=files, data={"name": "zoo/ants"}).raise_for_status()
    assert NAMING["classify"](admin, "zoo/ants@v1").status_code == 200
    assert admin.put("/v1/adapters/zoo/ants/aliases/stable", json={"version": 1}).json() == {
        "adapter": "zoo/ants",
        "alias": "stable",
        "version": 1,
    }
    admin.delete("/v1/adapters/zoo/ants").raise_for_status()
    refused(NAMING["classify"](admin, "zoo/ants"), 404, "adapter_not_found")


def test_versions_are_listed_newest_first_and_by_pages(people: Clients, root: Path, base: FrozenBase) -> None:
    store = AdapterStore(root)
    for seed in range(5):
        training = {"metrics": {"accuracy": seed / 4, "note": "no number", "yes": True}, "description": f"try {seed}"}
        store.publish(random_adapter(base, SHAPE, seed=seed, training=training), "acme/many")
    acme, path = people["acme"], "/v1/adapters/acme/many/versions"
    whole = acme.get(path).json()
    assert (whole["adapter"], whole["aliases"], whole["next"]) == ("acme/many", {"latest": 5}, None)
    assert [version["version"] for version in whole["versions"]] == [5, 4, 3, 2, 1]
    newest = whole["versions"][0]
    assert newest["metrics"] == {"accuracy": 1.0} and newest["description"] == "try 4"
    assert newest["card"] == {"description": "try 4", "metrics": "accuracy 1, note no number, yes true"}
    assert (newest["ranks"], newest["splits"], newest["task"]) == ([8], [4], "generate")
    for limit in range(1, 7):
        seen, before = [], {}
        while True:
            page = acme.get(path, params={"limit": limit, **before}).json()
            seen += page["versions"]
            if page["next"] is None:
                break
            before = {"before": page["next"]}
        assert seen == whole["versions"]
    # An alias goes back, and `latest` too.
    assert acme.put("/v1/adapters/acme/many/aliases/latest", json={"version": 2}).status_code == 200
    assert acme.get("/v1/models/acme/many").json()["root"] == "acme/many@v2"
    acme.put("/v1/adapters/acme/many/aliases/stable", json={"version": 4}).raise_for_status()
    gone = acme.delete("/v1/adapters/acme/many/aliases/stable").json()
    assert gone == {"adapter": "acme/many", "alias": "stable", "version": 4}
    for name, fields in (("many", ["alias", "version"]), ("none", ["adapter", "adapter"])):
        path = f"/v1/adapters/acme/{name}/aliases/stable"
        answers = acme.delete(path), acme.put(path, json={"version": 6})
        assert [refused(answer, 404, "adapter_not_found")["param"] for answer in answers] == fields
    assert refused(acme.delete("/v1/adapters/acme/many/aliases/latest"), 422, "invalid_adapter_name")
    for version in (0, 6, "2", None):
        response = acme.put("/v1/adapters/acme/many/aliases/x", json={"version": version})
        refused(response, 404 if version == 6 else 422, "adapter_not_found" if version == 6 else "invalid_value")
    refused(acme.get("/v1/adapters/acme/many@v1/versions"), 422, "invalid_adapter_name")
    acme.delete("/v1/adapters/acme/many").raise_for_status()


def test_prompts_of_two_tenants_share_no_cache(people: Clients) -> None:
    """The same long prompt to the base: a tenant finds its own pages again, and never the other's."""
    prompt = "You answer in the words of sailors. " * 5
    cached = []
    for name in ("acme", "rival", "acme", "rival"):
        client = people[name]
        with openai.OpenAI(
            base_url=f"{client.base_url}/v1", api_key=client.headers["authorization"].removeprefix("Bearer ")
        ) as official:
            usage = official.completions.create(model="random-llama", prompt=prompt, max_tokens=1).usage
        assert usage is not None
        details = usage.prompt_tokens_details
        cached.append(0 if details is None else details.cached_tokens)
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) > 100 and cached[2] == cached[3]


def test_every_change_is_recorded_and_no_secret(people: Clients, root: Path, sorter: AdapterBundle) -> None:
    acme = people["acme"]
    log = root / "access" / "audit.jsonl"
    before = len(log.read_text().splitlines())
    files = {"bundle": ("a.safetensors", sorter.to_bytes())}
    acme.post("/v1/adapters", files=files, data={"name": "acme/logged"}).raise_for_status()
    for method, suffix, body in (
        ("PUT", "/pin", None),
        ("DELETE", "/pin", None),
        ("PUT", "/aliases/stable", {"version": 1}),
        ("DELETE", "/aliases/stable", None),
        ("PUT", "/shares/rival", None),
        ("DELETE", "/shares/rival", None),
        ("DELETE", "", None),
    ):
        acme.request(method, f"/v1/adapters/acme/logged{suffix}", json=body).raise_for_status()
    NAMING["generate"](acme, "acme/writer").raise_for_status()
    wait_until(lambda: len(log.read_text().splitlines()) >= before + 8)
    lines = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert [line["action"] for line in lines] == [
        *("adapter.publish", "adapter.pin", "adapter.unpin", "alias.set", "alias.remove"),
        *("share.add", "share.remove", "adapter.delete"),
    ]
    assert {(line["tenant"], line["target"], line["source"]) for line in lines} == {("acme", "acme/logged", "http")}
    key_id = acme.get("/v1/me").json()["key_id"]
    assert {line["key_id"] for line in lines} == {key_id}
    assert lines[0]["digest"] == sorter.digest and lines[5]["with"] == "rival"
    assert "sk-sera" not in log.read_text()


def test_the_official_client_sees_no_foreign_model(people: Clients) -> None:
    rival = people["rival"]
    key = rival.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{rival.base_url}/v1", api_key=key, max_retries=0) as client:
        assert [model.id for model in client.models.list() if "/" in model.id] == RIVALS
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=SECRET, prompt="a")
    assert caught.value.code == "model_not_found"
