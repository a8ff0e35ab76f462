"""The example of a tenant's day against a live server with keys, the embedded base and the real trainer."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from adapters_store import AdapterStore
from sera_serve.access import AccessDatabase, Keys
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.live_server import live_server

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tenant_day.py"


def test_a_tenants_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = AdapterStore(tmp_path / "store")
    database = AccessDatabase(store.root)
    secret = Keys(database).create("operators", ["admin"]).secret
    database.close()
    settings = ServeSettings(store=store.root, pool_mib=8, kv_cache_tokens=2048)
    with live_server(build_app(ServingEngine(load_base("embedded"), store, settings), store, settings)) as url:
        arguments = ["--url", url, "--admin-key", secret, "--epochs", "4"]
        monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["loss"][1] < outcome["loss"][0]
    assert len(outcome["seconds"]) == 12
    assert int(outcome["retry_after"]) >= 1
    # The model is deleted. The operator's log has the whole day.
    assert list(store.iter_adapters()) == []
    lines = (store.root / "access" / "audit.jsonl").read_text().splitlines()
    actions = {json.loads(line)["action"] for line in lines}
    expected = {"key.create", "file.create", "job.create", "job.finish", "adapter.publish", "alias.set"}
    assert expected | {"quota.set", "adapter.delete", "key.revoke"} <= actions
