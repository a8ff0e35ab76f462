"""The console's files: what is served, with which headers, and that the libraries are those that the notes name."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

import httpx
import pytest

from sera_serve.server.console.pages import static_files
from support.answers import refused

REPOSITORY = Path(__file__).resolve().parents[2]
CONSOLE = REPOSITORY / "sera_serve" / "server" / "console"
VENDOR = CONSOLE / "vendor"
# What a first visit loads, in bytes: nothing is compressed.
FIRST_VIEW_BYTES = 150_000
SERVED = {".html", ".js", ".css", ".svg"}


def imported(name: str) -> set[str]:
    """The files that a module loads before it runs, itself too."""
    found, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            folder = (CONSOLE / module).parent
            for path in re.findall(r'^(?:import|export|\}) [^;]*?from ["\'](\.[^"\']+)', static_text(module), re.M):
                waiting.append((folder / path).resolve().relative_to(CONSOLE.resolve()).as_posix())
    return found


def static_text(name: str) -> str:
    return static_files()[name].content.decode("utf-8")


def test_the_page_has_a_strict_policy_and_loads_its_own_files(client: httpx.Client) -> None:
    page = client.get("/console")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"] and "http" not in policy.values()
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) > 3
    for path in loaded:
        assert path.startswith("console/"), path
        assert client.get(f"/{path}").status_code == 200, path
    # No script and no style in the page itself: the policy forbids both.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page.text)


def test_every_file_of_the_page_is_served_with_its_type_and_no_other_name(client: httpx.Client) -> None:
    names = {path.relative_to(CONSOLE).as_posix() for path in CONSOLE.rglob("*") if path.suffix in SERVED}
    assert set(static_files()) == names and len(names) > 25
    for name in names:
        answer = client.get(f"/console/{name}")
        assert answer.content == (CONSOLE / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("pages.py", "__init__.py", "js", "vendor/README.md", "js/../pages.py", "%2e%2e/app.py", "nothing.js"):
        refused(client.get(f"/console/{name}"), 404, "not_found")


def test_a_browser_gets_a_file_again_only_if_it_changed(client: httpx.Client) -> None:
    first = client.get("/console/style.css")
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    assert etag == f'"{hashlib.sha256(first.content).hexdigest()}"'
    for header in (etag, f"W/{etag}", f'"other", {etag}'):
        again = client.get("/console/style.css", headers={"If-None-Match": header})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get("/console/style.css", headers={"If-None-Match": '"other"'}).content == first.content
    assert client.head("/console/style.css").headers["etag"] == etag


def test_an_address_with_a_slash_leads_to_the_page(client: httpx.Client) -> None:
    answer = client.get("/console/", follow_redirects=True)
    assert answer.url.path == "/console" and "sera-serve" in answer.text
    assert client.post("/console").status_code == 405
    assert client.get("/console?key=1").status_code == 422


def test_the_first_view_is_small() -> None:
    first = {"index.html", "style.css", "icon.svg"} | imported("js/app.js") | imported("js/views/adapters.js")
    assert "vendor/htm/standalone.module.js" in first and "js/api.js" in first
    assert sum(len(static_files()[name].content) for name in first) < FIRST_VIEW_BYTES


@pytest.mark.parametrize("name", sorted(name for name in static_files() if name.endswith(".js")))
def test_no_module_makes_markup_or_code_of_a_text(name: str) -> None:
    # The policy would refuse it, and only in a browser that knows trusted types.
    if not name.startswith("vendor/"):
        text = static_text(name)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|dangerouslySet|document\.write|\beval\(", text)
        assert not re.search(r"https?://", text)
        assert len(text.splitlines()) <= 600


def test_the_libraries_are_those_of_the_notes() -> None:
    rows = re.findall(r"^\| (\S+/\S+) \| (\S+) \| (\S+) \| (.*?) \| ([0-9a-f]{64}) \|$", notes(), re.M)
    assert {row[0] for row in rows} == {path.relative_to(VENDOR).as_posix() for path in VENDOR.glob("*/*")}
    for name, _, _, _, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    for folder in VENDOR.iterdir():
        assert folder.is_file() or any("LICENSE" in path.name for path in folder.iterdir()), folder


def test_the_package_has_every_file() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    setuptools = project["tool"]["setuptools"]
    assert "sera_serve.server.console" in setuptools["packages"]
    patterns = setuptools["package-data"]["sera_serve.server.console"]
    packed = {path for pattern in patterns for path in CONSOLE.glob(pattern) if path.is_file()}
    missing = {path for path in CONSOLE.rglob("*") if path.is_file() and path.suffix != ".pyc"} - packed
    assert {path.suffix for path in missing} == {".py"}


def notes() -> str:
    return (VENDOR / "README.md").read_text("utf-8")
