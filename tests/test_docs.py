"""The documents cannot drift from the code."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from pydantic import BaseModel

import sera_serve.server
from adapters_store import AdapterStore, StoreError
from sera_serve import SeraConfig
from sera_serve.access import COMMAND, AccessDatabase, AuditLog, Keys
from sera_serve.commands.settings_table import options_document, settings_document
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.request import TRANSITIONS as REQUEST_TRANSITIONS
from sera_serve.errors import SeraServeError
from sera_serve.jobs import JobPaths, TrainingFiles
from sera_serve.residency import TRANSITIONS as ADAPTER_TRANSITIONS
from sera_serve.server import build_app, errors, stats
from sera_serve.server.native import access_schemas, quota_schemas, schemas
from sera_serve.server.openai import (
    chat_schemas,
    completion_schemas,
    embeddings,
    fields,
    models,
    response_schemas,
    tokens,
)
from support.answers import openapi_document
from support.factories import random_adapter, random_decoder
from support.training import SORTED, jsonl

REPOSITORY = Path(__file__).resolve().parents[1]
HTTP = (REPOSITORY / "docs" / "http.md").read_text(encoding="utf-8")
SERVED = ("sera_serve.", "adapters_store.")
# Their errors never meet a client.
COMMAND_LINE = (
    *("sera_serve.cli", "sera_serve.commands", "sera_serve.trainer"),
    *(f"adapters_store.convert.{module}" for module in ("compress", "dense", "peft_export")),
)
OPENAI = "`POST /v1/completions`, `POST /v1/chat/completions`"
QUOTAS = "`GET /v1/quotas`, `GET /v1/quotas/{tenant}`, `PUT /v1/quotas/{tenant}`, `DELETE /v1/quotas/{tenant}`"
KEYS = "`GET /v1/keys`, `POST /v1/keys`, `DELETE /v1/keys/{id}`"
ADAPTER = "/v1/adapters/{tenant}/{name}"
OPERATORS = "`GET /healthz`, `GET /readyz`, `GET /metrics`, `GET /v1/stats`"
RESPONSES = "`POST /v1/responses`"
# Fields without a meaning, which clients send back as they got them.
SENT_BACK = {"refusal", "audio", "function_call", "annotations", "phase", "caller", "namespace"}
DOCUMENTS = [
    *(REPOSITORY / "README.md", REPOSITORY / "adapters_store" / "FORMAT.md"),
    *(REPOSITORY / "benchmarks" / "results" / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))),
]


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
        ("`POST /v1/classify`", schemas.ClassifyEachResponse),
        ("`POST /v1/embeddings`", embeddings.EmbeddingRequest),
        ("`POST /v1/embeddings`", embeddings.EmbeddingResponse),
        ("`POST /v1/embeddings`", embeddings.Embedding),
        ("`POST /v1/embeddings`", embeddings.EmbeddingUsage),
        ("`GET /v1/adapters`", schemas.ListQuery),
        ("`GET /v1/adapters`", schemas.AdapterSummary),
        ("`POST /v1/adapters`", schemas.PublishedAdapter),
        ("`GET /v1/me`", access_schemas.CallerDetail),
        (QUOTAS, quota_schemas.QuotaList),
        (QUOTAS, quota_schemas.QuotaDetail),
        (QUOTAS, quota_schemas.QuotaLimits),
        (QUOTAS, quota_schemas.QuotaUsage),
        (QUOTAS, quota_schemas.QuotaRequest),
        (KEYS, access_schemas.KeyQuery),
        (KEYS, access_schemas.KeyRequest),
        (KEYS, access_schemas.KeyDetail),
        (KEYS, access_schemas.NewKey),
        (f"`GET {ADAPTER}/versions`", access_schemas.VersionQuery),
        (f"`GET {ADAPTER}/versions`", access_schemas.VersionDetail),
        (f"`GET {ADAPTER}/versions`", access_schemas.VersionList),
        (f"`PUT {ADAPTER}/aliases/{{alias}}`, `DELETE {ADAPTER}/aliases/{{alias}}`", access_schemas.AliasRequest),
        (f"`PUT {ADAPTER}/aliases/{{alias}}`, `DELETE {ADAPTER}/aliases/{{alias}}`", access_schemas.AliasDetail),
        (OPENAI, completion_schemas.CompletionRequest),
        (OPENAI, chat_schemas.ChatRequest),
        (OPENAI, chat_schemas.Message),
        (RESPONSES, response_schemas.InputItem),
        (RESPONSES, response_schemas.ResponseTool),
        (RESPONSES, response_schemas.TextFormat),
        (RESPONSES, response_schemas.ResponseObject),
        (RESPONSES, response_schemas.ResponseUsage),
        ("`GET /v1/models`, `GET /v1/models/{model}`, `DELETE /v1/models/{model}`", models.ModelQuery),
        ("`GET /v1/models`, `GET /v1/models/{model}`, `DELETE /v1/models/{model}`", models.Model),
        ("`POST /tokenize`, `POST /detokenize`", tokens.TokenizeRequest),
        ("`POST /tokenize`, `POST /detokenize`", tokens.TokenizeResponse),
        (OPERATORS, stats.Stats),
        (OPERATORS, stats.AdapterMemory),
        ("Errors", errors.ErrorDetail),
    ],
)
def test_every_field_is_described(title: str, model: type[BaseModel]) -> None:
    text = section(title)
    for name, known in model.model_fields.items():
        field = known.alias or name
        if field in SENT_BACK:
            continue
        assert f"`{field}`" in text or f'"{field}"' in text, field


def test_every_field_of_responses_is_described_there_or_with_those_of_chats() -> None:
    own, shared = section(RESPONSES), section(OPENAI)
    for field in response_schemas.ResponseRequest.model_fields:
        assert f"`{field}`" in own or (field in fields.OpenAIFields.model_fields and f"`{field}`" in shared), field


def test_the_table_of_settings_is_the_one_that_the_code_makes() -> None:
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings_document(), "run `make settings`"
    names = re.findall(r"^\| `(\w+)`", written, re.MULTILINE)
    assert names == list(ServeSettings.model_fields)
    assert all(field.description for field in ServeSettings.model_fields.values())


@pytest.mark.parametrize("document", [settings_document(), options_document()], ids=["settings", "options"])
def test_a_table_of_settings_has_whole_figures_and_whole_rows(document: str) -> None:
    assert not re.search(r"\d[eE][+-]?\d", document), "a rounded bound is another bound"
    columns = 0
    for line in document.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or cells == (columns or cells), line
        columns = cells


def documented_codes() -> dict[int, set[str]]:
    """Error codes by status, as the table has them."""
    documented: dict[int, set[str]] = {}
    for status, kind, codes in re.findall(r"^\| (\d+).*? \| `(\w+)` \| (.*) \|$", section("Errors"), re.MULTILINE):
        assert errors.error_type(int(status)) == kind
        documented.setdefault(int(status), set()).update(re.findall(r"`(\w+)`", codes))
    return documented


def typed_errors() -> set[type[SeraServeError | StoreError]]:
    """Every typed error of what the server imports."""
    for module in pkgutil.walk_packages(sera_serve.server.__path__, "sera_serve.server."):
        importlib.import_module(module.name)
    found: set[type[SeraServeError | StoreError]] = set()
    waiting: list[type[SeraServeError | StoreError]] = [SeraServeError, StoreError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith(SERVED) and not kind.__module__.startswith(COMMAND_LINE):
            found.add(kind)
    return found


def test_every_error_code_is_in_the_row_of_its_status() -> None:
    documented = documented_codes()
    kinds = typed_errors()
    assert {kind.code for kind in kinds} >= {"host_not_allowed", "unexpected_body", "adapter_overflow", "overloaded"}
    for kind in kinds:
        assert kind.code in documented[kind.status], kind
    # What the framework refuses.
    for status, code in errors.CODES.items():
        assert code in documented[status]
    for code in errors.VALIDATION_CODES.values():
        assert code in documented[400 if code == "invalid_json" else 422]


def test_every_refusal_of_a_connection_is_in_the_row_of_its_status() -> None:
    # Connections are refused without a typed error, by `Refusal(status, code, message)`.
    documented = documented_codes()
    for path in (REPOSITORY / "sera_serve" / "server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                status, code = (ast.literal_eval(argument) for argument in node.args[:2])
                assert code in documented[status], f"{path.name}: {code}"


def test_every_documented_status_is_in_the_openapi_document() -> None:
    declared = {
        int(status)
        for operations in openapi_document()["paths"].values()
        for operation in operations.values()
        for status in operation["responses"]
    }
    # 405 is the answer to methods that the document does not have.
    assert {status for status in declared if status >= 400} == set(documented_codes()) - {405}


def anchors(document: Path) -> set[str]:
    """What links to the headings of a document end with, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_benchmarks_that_documents_name_can_be_run() -> None:
    named = {
        name for path in DOCUMENTS for name in re.findall(r"\bbenchmarks\.(\w+)", path.read_text(encoding="utf-8"))
    }
    folder = REPOSITORY / "benchmarks"
    runnable = {
        path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    runnable |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert "many_adapters" in named and named - runnable == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_lines_end_at_120_columns(document: Path) -> None:
    lines = document.read_text(encoding="utf-8").splitlines()
    # A row of a table, and a heading with routes, cannot be broken.
    assert [line for line in lines if len(line) > 120 and not line.startswith(("| ", "## "))] == []
    assert document.name != "README.md" or len(lines) < 200


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


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="sqlite3 is not installed")
def test_an_afternoon_s_reading_is_there_and_fits_an_afternoon() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## An afternoon's reading")[2].partition("\n## ")[0]
    files = []
    for line in (line for line in section.splitlines() if re.match(r"\| \d", line)):
        folder = REPOSITORY
        for name in re.findall(r"`([^`]+)`", line):
            if name.endswith("/"):
                folder = REPOSITORY / name
            else:
                files.append(folder / name if (folder / name).is_file() else REPOSITORY / name)
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    (told,) = re.findall(r"([\d,]+) lines", section)
    assert len(files) == 21 and abs(lines - int(told.replace(",", ""))) < 200 and lines < 6000


@pytest.mark.slow
def test_the_documented_backup_is_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "operators.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"## Backup and restore\n.*?```sh\n(.*?)```", text, re.DOTALL)
    store = AdapterStore(tmp_path / "store")
    base = random_decoder()
    digest = store.publish(random_adapter(base, SeraConfig(2, 1, 4, ("q_proj",)), 1), "acme/a").digest
    database, audit = AccessDatabase(store.root), AuditLog(store.root)
    key = Keys(database).create("acme", ["infer"])
    files = TrainingFiles(database, JobPaths(store.root), 1 << 20)
    file = files.add("acme", "rows.jsonl", BytesIO(jsonl(SORTED)))
    audit.record("key.create", COMMAND, tenant="acme", target="a key")
    audit.close()
    database.close()
    command = f'sera-serve() {{ {sys.executable} -c "from sera_serve.cli import main; main()" "$@"; }}'
    script = f"set -e; umask 022\n{command}\n{commands}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    copy = AdapterStore(tmp_path / "copy", create=False)
    assert copy.load(copy.resolve("acme/a").digest).digest == digest
    copied = AccessDatabase(copy.root)
    assert [held.id for held in Keys(copied).all()] == [key.key.id]
    copied.close()
    assert JobPaths(copy.root).file(file.id).read_bytes() == jsonl(SORTED)
    assert (copy.root / "access" / "audit.jsonl").read_bytes() == audit.path.read_bytes()
    private = [copy.root / "access", *(copy.root / "access").iterdir(), copy.root / "jobs"]
    assert [path.name for path in private if path.stat().st_mode & 0o077] == []
