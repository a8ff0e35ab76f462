"""`sera-serve doctor` and `sera-serve check-config`."""

from __future__ import annotations

import importlib.util
import json
import resource
import sqlite3
from collections import namedtuple
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from typer.testing import CliRunner

from adapters_store import AdapterBundle, AdapterStore
from sera_kernels import grouped
from sera_serve.access import AccessDatabase, Keys
from sera_serve.base import FrozenBase
from sera_serve.cli import build_cli
from sera_serve.commands import diagnosis
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.memory import DeviceMemory
from sera_serve.jobs import JobPaths, TrainingFiles
from support.training import SORTED, jsonl


def findings(*arguments: str | Path) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status of the doctor, and what it found by name."""
    result = CliRunner().invoke(build_cli(), ["doctor", "--json", *map(str, arguments)])
    content = json.loads(result.output)
    assert content["status"] in ("ok", "warning", "problem")
    assert (result.exit_code == 1) == (content["status"] == "problem")
    found = {finding["name"]: finding for finding in content["findings"]}
    assert all(finding["remedy"] for finding in found.values() if finding["status"] != "ok")
    return result.exit_code, found


def test_a_sound_machine_and_store(store: AdapterStore, base: FrozenBase) -> None:
    status, found = findings("--store", store.root)
    assert status == 0
    assert set(found) >= {
        "python",
        "device",
        "kernels",
        "attention",
        "base",
        "memory",
        "store",
        "bundles",
        "database",
        "disk",
    }
    assert "2 adapters, writable" in found["store"]["detail"]
    assert "2 adapters were read" in found["bundles"]["detail"]
    assert findings("--store", store.root, "--full")[1]["bundles"]["status"] == "ok"


def test_the_plan_is_what_an_engine_takes(base: FrozenBase, store: AdapterStore, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path / "base")
    config = tmp_path / "serve.yaml"
    config.write_text("pool_mib: 8\nkv_cache_tokens: 8192\n")
    _, found = findings("--store", store.root, "--config", config, "--base", tmp_path / "base")
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=8, kv_cache_tokens=8192))
    engine.stop()
    memory = engine.memory()
    detail = found["memory"]["detail"]
    assert f"adapters {memory['adapters'] >> 20} MiB" in detail
    assert f"KV cache {round(memory['KV cache'] / (1 << 20))} MiB (8,192 tokens)" in detail
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    assert f"{parameters:,} parameters" in found["base"]["detail"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_has_a_plan_in_any_dtype(dtype: str, tmp_path: Path) -> None:
    MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)
    _, found = findings("--store", tmp_path / "store", "--base", tmp_path, "--dtype", dtype)
    assert found["memory"]["status"] != "problem"
    # 2 layers, keys and values, 2 heads 8 wide, for 32,768 tokens.
    size = 2 * 2 * 2 * 8 * 32_768 * (4 if dtype == "float32" else 2)
    assert f"KV cache {size >> 20} MiB (32,768 tokens)" in found["memory"]["detail"]


def test_bytes_that_are_only_planned_are_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    device = torch.device("cuda")
    settings = ServeSettings(gpu_memory_fraction=1)
    whole = DeviceMemory(settings, device).pool_bytes()
    memory = DeviceMemory(settings, device)
    memory.hold(40 << 30)
    assert memory.pool_bytes() == whole / 2
    memory.hold(20 << 30)
    assert memory.pool_bytes() == whole / 4


def test_what_is_missing_is_a_problem_with_its_remedy(tmp_path: Path) -> None:
    status, found = findings("--store", tmp_path / "absent", "--base", tmp_path / "nowhere", "--device", "cuda:9")
    assert status == 1
    assert (found["device"]["status"], found["base"]["status"]) == ("problem", "problem")
    assert "serve makes it" in found["store"]["detail"]
    assert not (tmp_path / "absent").exists()
    # As a new volume is mounted.
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    status, found = findings("--store", tmp_path / "empty")
    assert (status, found["store"]["status"]) == (0, "ok") and "serve makes it" in found["store"]["detail"]
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["lost+found"]
    (tmp_path / "empty" / "photo.jpg").touch()
    assert findings("--store", tmp_path / "empty")[1]["store"]["status"] == "problem"


def test_keys_that_cannot_be_read_are_a_problem(store: AdapterStore, tmp_path: Path) -> None:
    assert findings("--store", store.root)[1]["database"]["status"] == "ok"
    folder = AdapterStore(tmp_path / "store").root
    Keys(AccessDatabase(folder)).create("acme", ["infer"])
    file = folder / "access" / "access.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        # Of an older release, whose servers may still run: it stays of that release.
        connection.execute("PRAGMA user_version = 3")
    before = file.read_bytes()
    assert findings("--store", folder)[1]["database"]["status"] == "ok"
    assert file.read_bytes() == before
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version = 99")
    status, found = findings("--store", folder)
    assert (status, found["database"]["status"]) == (1, "problem") and "newer release" in found["database"]["detail"]
    file.write_bytes(bytes(4096))
    assert findings("--store", folder)[0] == 1


@pytest.mark.parametrize("arguments", [(), ("--full",)])
def test_what_a_server_deletes_meanwhile_is_no_problem(
    store: AdapterStore, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = AdapterStore(tmp_path / "copy")
    copy.publish(store.load(store.resolve("demo/writer").digest), "demo/writer")
    load = AdapterStore.load

    def after_a_deletion(read: AdapterStore, digest: str) -> AdapterBundle:
        if copy.has_content("demo/writer", digest):
            copy.delete("demo/writer")
        return load(read, digest)

    monkeypatch.setattr(AdapterStore, "load", after_a_deletion)
    status, found = findings("--store", copy.root, *arguments)
    assert (status, found["bundles"]["status"]) == (0, "ok")


def test_a_damaged_bundle_is_named(store: AdapterStore, tmp_path: Path) -> None:
    copy = AdapterStore(tmp_path / "copy")
    version = copy.publish(store.load(store.resolve("demo/writer").digest), "demo/writer")
    (bundle,) = copy.root.rglob("*.safetensors")
    content = bytearray(bundle.read_bytes())
    content[-1] ^= 1
    bundle.chmod(0o644)
    bundle.write_bytes(content)
    status, found = findings("--store", copy.root)
    assert status == 1
    assert version.digest[:8] in found["bundles"]["detail"] or "writer" in found["bundles"]["detail"]


def lines(name: str, *arguments: str | Path) -> list[tuple[str, str]]:
    """Detail and remedy of each finding of that name."""
    result = CliRunner().invoke(build_cli(), ["doctor", "--json", *map(str, arguments)])
    found = [finding for finding in json.loads(result.output)["findings"] if finding["name"] == name]
    assert result.exit_code == 1 and all(finding["status"] == "problem" for finding in found)
    return [(finding["detail"], finding["remedy"]) for finding in found]


@pytest.mark.parametrize("arguments", [(), ("--full",)])
def test_every_fault_has_a_line_with_its_own_remedy(
    store: AdapterStore, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = AdapterStore(tmp_path / "copy")
    bundles = [store.load(store.resolve(name).digest) for name in ("demo/writer", "demo/sorter")]
    for name in ("acme/a", "acme/b", "acme/c", "acme/d"):
        copy.publish(bundles[name == "acme/b"], name)
    copy.set_alias("acme/d", "stable", "acme/d@v1")
    (copy.root / "adapters/acme/d/aliases/stable.json").write_text('{"version": 8}')
    (copy.root / "adapters/acme/c/versions/v1.json").write_bytes(b"")
    (copy.root / "bundles" / f"{bundles[1].digest}.safetensors").unlink()
    found = lines("bundles", "--store", copy.root, *arguments)
    assert [remedy for _, remedy in found] == [
        "publish it again, or delete the version",
        "restore it from a backup, or delete it to give up what it names",
        "point it again",
    ]
    words = ["the bundle of acme/b@v1 is missing", "acme/c/versions/v1.json is damaged", "acme/d@stable points to v8"]
    assert all(word in detail for word, (detail, _) in zip(words, found, strict=True))
    (copy.root / "bundles" / f"{bundles[0].digest}.safetensors").write_bytes(b"")
    found = lines("bundles", "--store", copy.root, *arguments)
    assert [remedy for _, remedy in found][:2] == ["publish it again", "publish it again, or delete the version"]
    assert len(found) == 5
    monkeypatch.setattr(diagnosis, "_MOST_FAULTS", 3)
    found = lines("bundles", "--store", copy.root, *arguments)
    assert len(found) == 4 and found[3][0] == "5 faults in 4 adapters; the first 3 are above"


def test_a_damaged_alias_and_a_damaged_record_of_deletions_have_remedies(store: AdapterStore, tmp_path: Path) -> None:
    copy = AdapterStore(tmp_path / "copy")
    for name in ("demo/writer", "demo/sorter"):
        copy.publish(store.load(store.resolve(name).digest), "acme/a")
    copy.set_alias("acme/a", "stable", "acme/a@v1")
    (copy.root / "adapters/acme/a/aliases/stable.json").write_text("")
    (copy.root / "retired/acme").mkdir()
    (copy.root / "retired/acme/a.json").write_text("")
    remedies = [remedy for _, remedy in lines("bundles", "--store", copy.root, "--full")]
    assert remedies[0] == "point alias 'stable' again, or remove it"
    assert len(remedies) == 2 and remedies[1].startswith('write {"highest_version": N} to it')


def test_training_files_that_are_gone_are_named(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store").root
    database = AccessDatabase(store)
    files = TrainingFiles(database, JobPaths(store), 1 << 20)
    kept, gone, cut, deleted = (files.add("acme", "rows.jsonl", BytesIO(jsonl(SORTED))) for _ in range(4))
    files.delete(deleted.id, "acme")
    database.close()
    assert "training files" not in findings("--store", store)[1]
    files.path(gone).unlink()
    files.path(cut).write_bytes(files.path(cut).read_bytes()[:-1])
    ((detail, remedy),) = lines("training files", "--store", store)
    assert detail.startswith("2 files") and gone.id in detail and cut.id in detail and kept.id not in detail
    assert "upload them again" in remedy
    with closing(sqlite3.connect(database.path)) as connection:
        # The database of a release that had no files.
        connection.execute("DROP TABLE files")
    assert findings("--store", store)[1]["database"]["status"] == "ok"


def test_slower_ways_are_warnings(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "grouped_sera_numba", None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    monkeypatch.setattr(diagnosis, "missing_packages", lambda: ["accelerate", "datasets"])
    status, found = findings("--store", store.root)
    assert status == 0
    assert found["kernels"]["remedy"] == "pip install 'sera-serve[cpu]'"
    assert found["training"]["detail"].endswith("accelerate, datasets missing")
    assert "'sera-serve[train]'" in found["training"]["remedy"]
    assert (found["disk"]["status"], found["open files"]["status"]) == ("warning", "warning")


def test_without_triton_a_gpu_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "triton" else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    grouped.path_for.cache_clear()
    (found,) = diagnosis._kernels(ServeSettings(device="cuda"))
    grouped.path_for.cache_clear()
    assert (found.status, found.remedy) == ("warning", "pip install triton")


def test_text_has_a_line_for_each_finding(store: AdapterStore) -> None:
    result = CliRunner().invoke(build_cli(), ["doctor", "--store", str(store.root)])
    assert result.exit_code == 0
    assert all(line.startswith(("ok ", "warning ", "problem ")) for line in result.output.splitlines())
    assert CliRunner().invoke(build_cli(), ["doctor", "--config", "/nowhere.yaml"]).exit_code == 2


def test_check_config_shows_each_value_and_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_queue: 7\nport: 1\ntenant_weights: {acme: 2}\n")
    monkeypatch.setenv("SERA_SERVE_PORT", "2")
    monkeypatch.setenv("SERA_SERVE_POOL_MIB", "3")
    result = CliRunner().invoke(build_cli(), ["check-config", "--config", str(file), "--pool-mib", "4"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert set(lines) == set(ServeSettings.model_fields)
    assert lines["port"].split(maxsplit=2)[1:] == ["2", "variable SERA_SERVE_PORT"]
    assert lines["pool_mib"].split(maxsplit=2)[1:] == ["4", "flag --pool-mib"]
    assert lines["max_queue"].split(maxsplit=2)[1:] == ["7", f"file {file}"]
    assert '{"acme": 2.0}' in lines["tenant_weights"]
    assert lines["device"].split() == ["device", '"cpu"', "default"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "port (flag --port) is 99999"),
        (["--config", "/nowhere.yaml"], "cannot be read"),
        (["--auth", "off", "--host", "0.0.0.0"], "auth is off"),
        (["--metrics-address", "9100"], "metrics_address"),
        (["--metrics-address", "127.0.0.1:8000"], "the server itself has port 8000; choose another port"),
        (["--port", "9", "--metrics-address", "[::1]:9"], "the server itself has port 9; choose another port"),
        (["--otel-endpoint", "localhost:4318"], 'write a URL, such as "http://localhost:4318"'),
        (["--allowed-origins", "example.com"], "allowed_origins"),
    ],
)
def test_check_config_refuses_what_serve_refuses(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(build_cli(), ["check-config", *arguments])
    assert result.exit_code == 2
    assert words in result.output
