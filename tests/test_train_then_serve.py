"""What the trainer measured is what the server answers: real data, the embedded base, over HTTP."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings
from support.live_server import live_server

# Two tenants with different adapters and label sets, and rows longer than max_length among them.
TENANTS = {
    "acme/spam": ("tenants/sms_spam", {"method": "sera", "rank": 16}),
    "acme/news": ("tenants/ag_news", {"method": "lora", "rank": 2, "target_modules": ("q_proj", "v_proj")}),
}
ROWS = 64


def sample(source: Path, target: Path) -> Path:
    """The first rows of a data set, header included."""
    with source.open(newline="", encoding="utf-8") as rows, target.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        for _, row in zip(range(ROWS + 1), csv.reader(rows), strict=False):
            writer.writerow(row)
    return target


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def test_classification_over_http_is_the_trainers_evaluation(shared_data: Path, tmp_path: Path) -> None:
    base = load_base("embedded")
    store = AdapterStore(tmp_path / "store")
    trained: dict[str, tuple[TrainResult, Path]] = {}
    for name, (folder, options) in TENANTS.items():
        tenant = name.replace("/", "-")
        train = sample(shared_data / folder / "train.csv", tmp_path / f"{tenant}-train.csv")
        evaluation = sample(shared_data / folder / "test.csv", tmp_path / f"{tenant}-eval.csv")
        settings = TrainSettings.model_validate(
            {"base": "embedded", "store": store.root, "name": name, "task": "classify", "train": train}
            | {"eval": evaluation, "epochs": 1, "learning_rate": 5e-3, "max_length": 48}
            | options
        )
        trained[name] = train_adapter(settings, base=base), evaluation
    settings = ServeSettings(store=store.root, pool_mib=16, kv_cache_tokens=1024)
    app = build_app(ServingEngine(base, store, settings), store, settings)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for name, (result, evaluation) in trained.items():
            rows = read(evaluation)
            answers = []
            for start in range(0, len(rows), 32):
                inputs = [row["text"] for row in rows[start : start + 32]]
                response = client.post("/v1/classify", json={"adapter": name, "inputs": inputs})
                assert response.status_code == 200, response.text
                answers += response.json()["results"]
            right = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
            assert right / len(rows) == pytest.approx(result.metrics["accuracy"], abs=1e-12)
            loss = sum(-math.log(a["probabilities"][row["label"]]) for a, row in zip(answers, rows, strict=True))
            assert loss / len(rows) == pytest.approx(result.metrics["loss"], rel=1e-4)
