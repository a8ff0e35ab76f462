"""The documents cannot drift from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import adapters_store.errors
import sera_serve.errors
from adapters_store import AdapterStore, StoreError
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.request import TRANSITIONS as REQUEST_TRANSITIONS
from sera_serve.errors import SeraServeError
from sera_serve.residency import TRANSITIONS as ADAPTER_TRANSITIONS
from sera_serve.server import build_app, errors, strict
from sera_serve.server.native import schemas, uploads
from support.factories import random_decoder

REPOSITORY = Path(__file__).resolve().parents[1]
HTTP = (REPOSITORY / "docs" / "http.md").read_text(encoding="utf-8")
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def section(title: str) -> str:
    """The text under a heading of docs/http.md."""
    return HTTP.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_route_has_a_section(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    settings = ServeSettings(store=store.root, pool_mib=1, kv_cache_tokens=64)
    engine = ServingEngine(random_decoder(), store, settings)
    paths = build_app(engine, store, settings).openapi()["paths"]
    engine.stop()
    headings = "\n".join(line for line in HTTP.splitlines() if line.startswith("## "))
    for path, methods in paths.items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in headings


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("`POST /v1/generate`", schemas.GenerateRequest),
        ("`POST /v1/generate`", schemas.GenerateResponse),
        ("`POST /v1/classify`", schemas.ClassifyRequest),
        ("`POST /v1/classify`", schemas.ClassifyResponse),
        ("`GET /v1/adapters`", schemas.ListQuery),
        ("`GET /v1/adapters`", schemas.AdapterSummary),
        ("`POST /v1/adapters`", schemas.PublishedAdapter),
        ("Errors", errors.ErrorDetail),
    ],
)
def test_every_field_is_described(title: str, model: type[BaseModel]) -> None:
    text = section(title)
    for field in model.model_fields:
        assert f"`{field}`" in text or f'"{field}"' in text, field


def test_every_setting_is_described_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", section("Settings"), re.MULTILINE)
    fields = ServeSettings.model_fields
    assert rows == [(name, str(field.default), field.description) for name, field in fields.items()]


def test_every_error_code_is_in_the_row_of_its_status() -> None:
    classes = {
        kind
        for module in (sera_serve.errors, adapters_store.errors, errors, strict, uploads)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, SeraServeError | StoreError)
    }
    documented: dict[int, set[str]] = {}
    for status, kind, codes in re.findall(r"^\| (\d+).*? \| `(\w+)` \| (.*) \|$", section("Errors"), re.MULTILINE):
        assert errors.error_type(int(status)) == kind
        documented.setdefault(int(status), set()).update(re.findall(r"`(\w+)`", codes))
    for kind in classes:
        # An OSError's twin may have a status of its own on the command line alone.
        assert kind.code in documented[kind.status], kind


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_readme_names_targets_that_the_makefile_has() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8")))
    assert {"serve", "test"} <= named <= targets


def test_the_drawn_states_are_those_of_the_code() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawings = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    assert len(drawings) == 2
    for drawing, transitions in zip(drawings, (REQUEST_TRANSITIONS, ADAPTER_TRANSITIONS), strict=True):
        drawn = set(re.findall(r"^ *([A-Z_]+) --> ([A-Z_]+):", drawing, re.MULTILINE))
        assert drawn == {(state.name, then.name) for state, follow in transitions.items() for then in follow}
