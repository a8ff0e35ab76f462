"""Every example of the clients runs against a live server that has the demo tenants' names."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.factories import random_adapter
from support.live_server import live_server, wait_until
from support.peft_checkpoints import CONFIG, WEIGHTS, save_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "client"
Example = Callable[..., str]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_base("embedded")


@pytest.fixture(scope="module")
def engine(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> ServingEngine:
    store = AdapterStore(tmp_path_factory.mktemp("examples") / "store")
    shape = SeraConfig(4, 2, 8.0, ("q_proj", "v_proj"))
    store.publish(random_adapter(base, shape, 1, strength=0.2), "demo/pirate")
    template = "{{ bos_token }}Q: {{ messages[0].content }}\nA:"
    store.publish(random_adapter(base, shape, 2, strength=0.2, chat_template=template), "demo/chat")
    for seed, name in enumerate(("demo/rude", "demo/tickets")):
        store.publish(random_adapter(base, shape, seed, labels=["no", "yes"], pooling="mean"), name)
    return ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=8, kv_cache_tokens=2048))


@pytest.fixture(scope="module")
def address(engine: ServingEngine) -> Iterator[str]:
    with live_server(build_app(engine, engine.store, engine.settings)) as url:
        yield url


@pytest.fixture
def run(
    address: str, engine: ServingEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Example:
    """Run an example as a program, and return what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--url", address, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        wait_until(lambda: engine.in_flight() == 0)
        return capsys.readouterr().out

    return run


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 6
    assert [name for name in names if f'run("{name}"' not in source] == []


def test_the_native_client(run: Example) -> None:
    out = run("native_client.py")
    assert "adapters: demo/chat demo/pirate demo/rude demo/tickets\n" in out
    assert "\ndemo/pirate v1: " in out and "\nhalf a pirate (0.5*demo/pirate@v1): " in out
    assert "refused: adapter" in out and "adapter_not_found, status 404" in out
    assert "\n- Once" in out and "\n- In a far land" in out


def test_the_official_client(run: Example) -> None:
    out = run("openai_client.py")
    assert out.startswith("models: embedded demo/chat demo/pirate demo/rude demo/tickets\n")
    assert "\nrefused: " in out
    chat, _, stream = out.partition("\nchat: ")[2].partition("\nstream: ")
    assert chat.strip() and stream.partition("\n\nembedded: ")[0].strip()


def test_the_official_client_sends_its_key(run: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    send = httpx.Client.send

    def recording(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        keys.append(request.headers["Authorization"])
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", recording)
    run("openai_client.py", "--key", "sk-sera-mine")
    assert set(keys) == {"Bearer sk-sera-mine"}


def test_an_upload(run: Example, base: FrozenBase, engine: ServingEngine, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path / "lora")
    assert "published acme/mine v1" in run("upload_lora.py", str(folder), "acme/mine")
    arguments = (str(folder / WEIGHTS), "acme/mine", "--config", str(folder / CONFIG))
    assert "published acme/mine v1" in run("upload_lora.py", *arguments)
    with pytest.raises(SystemExit, match=r"refused: .*adapter_config"):
        run("upload_lora.py", str(folder / WEIGHTS), "acme/mine")
    for source, name, reason in (
        (tmp_path / "nothing", "acme/mine", "No such file"),
        (tmp_path, "acme/mine", "has no adapter_config.json"),
        (folder, "mine", "write tenant/name"),
    ):
        with pytest.raises(SystemExit, match=f"not sent: .*{reason}"):
            run("upload_lora.py", str(source), name)
    engine.store.delete("acme/mine")


@pytest.mark.parametrize("model", [[], ["--model", "demo/tickets"]])
def test_embeddings(run: Example, model: list[str]) -> None:
    lines = run("embeddings.py", *model).splitlines()
    assert lines[0].startswith("demo/tickets" if model else "embedded")
    scores = [float(line.split()[0]) for line in lines[1:]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True) and all(-1.01 < score < 1.01 for score in scores)


@pytest.mark.parametrize("adapter", [[], ["--adapter", "demo/pirate"]])
def test_structured_output(run: Example, adapter: list[str]) -> None:
    animal, date, moves = run("structured_output.py", *adapter).splitlines()
    assert animal.startswith("kind=")
    assert len(date) == 7 and date.startswith("20")
    assert set("left,right,up,down") >= set(moves) and moves


def test_guardrails(run: Example) -> None:
    lines = run("guardrails.py", "Hello there").splitlines()
    assert [line.split()[0] for line in lines] == ["demo/rude:", "demo/tickets:"]
    with pytest.raises(SystemExit, match="no classifiers"):
        run("guardrails.py", "--tenant", "nobody")


def test_the_readmes_programs(
    address: str, base: FrozenBase, engine: ServingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(base.model, tmp_path / "lora")
    text = (EXAMPLES.parents[1] / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        assert "http://localhost:8000" in program
        source = program.replace("http://localhost:8000", address).replace("path/to/lora", str(folder))
        exec(compile(source, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20
    engine.store.delete("acme/mine")
