"""Every test row over HTTP gives the trainer's metrics: each text task, real data, the embedded base."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterStore
from benchmarks.served_tasks import CASES, are_equal, ask, differences, prepare
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.trainer.run import train_adapter
from support.live_server import live_server

ROWS = 32
TEST_ROWS = 24


@pytest.mark.slow
def test_the_servers_answers_score_what_the_trainer_measured(shared_data: Path, tmp_path: Path) -> None:
    base = load_base("embedded")
    store = AdapterStore(tmp_path / "store")
    trained = []
    for number, case in enumerate(CASES):
        settings, rows = prepare(case, shared_data, tmp_path / f"task{number}", ROWS, TEST_ROWS)
        update = {"base": "embedded", "store": store.root, "epochs": 1, "rank": 4}
        update |= {"target_modules": ("q_proj", "v_proj"), "eval_fraction": 0.0}
        result = train_adapter(settings.model_copy(update=update), base=base)
        trained.append((case, settings.name, result.metrics, rows))
    serving = ServeSettings(store=store.root, pool_mib=16, kv_cache_tokens=1024)
    app = build_app(ServingEngine(base, store, serving), store, serving)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for case, name, metrics, rows in trained:
            served = case.metrics(rows, ask(client, name, case, rows, base))
            distances = differences(metrics, served)
            assert distances and are_equal(case, distances), (case.name, metrics, served)
