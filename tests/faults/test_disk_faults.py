"""A store that is full, read-only, gone or hung, seen by clients: each is told so, and what can be served is served."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterBundle, StoreState
from sera_serve.server import health
from support.answers import refused
from support.faulty_serving import Serving, name
from support.small_disk import fill_bytes, small_disk

Serve = Callable[..., Serving]
FIRST, SECOND = name(0), name(1)


def upload(serving: Serving, bundle: AdapterBundle, adapter: str) -> httpx.Response:
    files = {"bundle": ("a.safetensors", bundle.to_bytes())}
    return serving.client.post("/v1/adapters", files=files, data={"name": adapter})


def store_state(serving: Serving) -> str:
    answer = serving.client.get("/readyz")
    assert answer.status_code == 200, answer.text
    state: str = answer.json()["store"]
    return state


def test_a_full_store_serves_and_deletes(
    serve: Serve, writers: dict[str, AdapterBundle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "store", mib=16, files=2000) as disk:
        serving = serve()
        assert store_state(serving) == "writable"
        fill_bytes(disk)
        assert store_state(serving) == "full"
        before = sorted((disk / "bundles").iterdir())
        other = AdapterBundle(writers[FIRST].config, {k: v + 1 for k, v in writers[FIRST].tensors.items()})
        error = refused(upload(serving, other, "t0/new"), 507, "store_write_failed")
        assert "No space left" in error["message"]
        rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 1000
        form = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
        refused(serving.client.post("/v1/files", **form), 507, "file_not_stored")
        # One line each, with the reason, and no traceback.
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert ["No space left on device" in record.message for record in errors] == [True, True]
        assert not any(record.exc_info for record in errors)
        assert sorted((disk / "bundles").iterdir()) == before
        serving.assert_right(FIRST)
        assert serving.client.delete(f"/v1/adapters/{FIRST}").status_code == 200
        serving.assert_right(SECOND)
        refused(serving.ask(FIRST), 404, "adapter_not_found")
        (disk / "filler").unlink()
        assert upload(serving, writers[FIRST], FIRST).json()["version"] == 2
        serving.assert_right(FIRST)


def test_a_read_only_store_serves(serve: Serve, writers: dict[str, AdapterBundle], tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", mib=16, files=2000) as disk:
        serving = serve()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert store_state(serving) == "read_only"
        serving.assert_right(FIRST)
        assert len(serving.client.get("/v1/adapters").json()["adapters"]) == len(writers)
        for answer in (upload(serving, writers[FIRST], "t0/new"), serving.client.delete(f"/v1/adapters/{FIRST}")):
            assert "Read-only" in refused(answer, 507, "store_write_failed")["message"]


def test_a_store_that_was_removed_is_unavailable_until_it_is_back(
    serve: Serve, writers: dict[str, AdapterBundle], tmp_path: Path
) -> None:
    serving = serve()
    serving.assert_right(FIRST)
    client, root = serving.client, serving.store.root
    root.rename(tmp_path / "away")
    answers = [
        client.get("/readyz"),
        client.get("/v1/adapters"),
        client.get(f"/v1/adapters/{FIRST}"),
        client.delete(f"/v1/adapters/{FIRST}"),
        upload(serving, writers[FIRST], FIRST),
        upload(serving, writers[FIRST], "t0/new"),
        serving.ask(FIRST),
        serving.ask(SECOND, stream=True),
    ]
    for answer in answers:
        assert str(root) not in refused(answer, 503, "store_unavailable")["message"]
    assert not root.exists()
    assert client.get("/healthz").status_code == 200
    serving.assert_right(None)
    (tmp_path / "away").rename(root)
    assert store_state(serving) == "writable"
    serving.assert_right(SECOND)


def test_a_hung_disk_holds_up_neither_the_loop_nor_a_probe(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_STORE_TIMEOUT_S", 0.3)
    serving = serve()
    gate, checks = threading.Event(), 0

    def hang() -> StoreState:
        nonlocal checks
        checks += 1
        assert gate.wait(60)
        return "writable"

    monkeypatch.setattr(serving.store, "check", hang)
    state = serving.app.state
    state.operator_calls = health.OperatorCalls.of(serving.store, serving.engine, state.metrics)
    try:
        with ThreadPoolExecutor(8) as clients:
            probes = [clients.submit(httpx.get, f"{serving.url}/readyz", timeout=10) for _ in range(8)]
            began = time.monotonic()
            assert serving.client.get("/healthz").status_code == 200
            assert time.monotonic() - began < 5
            for probe in probes:
                assert "check the disk" in refused(probe.result(), 503, "store_unavailable")["message"]
        refused(serving.client.get("/readyz"), 503, "store_unavailable")
        assert checks == 1
    finally:
        gate.set()
    assert store_state(serving) == "writable"
