"""What the trainer measured on images is what the server answers: real photographs, over HTTP."""

from __future__ import annotations

import base64
import csv
import math
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.trainer.recall import retrieval_metrics
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings
from support.live_server import live_server
from support.vision import random_clip, random_vit

pytestmark = pytest.mark.slow

PER_LABEL = {"train": 40, "test": 30}
PHOTOGRAPHS = 30


def patches(source: Path, target: Path) -> Path:
    """A few patches of each split and label, as a folder."""
    taken: dict[str, int] = {}
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            folder, _, file = name.rpartition("/")
            if file and taken.setdefault(folder, 0) < PER_LABEL[folder.split("/")[0]]:
                taken[folder] += 1
                (target / folder).mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(archive.read(name))
    return target


def train(base: FrozenBase, folder: Path, rows: Path, **options: Any) -> TrainResult:
    defaults = {"base": "random", "store": folder / "store", "name": "acme/eyes", "train": rows, "epochs": 1, "rank": 8}
    return train_adapter(TrainSettings(**defaults, **options), base=base)


def test_every_test_image_over_http_gives_the_trainers_metrics(shared_data: Path, tmp_path: Path) -> None:
    folder = patches(shared_data / "images" / "road_crack" / "patches.zip", tmp_path / "patches")
    base = random_vit()
    options: dict[str, Any] = {"task": "image-classify", "augment": True, "pooling": "mean", "eval_fraction": 0}
    result = train(base, tmp_path, folder, **options)
    files = sorted((folder / "test").rglob("*.jpg"))
    truth = [path.parent.name for path in files]
    store = AdapterStore(tmp_path / "store")
    settings = ServeSettings(store=store.root, pool_mib=4)
    answers: list[Any] = []
    with live_server(build_app(ServingEngine(base, store, settings), store, settings)) as url:
        for start in range(0, len(files), 8):
            parts = [("image", (path.name, path.read_bytes())) for path in files[start : start + 8]]
            response = httpx.post(f"{url}/v1/classify", data={"adapter": "acme/eyes"}, files=parts, timeout=30)
            assert response.status_code == 200, response.text
            answers += response.json()["results"]
    found = [answer["label"] for answer in answers]
    measured = result.metrics
    assert sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth) == measured["test_accuracy"]
    assert f1_score(truth, found, average="macro", zero_division=np.nan) == measured["test_macro_f1"]
    assert matthews_corrcoef(truth, found) == pytest.approx(measured["test_matthews"], abs=1e-12)
    losses = [-math.log(answer["probabilities"][label]) for answer, label in zip(answers, truth, strict=True)]
    assert sum(losses) / len(losses) == pytest.approx(measured["test_loss"], rel=1e-5)
    assert 0.4 < measured["test_accuracy"] < 1


def test_served_embeddings_give_the_trainers_recall(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "images" / "flickr8k_1k"
    with (source / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: 5 * PHOTOGRAPHS]
    table = tmp_path / "captions.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    base = random_clip()
    options: dict[str, Any] = {"task": "retrieve", "images": source / "images.zip", "test": table, "eval_fraction": 0}
    result = train(base, tmp_path, table, learning_rate=1e-2, max_length=24, **options)
    photos = list(dict.fromkeys(row["image"] for row in rows))
    store = AdapterStore(tmp_path / "store")
    settings = ServeSettings(store=store.root, pool_mib=4)
    with zipfile.ZipFile(source / "images.zip") as archive:
        images = [{"image": base64.b64encode(archive.read(f"images/{name}")).decode()} for name in photos]
    with live_server(build_app(ServingEngine(base, store, settings), store, settings)) as url:

        def vectors(inputs: list[Any]) -> np.ndarray:
            found: list[list[float]] = []
            for start in range(0, len(inputs), 16):
                body = {"model": "acme/eyes", "input": inputs[start : start + 16], "normalize": False}
                response = httpx.post(f"{url}/v1/embeddings", json=body, timeout=30)
                assert response.status_code == 200, response.text
                found += [item["embedding"] for item in response.json()["data"]]
            return np.array(found, np.float32)

        served = vectors(images), vectors([row["caption"] for row in rows])
    metrics = retrieval_metrics(*served, [photos.index(row["image"]) for row in rows], 0.2)
    for name, value in metrics.items():
        if name == "loss":
            assert value == pytest.approx(result.metrics["test_loss"], rel=1e-5)
        else:
            assert value == result.metrics[f"test_{name}"], name
    assert 0.3 < metrics["rsum"] < 6
