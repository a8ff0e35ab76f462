"""No text of a client makes an expression, ours or a library's, take more than linear time.

A quadratic step over the sizes below takes from tens of seconds to hours; what is linear takes milliseconds.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI, Request

from adapters_store import (
    AdapterBundle,
    AdapterConfig,
    BundleLimits,
    InvalidAdapterName,
    InvalidBundle,
    parse_adapter,
    parse_json,
    parse_ref,
)
from adapters_store.convert.peft_keys import sort_keys
from adapters_store.names import check_alias, check_digest
from sera_serve.base import chat
from sera_serve.base.chat import MAX_TEMPLATE_CHARACTERS
from sera_serve.config import ServeSettings
from sera_serve.engine import structured
from sera_serve.engine.constraint import MAX_GRAMMAR_CHARACTERS
from sera_serve.errors import SeraServeError
from sera_serve.server import health, native, openai
from sera_serve.server.browsers import BrowserRules
from sera_serve.server.native.schemas import GenerateRequest
from sera_serve.server.native.upload_form import boundary_of
from sera_serve.server.openai.chat_schemas import ChatRequest
from sera_serve.server.openai.completion_schemas import CompletionRequest
from sera_serve.server.openai.tool_calls import ToolCallParser
from sera_serve.server.strict import media_type

REPOSITORY = Path(__file__).resolve().parents[2]
LINEAR_S = 2.0
# The largest body of JSON, which holds the names of adapters; the same for a bundle's configuration.
BODY = 1 << 20
# Twice the largest request line and headers.
HEADER = 64 << 10

# Every expression in the packages: the test of the texts that reach it, or why no client's text does.
EXPRESSIONS = {
    "adapters_store/names.py: [a-z0-9][a-z0-9._-]{0,63}": "names",
    "adapters_store/names.py: v([1-9][0-9]{0,8})": "names",
    "adapters_store/names.py: v[0-9]+": "names",
    "adapters_store/names.py: f'[0-9a-f]{{{MIN_DIGEST_PREFIX},64}}'": "names",
    "adapters_store/names.py: [0-9a-f]{64}": "names",
    r"adapters_store/format/config.py: \A[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\z": "paths of layers",
    r"adapters_store/records.py: \A[0-9a-f]{64}\z": "a record of the store, written by the store, 64 KiB at most",
    r"adapters_store/backends/adapter_directory.py: v([1-9][0-9]*)\.json": "names of files, 255 bytes at most",
    "adapters_store/backends/name_index.py: [a-z0-9][a-z0-9._-]*@[a-z0-9][a-z0-9._-]*": "names of files, 255 bytes",
    """adapters_store/format/safetensors_file.py: f'{{"__metadata__":{{(?:{_STRING}:{_STRING},?)*+}},'""": "JSON",
    r"adapters_store/format/strict_json.py: \\u[dD][89a-fA-F]": "JSON",
    r"sera_serve/engine/overflow.py: \d+": "paths of layers of the base, which the operator chooses",
    "sera_serve/server/browsers.py: _HOST": "headers",
    "sera_serve/server/browsers.py: f'(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://{_HOST}/?'": "headers",
    r"sera_serve/trainer/checkpoint.py: checkpoint-(\d+)": "names of files of the trainer, 255 bytes at most",
    r"sera_serve/trainer/tables/fields.py: -?[0-9]{1,20}(\.0{1,20})?": "a label, 512 characters at most",
    r"sera_serve/trainer/tables/hub.py: hub:(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?:#(?P<split>[\w.-]+))?": "the command line",
    r"adapters_store/convert/peft_keys.py: (?P<path>[^\s]+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?P<rest>[A-Za-z0-9_.-]+))?": "names of tensors",
    r"adapters_store/convert/peft_config.py: \+|\{(?:(?P<least>[0-9]*)(?:,[0-9]*)?\})?": "a pattern, 512 characters",
    r"adapters_store/convert/peft_config.py: whole": "a pattern of PEFT, which 2 s for all of them bound",
    r"sera_serve/base/chat.py: {%(-?)\s*(end)?generation\s*(-?)%}": "chat templates",
    r"sera_serve/commands/model_card.py: [\w./-]+": "the name of a base",
    r"sera_serve/commands/imports.py: [A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}": "a command line, a base",
    r"sera_serve/commands/imports.py: split=([1-9]\d{0,6})(?:,rank=([1-9]\d{0,6}))?": "the command line",
    "sera_serve/engine/structured.py: '|'.join([_OPAQUE, *(f'(?P<f{index}>{pattern})' for index, (_, pattern, _) in "
    "enumerate(_FORBIDDEN)), '(?P<colon>:)'])": "grammars",
    r"sera_serve/engine/structured.py: ^at \d+\(\d+\): failed to compile JSON schema: ": "a library's messages",
    "sera_serve/server/native/upload_form.py: b'%22|%0D|%0A'": "three words of three characters, one after another",
    "sera_serve/server/native/sampling.py: 0|[1-9][0-9]{0,9}": "token ids as keys",
    "sera_serve/server/openai/fine_tuning.py: [a-z0-9._-]{1,40}": "a suffix, 40 characters at most",
    "sera_serve/server/openai/fine_tuning.py: [^a-z0-9]+": "the name of a base or an adapter, 200 characters at most",
    "sera_serve/server/openai/chat_schemas.py: ^[A-Za-z0-9_.-]{1,64}$": "names of tools",
    "sera_serve/server/openai/chat_schemas.py: [A-Za-z_][A-Za-z0-9_]{0,63}": "names of tools",
    "sera_serve/server/response_format.py: ^[a-zA-Z0-9_-]{1,64}$": "names of tools",
    "sera_serve/server/openai/response_schemas.py: ^[a-zA-Z0-9_-]{1,64}$": "names of tools",
    "sera_serve/commands/keys.py: ([1-9][0-9]{0,8})([mhd])": "the command line",
    r"sera_serve/config.py: https?://[^\s/]": "the operator's settings",
    "sera_serve/config.py: ([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|"
    "PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)": "the operator's environment",
    "sera_serve/config.py: cpu|cuda(:[0-9]{1,3})?": "the operator's settings",
    "sera_serve/client/calls.py: [^a-zA-Z0-9_-]": "a program of the client, about its own schema",
    r"sera_serve/client/connection.py: [!#$%&'*+\-.^_`|~0-9A-Za-z]+": "a program of the client, about its own headers",
    r"sera_serve/client/connection.py: ([!-~]([\t -~]*[!-~])?)?": "a program of the client, about its own headers",
    "sera_serve/client/exchange.py: [0-9]{1,9}": "a header of the server, nine digits at most",
    "sera_serve/server/openai/token_texts.py: <0x([0-9A-Fa-f]{2})>": "tokens of the base, which the operator chooses",
    r"sera_serve/server/openai/tool_calls.py: [\s;,]*": "tool calls",
    r"sera_serve/server/openai/tool_calls.py: \s*[\[,]\s*": "text of the model, matched once at the place of each call",
}


def expressions(path: Path) -> list[str]:
    """The regular expressions in a file: arguments of `re`'s functions, and `pattern=` anywhere."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        named = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "re"
        if named and called.attr != "escape":
            found.append(node.args[0])
        found += [keyword.value for keyword in node.keywords if keyword.arg in ("pattern", "regex")]
    return [text.value if isinstance(text, ast.Constant) else ast.unparse(text) for text in found]


def test_every_expression_is_in_the_table() -> None:
    found = set()
    for package in ("adapters_store", "sera_serve", "kernels"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            found |= {f"{path.relative_to(REPOSITORY)}: {text}" for text in expressions(path)}
    assert found == set(EXPRESSIONS)


def request_with(header: str, value: str) -> Request:
    return Request({"type": "http", "headers": [(header.encode(), value.encode("latin-1"))], "query_string": b""})


APP = FastAPI()
for router in (*native.ROUTERS, *openai.ROUTERS, health.router):
    APP.include_router(router)


def route(path: str) -> None:
    for candidate in APP.routes:
        candidate.matches({"type": "http", "path": path, "method": "GET", "headers": []})


def query(text: str) -> None:
    dict(Request({"type": "http", "query_string": text.encode(), "headers": []}).query_params)


def configuration(path: str) -> None:
    fields = {"format_version": 1, "task": "generate", "method": "sera", "modules": {path: {}}, "base": {}}
    AdapterConfig.from_json(json.dumps(fields))


def tool_request(name: str) -> object:
    tool = {"type": "function", "function": {"name": name}}
    return ChatRequest.model_validate({"model": "a/b", "messages": [{"role": "user", "content": "a"}], "tools": [tool]})


def calls_in(text: str) -> None:
    parser = ToolCallParser("json", ["look"])
    parser.push(text)
    parser.end()


def file_header(text: str) -> None:
    data = len(text.encode()).to_bytes(8, "little") + text.encode()
    AdapterBundle.from_bytes(data, BundleLimits(max_header_bytes=2 * len(data)))


USES: dict[str, Callable[[str], object]] = {
    "a tensor's name": lambda text: sort_keys([text]),
    "a factor's name": lambda text: sort_keys([f"x{text}.lora_A.default.weight{text}"]),
    "a token's id": lambda text: GenerateRequest.model_validate({"prompt": "a", "logit_bias": {text: 1}}),
    "a token's id in a completion": lambda text: CompletionRequest.model_validate(
        {"model": "a/b", "prompt": "a", "logit_bias": {text: 1}}
    ),
    "a tool's name": tool_request,
    "a tool call": calls_in,
    "a reference": parse_ref,
    "a reference's selector": lambda text: parse_ref(f"a/b@{text}"),
    "an adapter's name": parse_adapter,
    "an adapter's second part": lambda text: parse_adapter(f"a/{text}"),
    "an alias": check_alias,
    "a digest": check_digest,
    "a layer's path": configuration,
    "JSON": parse_json,
    "JSON in a list": lambda text: parse_json(f"[{text}"),
    "a JSON string": lambda text: parse_json(f'"{text}'),
    "a file's metadata": lambda text: file_header(f'{{"__metadata__":{{{text}'),
    "a file's text": lambda text: file_header(f'{{"__metadata__":{{"{text}'),
}
TEXTS = ["a", "a.", "a/", "/", "@", "v", "1", "0", "..", "-", "a@", " ", "é", "[", "1,", "a_."]
TEXTS += ["\\\\", "\\\\u0030", "\\ud8", '"a":"b",', '"', '":"', '\\"']
RULES = BrowserRules(ServeSettings(allowed_hosts=["a.example"], allowed_origins=["https://a.example"]))
HEADER_USES: dict[str, Callable[[str], object]] = {
    "a path": lambda text: route(f"/v1/adapters/{text}"),
    "a path with a name": lambda text: route(f"/v1/adapters/a/{text}"),
    "a model's path": lambda text: route(f"/v1/models/{text}"),
    "a query": query,
    "a query's value": lambda text: query(f"tenant={text}"),
    "a media type": lambda text: media_type(request_with("content-type", text)),
    "a form's type": lambda text: boundary_of(f"multipart/form-data;{text}", ""),
    "a form's boundary": lambda text: boundary_of(f'multipart/form-data; boundary="{text}', ""),
    "a form's charset": lambda text: boundary_of(f"multipart/form-data; boundary=b; charset={text}", ""),
    "a host": RULES.check_host,
    "a host's port": lambda text: RULES.check_host(f"a:{text}"),
    "a host's address": lambda text: RULES.check_host(f"[{text}"),
    "an origin": lambda text: RULES.check_origin([text], None, "a"),
    "an origin's host": lambda text: RULES.check_origin([f"http://{text}"], None, text),
    "a query's escapes": lambda text: query(f"%{text}"),
}
HEADER_TEXTS = [*'a;=" /&%+*\t:.1[', '";', '\\"', '\\";', ";=", 'a="', "a=;", "; ", "//", "%41"]


def assert_linear(use: Callable[[str], object], text: str) -> None:
    began = time.perf_counter()
    with contextlib.suppress(InvalidAdapterName, InvalidBundle, SeraServeError, ValueError):
        use(text)
        # Once more with an end that fits nothing, so that whatever began to fit is taken back.
    with contextlib.suppress(InvalidAdapterName, InvalidBundle, SeraServeError, ValueError):
        use(text + "\x00!")
    assert time.perf_counter() - began < LINEAR_S


@pytest.mark.parametrize("name", USES)
def test_names_and_bodies_take_linear_time(name: str) -> None:
    for piece in TEXTS:
        assert_linear(USES[name], piece * (BODY // len(piece)))


def test_a_header_of_many_tensors_takes_linear_time() -> None:
    """About as many as a header may have. The bundle is refused late, for its names."""
    fields = {f"{i:04x}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(30_000)}
    base = {"name": "a", "architecture": "a", "config_digest": "a", "weights_digest": "a", "hidden_size": 8}
    module = {"d_in": 8, "d_out": 8, "rank": 1, "split": 1, "use_mixer": False, "scaling": 1.0}
    config = {"format_version": 1, "task": "generate", "method": "lora", "base": base, "modules": {"a": module}}
    metadata = {"adapter_config": json.dumps(config)}
    header = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":")).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4 * len(fields))
    began = time.perf_counter()
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.from_bytes(data)
    assert refusal.value.code == "missing_tensor"
    assert time.perf_counter() - began < LINEAR_S


@pytest.mark.parametrize("name", HEADER_USES)
def test_headers_and_paths_take_linear_time(name: str) -> None:
    for piece in HEADER_TEXTS:
        assert_linear(HEADER_USES[name], piece * (HEADER // len(piece)))


# A grammar and a template have at most as many characters as these tests send. The limits leave a quadratic scan less
# than the two seconds above, so these have their own.
GRAMMAR_TEXTS = ['"', '\\"', "/", "/a", "\\/", "<", "< ", "%", "% ", "~ ", "[", "[ ", ",", "//", "#", "stop ", ":"]
TEMPLATE_TEXTS = ["{%", "{% ", "{%- ", "{%end", " ", "{%-", "{% generation"]
SHORT_TEXT_S = 0.25


@pytest.mark.parametrize("before", ["", '"', "/"])
def test_grammars_are_checked_in_linear_time(before: str) -> None:
    for piece in GRAMMAR_TEXTS:
        began = time.perf_counter()
        with contextlib.suppress(ValueError):
            structured.checked_grammar((before + piece * MAX_GRAMMAR_CHARACTERS)[:MAX_GRAMMAR_CHARACTERS])
        assert time.perf_counter() - began < SHORT_TEXT_S, piece


@pytest.mark.parametrize("before", ["", "{%"])
def test_marks_of_templates_are_removed_in_linear_time(before: str) -> None:
    for piece in TEMPLATE_TEXTS:
        began = time.perf_counter()
        chat.without_marks((before + piece * MAX_TEMPLATE_CHARACTERS)[:MAX_TEMPLATE_CHARACTERS])
        assert time.perf_counter() - began < SHORT_TEXT_S, piece


def nested(repeats: str, depth: int) -> str:
    return "(?:" * depth + "a" + repeats * depth


# The compiler writes repeats out, and holds the interpreter's lock. The last two are as large as is allowed.
PATTERNS = {
    "counts": nested("{1000})", 3),
    "open counts": nested("{1000,})", 3),
    "lazy counts": nested("{1000}?)", 3),
    "possessive counts": nested("{1000}+)", 3),
    "counts with spaces": "(?x)" + nested("{ 1 0 0 0 })", 3),
    "counts with a comment": "(?x)" + nested("{1#\n000})", 3),
    "counts of two": nested("{2})", 40),
    "plus": nested(")+", 80),
    "groups": "(" * 100 + "a" + ")+" * 100,
    "fuzzy counts": nested("{e<=3})", 40),
    "a large class": "(?:" + "[a-z]" * 90 + "){35}",
    "many small repeats": "(?:" + "a?" * 200 + "){39}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_a_checkpoint_are_compiled_in_little_time_and_memory(name: str) -> None:
    # In a process of its own, whose memory is bounded: what fails here would take the machine's.
    program = (
        "import resource, sys, time; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); "
        "from adapters_store import InvalidBundle; "
        "from adapters_store.convert.peft_config import PatternBudget, PatternMatcher; began = time.perf_counter()\n"
        "try: PatternMatcher([sys.argv[1]], 'alpha_pattern', PatternBudget())\n"
        "except InvalidBundle: pass\n"
        "print(time.perf_counter() - began)"
    )
    done = subprocess.run([sys.executable, "-c", program, PATTERNS[name]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < SHORT_TEXT_S


def test_a_quadratic_expression_would_be_seen() -> None:
    """The limit is far below what a quadratic expression takes, at an eighth of the size of a header."""
    began = time.perf_counter()
    # As Python's tarfile reads the records of a pax header.
    list(re.finditer(r"(\d+) ([^=]+)=", "1" * (HEADER // 8)))
    eighth = time.perf_counter() - began
    assert eighth * 64 > LINEAR_S
