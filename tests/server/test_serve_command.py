"""The command `sera-serve serve`: options, refusals, and a server process from start to SIGTERM."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.cli import build_cli
from sera_serve.commands import serve
from sera_serve.commands.reload import SettingsReloader
from sera_serve.commands.serve import client_lines, few_collections, let_steps_go_first
from sera_serve.config import ServeSettings
from support.factories import random_adapter, random_decoder
from support.live_server import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from sera_serve.cli import main; main()", *map(str, arguments)]


@contextmanager
def running(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a server process. Yields the process, and the lines that it printed until it was ready."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("serve", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        yield process, _until_ready(process.stdout)
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()


def _until_ready(output: IO[str]) -> list[str]:
    lines = []
    for line in output:
        lines.append(line.rstrip("\n"))
        if line.startswith("curl") and line.rstrip().endswith("/v1/adapters"):
            return lines
    raise RuntimeError("the server ended:\n" + "\n".join(lines))


def test_every_setting_is_an_option() -> None:
    narrow = CliRunner().invoke(build_cli(), ["serve", "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"}).output
    assert "…" not in narrow and all(f"--{name.replace('_', '-')} " in narrow for name in ServeSettings.model_fields)
    result = CliRunner().invoke(build_cli(), ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    options = set(re.findall(r"--[a-z-]+", result.output))
    assert {f"--{name.replace('_', '-')}" for name in ServeSettings.model_fields} <= options
    assert "--config" in options
    # As docs/settings.md and a settings file write them; nothing for a setting without a default.
    text = " ".join(result.output.split())
    assert "Default: true" in text and "Default: false" in text
    assert not re.search(r"Default: (None|True|False|\[|\{)", text)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--port", "99999"], 2, "port (flag --port) is 99999"),
        (["--drain-s", "inf"], 2, "drain_s (flag --drain-s) is inf"),
        (["--tenant-weights", "acme=inf"], 2, "finite"),
        (["--config", "/nowhere.yaml"], 2, "cannot be read"),
        (["--base", "/nowhere", "--port", "0"], 1, "could not be loaded"),
        (["--host", "256.0.0.1"], 1, "host"),
        # TEST-NET-1 (RFC 5737): no machine has it.
        (["--host", "192.0.2.1", "--port", "0"], 1, "Cannot assign requested address; choose another --host"),
        (["--port", "0", "--metrics-address", "192.0.2.1:0"], 1, "address; choose another --metrics-address"),
        (["--port", "0", "--metrics-address", "9100"], 1, "metrics_address"),
        (["--port", "0", "--metrics-address", "256.0.0.1:9100"], 1, "metrics_address"),
        (["--device", "cuda:9", "--port", "0"], 1, "device"),
        (["--device", "meta", "--port", "0"], 2, "--device"),
        (["--host", "a..b", "--port", "0"], 1, "host 'a..b'"),
        (["--port", "0", "--metrics-address", "a..b:9100"], 1, "metrics_address 'a..b'"),
        # More than any machine has.
        (["--pool-mib", "1000000000", "--port", "0"], 1, "lower pool_mib"),
        (["--kv-cache-tokens", "1000000000000", "--port", "0"], 1, "lower kv_cache_tokens"),
        (["--base", "/nowhere", "--host", "0.0.0.0", "--auth", "off", "--port", "0"], 1, "--insecure"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    result = CliRunner().invoke(build_cli(), ["serve", "--store", str(tmp_path / "store"), *arguments])
    assert result.exit_code == status
    assert words in result.stderr
    assert result.stderr.startswith("sera-serve: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_switch_is_turned_off_by_a_flag() -> None:
    result = CliRunner().invoke(build_cli(), ["check-config", "--no-access-log", "--insecure"])
    found = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert found["access_log"] == ["false", "flag", "--access-log"]
    assert found["insecure"] == ["true", "flag", "--insecure"]
    assert found["cuda_graphs"] == ["true", "default"]


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_file_that_yaml_cannot_make_is_reported_in_one_line(tmp_path: Path, command: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("host: 2024-13-45\n")
    result = CliRunner().invoke(build_cli(), [command, "--config", str(file)])
    assert result.exit_code == 2 and "cannot be read" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_sighup_while_the_base_loads_is_taken_once_the_server_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("tenant_weights: {acme: 2}\n")
    announced, reloads = threading.Event(), list[str]()

    def load(*arguments: Any) -> FrozenBase:
        file.write_text("tenant_weights: {acme: 3}\n")
        os.kill(os.getpid(), signal.SIGHUP)
        return load_base(str(folder))

    def reload(reloader: SettingsReloader) -> None:
        reloads.append("asked")
        assert announced.is_set()
        reloader.reload()
        os.kill(os.getpid(), signal.SIGTERM)

    # As where the process may open few files.
    monkeypatch.setattr(
        serve, "within_descriptors", lambda settings: settings.model_copy(update={"max_connections": 7})
    )
    monkeypatch.setattr(serve, "load_base", load)
    monkeypatch.setattr(serve, "describe_server", lambda *arguments: announced.set())
    monkeypatch.setattr(SettingsReloader, "request", reload)
    before = signal.getsignal(signal.SIGHUP)
    arguments = ["--config", str(file), "--port", "0", "--store", str(tmp_path / "store"), "--pool-mib", "1"]
    result = CliRunner().invoke(build_cli(), ["serve", *arguments])
    assert (result.exit_code, reloads) == (0, ["asked"]), result.output
    assert signal.getsignal(signal.SIGHUP) is before
    assert "changed: tenant_weights" in caplog.text and "only a restart" not in caplog.text


def test_a_server_that_cannot_describe_itself_serves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def describe(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("a record cannot be read")

    monkeypatch.setattr(serve, "describe_server", describe)
    arguments = ["--base", str(folder), "--port", "0", "--store", str(tmp_path / "store"), "--pool-mib", "1"]
    result = CliRunner().invoke(build_cli(), ["serve", *arguments])
    assert result.exit_code == 0 and result.stdout.endswith("stopped\n")
    assert "cannot describe what it serves" in caplog.text and "a record cannot be read" in caplog.text


def test_a_port_in_use_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        arguments = ["serve", "--store", str(tmp_path), "--base", "/nowhere", "--port", port]
        result = CliRunner().invoke(build_cli(), arguments)
    assert result.exit_code == 1
    assert f"port {port}: Address already in use" in result.stderr


def test_the_printed_lines_work_when_pasted_and_sigterm_ends_gracefully(folder: Path, tmp_path: Path) -> None:
    served = load_base(str(folder))
    config = SeraConfig(4, 2, 8, ("q_proj",))
    store = AdapterStore(tmp_path / "store")
    store.publish(random_adapter(served, config, seed=1), "demo/writer")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    store.publish(random_adapter(served, config, seed=4, chat_template=template), "demo/chat")
    store.publish(random_adapter(served, config, seed=2, labels=["spam", "ham"]), "demo/sorter")
    # This adapter is first in the list, but fits another base. No printed line names the adapter.
    store.publish(random_adapter(random_decoder(seed=5), config, seed=3), "aaa/foreign")
    arguments = ["--base", folder, "--store", store.root, "--port", "0", "--pool-mib", "4"]
    with running(*arguments, "--kv-cache-tokens", "1024") as (process, lines):
        text = "\n".join(lines)
        assert "4 adapters" in text
        assert "aaa/foreign" not in text
        curls = [shlex.split(line) for line in lines if line.startswith("curl")]
        answers = [_as_curl(curl) for curl in curls]
        assert [answer.status_code for answer in answers] == [200] * 5
        chat, generated, classified, base_only, listed = (answer.json() for answer in answers)
        assert chat["model"] == "demo/chat"
        # The lines of the client ask for the same.
        begin = lines.index("from openai import OpenAI")
        said = StringIO()
        with redirect_stdout(said):
            exec("\n".join(lines[begin : begin + 4]), {})
        assert "demo/chat" in lines[begin + 2] and said.getvalue().endswith("\n")
        assert (generated["adapter"], base_only["adapter"]) == ("demo/writer", None)
        assert classified["results"][0]["label"] in ("spam", "ham")
        assert [adapter["adapter"] for adapter in listed["adapters"]] == [
            "aaa/foreign",
            "demo/chat",
            "demo/sorter",
            "demo/writer",
        ]
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 15
        assert process.stdout is not None
        # The log has a thread of its own, which may write its last line after this one.
        assert "stopped" in process.stdout.read().splitlines()[-3:]


@pytest.mark.slow
def test_a_damaged_record_does_not_keep_a_server_from_its_start(folder: Path, tmp_path: Path) -> None:
    served = load_base(str(folder))
    config = SeraConfig(4, 2, 8, ("q_proj",))
    store = AdapterStore(tmp_path / "store")
    for name in ("aaa/damaged", "demo/writer"):
        store.publish(random_adapter(served, config, seed=1), name)
    (store.root / "adapters" / "aaa" / "damaged" / "versions" / "v1.json").write_bytes(b"")
    arguments = ["--base", folder, "--store", store.root, "--port", "0", "--pool-mib", "4"]
    with running(*arguments, "--kv-cache-tokens", "1024") as (process, lines):
        text = "\n".join(lines)
        assert "generate with demo/writer" in text
        listed = _as_curl(shlex.split(lines[-1])).json()
        assert [adapter["adapter"] for adapter in listed["adapters"]] == ["demo/writer"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        # The log has a thread of its own. Once, by who meets it first: a list, or the count of what the store holds.
        assert process.stdout is not None
        assert (text + process.stdout.read()).count("adapter aaa/damaged is ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["full", "pipe"])
def test_a_server_needs_no_standard_output(folder: Path, tmp_path: Path, closed: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--base", folder, "--store", tmp_path / "store", "--port", port, "--pool-mib", 1]
    read_end, write_end = os.pipe()
    os.close(read_end)
    if closed == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), write_end)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("serve", *arguments), stdout=write_end, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(write_end)
    assert process.stderr is not None
    try:
        said = next(line for line in process.stderr if "nothing more is printed" in line)
        assert ("No space left" if closed == "full" else "Broken pipe") in said
        wait_until(lambda: _is_ready(f"http://127.0.0.1:{port}"), seconds=30)
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stderr.close()


@pytest.mark.slow
def test_a_server_that_needs_keys_says_how_to_make_the_first_one(folder: Path, tmp_path: Path) -> None:
    arguments = ["--base", folder, "--store", tmp_path / "store", "--port", "0", "--pool-mib", "4"]
    with running(*arguments, "--kv-cache-tokens", "1024", "--host", "0.0.0.0") as (_, lines):
        text = "\n".join(lines)
        assert "needed by every request, and none is valid" in text
        (create,) = (shlex.split(line) for line in lines if line.startswith("sera-serve keys create"))
        curls = [shlex.split(line) for line in lines if line.startswith("curl")]
        assert all(curl[3:5] == ["-H", "Authorization: Bearer $SERA_KEY"] for curl in curls)
        assert len(curls) == 2
        url = curls[-1][5]
        assert httpx.get(url).status_code == 401
        made = CliRunner().invoke(build_cli(), [*create[1:], "--json"])
        assert made.exit_code == 0, made.output
        headers = {"Authorization": f"Bearer {json.loads(made.stdout)['secret']}"}
        deadline = time.monotonic() + 5
        while httpx.get(url, headers=headers).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_printed_lines_of_a_client_read_the_key() -> None:
    lines = client_lines("http://localhost:8000/v1", {"model": "a/b"}, needs_keys=True).splitlines()
    assert lines[0] == "import os" and 'api_key=os.environ["SERA_KEY"]' in lines[2]
    compile("\n".join(lines), "lines", "exec")


@pytest.mark.slow
def test_a_server_visits_few_objects_and_seldom() -> None:
    def collections(count: int) -> list[int]:
        """How many collections of each generation there were while so many objects were made and kept."""
        before = [each["collections"] for each in gc.get_stats()]
        kept = [[number] for number in range(count)]
        assert len(kept) == count
        return [each["collections"] - old for each, old in zip(gc.get_stats(), before, strict=True)]

    thresholds = gc.get_threshold()
    usual = collections(50_000)
    with few_collections():
        assert gc.get_freeze_count() > 50_000
        young, older, _ = collections(50_000)
        assert 0 < young < usual[0] / 10 and older == 0 < usual[1]
    assert gc.get_threshold() == thresholds and gc.get_freeze_count() == 0
    # As the other tests are run.
    gc.freeze()


@pytest.mark.parametrize(("device", "set_to"), [("cpu", []), ("cuda:1", [0.001])])
def test_a_gpus_steps_wait_less_for_the_interpreter(
    device: str, set_to: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", given.append)
    let_steps_go_first(torch.device(device))
    assert given == set_to


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(folder: Path, tmp_path: Path) -> None:
    arguments = ["--base", folder, "--store", tmp_path / "store", "--port", "0", "--pool-mib", "4"]
    more = ["--kv-cache-tokens", "1024", "--metrics-address", "127.0.0.1:0"]
    with running(*arguments, *more) as (process, lines):
        addresses = [line.split()[-1] for line in lines if line.strip().startswith(("address", "metrics"))]
        assert httpx.get(f"{addresses[0]}/readyz").status_code == httpx.get(addresses[1]).status_code == 200
        port = int(addresses[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 1
        assert process.stdout is not None
        told = process.stdout.read()
        assert "requests in flight were cut off" in told
        # One of each request would say no more.
        assert "Traceback" not in told


@pytest.mark.slow
def test_an_interrupt_ends_gracefully(folder: Path, tmp_path: Path) -> None:
    arguments = ["--base", folder, "--store", tmp_path / "store", "--port", "0", "--pool-mib", "4"]
    with running(*arguments, "--kv-cache-tokens", "1024") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def _as_curl(words: list[str]) -> httpx.Response:
    """Send the request that curl sends with these arguments."""
    assert words[:3] == ["curl", "-sw", "\\n"]
    url, *rest = words[3:]
    if not rest:
        return httpx.get(url, timeout=30)
    assert [rest[0], rest[2]] == ["-H", "-d"]
    name, _, value = rest[1].partition(": ")
    return httpx.post(url, headers={name: value}, content=rest[3].encode(), timeout=30)
