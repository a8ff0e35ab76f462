"""Web pages of other sites cannot change anything, nor read anything under a name of their own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.server import build_app
from sera_serve.server.browsers import BrowserRules
from support.answers import refused
from support.live_server import live_server
from support.stub_engine import StubEngine

CONSOLE = "https://console.example.com"


def rules(host: str = "127.0.0.1", hosts: str = "", origins: str = "") -> BrowserRules:
    return BrowserRules(ServeSettings(host=host, allowed_hosts=hosts, allowed_origins=origins))  # type: ignore[arg-type]


def allowed(check: object, *arguments: object) -> bool:
    assert callable(check)
    try:
        check(*arguments)
    except SeraServeError as error:
        assert error.status == 403
        return False
    return True


@pytest.mark.parametrize(
    ("host", "hosts", "good", "bad"),
    [
        (
            "127.0.0.1",
            "",
            "127.0.0.1 localhost LocalHost:8000 localhost. a.localhost:1 [::1]:8000 [::1] 10.0.0.7:80 127.0.0.1:8000",
            "evil.example evil.example:8000 localhost.evil.example notlocalhost 127.0.0.1.nip.io [::1]evil [x] a@[::1]",
        ),
        ("::1", "", "[::1]:8000 [0:0::1] localhost", "evil.example [evil.example]"),
        ("localhost", "", "localhost 127.0.0.1:8000", "evil.example localhost:port :8000"),
        ("0.0.0.0", "", "evil.example 10.0.0.7", ""),
        ("models.example", "", "models.example anything.example", ""),
        (
            "0.0.0.0",
            "models.example, [::1]:8000, 10.0.0.7",
            "models.example MODELS.example.:443 [::1]:1 10.0.0.7:9",
            "a.models.example localhost 10.0.0.8 evil.example",
        ),
        ("127.0.0.1", "models.example", "models.example", "localhost 127.0.0.1"),
        ("127.0.0.1", "models.example,*", "evil.example", ""),
    ],
)
def test_a_server_answers_to_its_own_names(host: str, hosts: str, good: str, bad: str) -> None:
    found = rules(host=host, hosts=hosts)
    for name in good.split():
        assert allowed(found.check_host, name), name
    for name in bad.split():
        assert not allowed(found.check_host, name), name


@pytest.mark.parametrize(
    ("origins", "site", "sent", "host", "good"),
    [
        # No browser sent it.
        ("", None, [], "localhost:8000", True),
        # Pages of the server itself, and addresses that the user typed in.
        ("", "same-origin", ["http://localhost:8000"], "localhost:8000", True),
        ("", "none", [], "localhost:8000", True),
        ("", None, ["http://localhost"], "localhost:80", True),
        ("", None, ["https://models.example"], "MODELS.example:443", True),
        ("", None, ["http://[::1]:8000"], "[0:0::1]:8000", True),
        # Other pages.
        ("", "cross-site", [], "localhost:8000", False),
        ("", "same-site", ["http://localhost:8000"], "localhost:8000", False),
        ("", "something-new", [], "localhost:8000", False),
        ("", None, ["http://localhost:3000"], "localhost:8000", False),
        ("", None, ["http://localhost"], "localhost:8000", False),
        ("", None, ["https://localhost"], "localhost:80", False),
        ("", None, ["null"], "localhost:8000", False),
        ("", None, [""], "localhost:8000", False),
        ("", None, ["http://localhost:8000", "null"], "localhost:8000", False),
        ("", "same-origin", ["http://localhost:8000.evil.example"], "localhost:8000", False),
        ("", None, ["http://localhost:8000"], None, False),
        # Pages that the operator allows.
        (CONSOLE, "cross-site", [CONSOLE], "localhost:8000", True),
        (f"{CONSOLE}:443/", "same-site", [CONSOLE], "localhost:8000", True),
        (CONSOLE, "cross-site", ["http://console.example.com"], "localhost:8000", False),
        (CONSOLE, "cross-site", [f"{CONSOLE}.evil.example"], "localhost:8000", False),
        (CONSOLE, "cross-site", [CONSOLE, "null"], "localhost:8000", False),
        (CONSOLE, "cross-site", [], "localhost:8000", False),
        (f"{CONSOLE},*", "cross-site", ["null"], "localhost:8000", True),
    ],
)
def test_a_page_of_another_origin_may_change_nothing(
    origins: str, site: str | None, sent: list[str], host: str | None, good: bool
) -> None:
    assert allowed(rules(origins=origins).check_origin, sent, site, host) == good


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("allowed_origins", "console.example.com"),
        ("allowed_origins", "https://console.example.com/path"),
        ("allowed_origins", "null"),
        ("allowed_hosts", "https://models.example"),
        ("allowed_hosts", "*.models.example"),
        ("allowed_hosts", "a b"),
    ],
)
def test_an_entry_that_could_never_match_is_refused(setting: str, value: str) -> None:
    with pytest.raises(InvalidConfiguration, match=setting) as caught:
        BrowserRules(ServeSettings(**{setting: value}))
    assert caught.value.param == setting


def publish(client: httpx.Client, bundle: AdapterBundle, headers: dict[str, str]) -> httpx.Response:
    files = {"bundle": ("a.safetensors", bundle.to_bytes())}
    return client.post("/v1/adapters", files=files, data={"name": "demo/writer"}, headers=headers)


def test_a_form_of_another_site_publishes_nothing(
    client: httpx.Client, store: AdapterStore, sorter: AdapterBundle
) -> None:
    before = store.resolve("demo/writer")
    # A form needs no permission of its own: browsers send it with these headers, and no preflight before it.
    error = refused(publish(client, sorter, {"Origin": "https://evil.example"}), 403, "cross_site_request")
    assert "allowed_origins" in error["message"]
    refused(publish(client, sorter, {"Sec-Fetch-Site": "cross-site"}), 403, "cross_site_request")
    refused(publish(client, sorter, {"Host": "evil.example:8000"}), 403, "host_not_allowed")
    for method, path in (("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
        answer = client.request(method, f"/v1/adapters/demo/writer{path}", headers={"Origin": "null"})
        refused(answer, 403, "cross_site_request")
    assert store.resolve("demo/writer") == before


@pytest.mark.parametrize("path", ["/v1/adapters", "/metrics", "/healthz", "/readyz", "/openapi.json", "/nothing"])
def test_no_path_answers_to_a_foreign_name(client: httpx.Client, path: str) -> None:
    error = refused(client.get(path, headers={"Host": "evil.example"}), 403, "host_not_allowed")
    assert "allowed_hosts" in error["message"] and "evil.example" in error["message"]


def test_without_leave_a_page_may_read_nothing(client: httpx.Client) -> None:
    # The browser keeps the answer from the page, because the answer names no origin.
    answer = client.get("/v1/adapters", headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
    refused(client.options("/v1/adapters/demo/writer", headers=preflight), 403, "cross_site_request")


@pytest.mark.parametrize("method", ["PATCH", "delete", "X" * 5000])
def test_a_preflight_for_a_method_that_nothing_has_is_refused(console: httpx.Client, method: str) -> None:
    answer = console.options("/v1/adapters/demo/writer", headers={"Access-Control-Request-Method": method})
    error = refused(answer, 400, "bad_request")
    assert error["param"] == "Access-Control-Request-Method" and "DELETE" in error["message"]
    assert answer.headers["content-type"] == "application/json" and "Origin" in answer.headers["vary"]
    assert answer.headers["access-control-allow-origin"] == CONSOLE


@pytest.fixture
def console(base: FrozenBase, store: AdapterStore) -> Iterator[httpx.Client]:
    settings = ServeSettings(store=store.root, allowed_origins=[CONSOLE])
    with (
        live_server(build_app(StubEngine(base), store, settings)) as url,
        httpx.Client(base_url=url, headers={"Origin": CONSOLE, "Sec-Fetch-Site": "cross-site"}) as client,
    ):
        yield client


def test_an_allowed_page_may_do_everything(console: httpx.Client) -> None:
    headers = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "content-type"}
    preflight = console.options("/v1/adapters/demo/writer", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == CONSOLE
    assert "DELETE" in preflight.headers["access-control-allow-methods"]
    for answer in (
        console.post("/v1/generate", json={"prompt": "a"}),
        console.get("/v1/adapters"),
        console.get("/nothing"),
    ):
        assert answer.headers["access-control-allow-origin"] == CONSOLE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    refused(
        console.post("/v1/generate", json={"prompt": "a"}, headers={"Origin": "https://evil.example"}),
        403,
        "cross_site_request",
    )
