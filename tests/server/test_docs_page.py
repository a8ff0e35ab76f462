"""The interactive page: everything that it loads comes from this server."""

from __future__ import annotations

import re

import httpx


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
