"""The interactive page: everything that it loads comes from this server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support import browser as browsers
from support.live_server import live_server
from support.stub_engine import StubEngine
from support.tenants import make_key


def test_the_page_loads_nothing_from_another_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.findall(r"https?://", page.text)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 3 and "/openapi.json" in page.text
    for path in loaded:
        answer = client.get(path)
        assert answer.status_code == 200 and len(answer.content) > 1000, path


def test_the_script_is_swagger_ui_of_a_release_that_reads_the_document(client: httpx.Client) -> None:
    script = client.get("/docs/swagger-ui-bundle.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert "SwaggerUIBundle" in script.text
    # Releases before 5 do not read OpenAPI 3.1, in which the document is written.
    assert "isOAS31" in script.text
    assert client.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_the_page_takes_no_query_and_no_other_method(client: httpx.Client) -> None:
    assert client.get("/docs?url=https://example.com/openapi.json").status_code == 422
    assert client.post("/docs").status_code == 405


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_a_person_tries_a_route_with_a_key(base: FrozenBase, tmp_path: Path, width: int) -> None:
    store = AdapterStore(tmp_path / "store")
    key = make_key(store.root, "acme")
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root))
    size = {"width": width, "height": 900}
    with live_server(app) as url, browsers.browser() as browser, browsers.tab(browser, url, viewport=size) as tab:
        page = tab.page
        page.goto(f"{url}/docs")
        page.get_by_role("button", name="Authorize").click()
        page.get_by_label("auth-bearer-value").fill(key.secret)
        page.get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").last.click()
        route = page.locator("#operations-inference-generate_v1_generate_post")
        route.locator(".opblock-summary-control").click()
        route.get_by_role("button", name="Try it out").click()
        # What the form holds is one short body, which a route takes, and not a value of every field.
        body = json.loads(route.locator("textarea").input_value())
        assert set(body) == {"adapter", "prompt", "max_new_tokens"}
        route.locator("textarea").fill(json.dumps({**body, "adapter": None}))
        with page.expect_response(f"{url}/v1/generate") as answered:
            route.get_by_role("button", name="Execute").click()
        assert answered.value.request.headers["authorization"] == f"Bearer {key.secret}"
        assert answered.value.status == 200
        tab.check()
