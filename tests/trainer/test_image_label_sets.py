"""Images with sets of labels: tables and metadata files, what is refused, and what is learned and served."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from image_samples import COLOURS, image_folder, image_settings
from PIL import Image

from adapters_store import AdapterStore
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.trainer.data.images import load_image_classify_data
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tasks.multi_label import label_set_metrics
from support.live_server import live_server
from support.vision import image_file, random_vit

SETS: list[list[str]] = [["blue"], ["red"], ["blue", "red"], []]


def halves(labels: list[str], seed: int) -> bytes:
    """An image whose halves have the colours of the labels; grey where there is none."""
    colours = [COLOURS[label] if label in labels else (120, 120, 120) for label in ("blue", "red")]
    noise = np.random.default_rng(seed).normal(0, 15, (24, 24, 3))
    noise[:, :12] += colours[0]
    noise[:, 12:] += colours[1]
    return image_file(Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)))


def metadata_folder(folder: Path, count: int, kind: str = "jsonl", begin: int = 0) -> Path:
    """A folder of images with a metadata file, as `datasets` has it."""
    folder.mkdir(parents=True)
    rows = [(f"{seed}.png", SETS[seed % len(SETS)]) for seed in range(begin, begin + count)]
    for seed, (name, labels) in enumerate(rows, begin):
        (folder / name).write_bytes(halves(labels, seed))
    if kind == "csv":
        lines = ["file_name,tags", *(f"{name},{'|'.join(labels)}" for name, labels in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        lines = [json.dumps({"file_name": name, "tags": labels}) for name, labels in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options(**more: Any) -> dict[str, Any]:
    return {"multi_label": True, "label_column": "tags"} | more


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_has_the_labels_of_each_image(kind: str, tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path / "rows", 8, kind)
    data = load_image_classify_data(image_settings(tmp_path, folder, **options(eval_fraction=0.25)))
    assert data.labels == ["blue", "red"]
    assert len(data.train) + len(data.eval) == 8 and data.eval
    found = {(row.row.number, row.target) for row in data.train + data.eval}
    assert found == {(number + 1, frozenset(SETS[number % 4])) for number in range(8)}


def test_each_label_keeps_a_training_image(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path / "rows", 24)
    lines = [{"file_name": f"{i}.png", "tags": ["common", f"rare{i}"] if i < 9 else ["common"]} for i in range(24)]
    lines[23]["tags"] = ["common,rare1"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_image_classify_data(image_settings(tmp_path, folder, **options(eval_fraction=0.4)))
    assert {label for row in data.train for label in row.target} == set(data.labels) and len(data.labels) == 11
    assert data.eval
    assert any("10 labels 'common,rare1', 'rare0'" in note and "a single row each" in note for note in data.notes)
    assert any("'common,rare1' is one label" in note and "give --label-separator ','" in note for note in data.notes)
    drawn = load_image_classify_data(image_settings(tmp_path, folder, **options(train_limit=8)))
    assert any("no row of it is among the 8 drawn ones" in note for note in drawn.notes)


def test_what_cannot_be_learned_is_refused_with_its_row(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path / "rows", 8)

    def refused(text: str, **more: Any) -> str:
        (folder / "metadata.jsonl").write_text(text)
        with pytest.raises(InvalidData) as caught:
            load_image_classify_data(image_settings(tmp_path, folder, **options(**more)))
        return caught.value.message

    good = "".join(json.dumps({"file_name": f"{i}.png", "tags": ["blue"]}) + "\n" for i in range(4))
    twice = json.dumps({"file_name": "4.png", "tags": ["red", "red"]}) + "\n"
    assert "row 5 (line 5): tags has a label twice" in refused(good + twice)
    broken = json.dumps({"file_name": "none.png", "tags": []}) + "\n"
    assert "row 5 (line 5): file_name" in refused(good + broken)
    assert "has no column 'label'" in refused(good, label_column="label")
    assert "no row has a label" in refused(good.replace('"blue"', ""))
    other = metadata_folder(tmp_path / "other", 2)
    assert "row 2 (line 2): label 'red' is not in the training data, which has blue" in refused(good, eval=other)
    plain = image_folder(tmp_path / "plain", 4)
    with pytest.raises(InvalidData, match=r"one label; give a folder with a metadata\.csv"):
        load_image_classify_data(image_settings(tmp_path, plain, **options()))


def test_every_served_image_gives_the_trainers_metrics(tmp_path: Path) -> None:
    base = random_vit()
    train = metadata_folder(tmp_path / "train", 48)
    test = metadata_folder(tmp_path / "test", 12, "csv", begin=500)
    settings = image_settings(tmp_path, train, **options(test=test, epochs=4, learning_rate=1e-2, pooling="mean"))
    result = train_adapter(settings, base=base)
    metrics = {name.removeprefix("test_"): value for name, value in result.metrics.items() if name.startswith("test_")}
    assert set(metrics) == {"loss", "micro_f1", "macro_f1", "subset_accuracy"}
    assert metrics["micro_f1"] > 0.8
    store = AdapterStore(settings.store)
    config = store.config(result.digest)
    assert (config.task, config.multi_label, config.labels) == ("image-classify", True, ["blue", "red"])
    images = [{"image": base64.b64encode((test / f"{seed}.png").read_bytes()).decode()} for seed in range(500, 512)]
    serve = ServeSettings(store=store.root, pool_mib=4)
    with live_server(build_app(ServingEngine(base, store, serve), store, serve)) as url:
        answers: list[Any] = []
        for start in (0, 6):
            body = {"adapter": "acme/eyes", "inputs": images[start : start + 6]}
            response = httpx.post(f"{url}/v1/classify", json=body, timeout=30)
            assert response.status_code == 200, response.text
            answers += response.json()["results"]
    predicted = np.array([[label in answer["labels"] for label in ("blue", "red")] for answer in answers])
    expected = np.array([[label in SETS[seed % 4] for label in ("blue", "red")] for seed in range(500, 512)])
    assert label_set_metrics(expected, predicted) == {name: metrics[name] for name in metrics if name != "loss"}


def test_an_adapter_of_sets_goes_on_with_sets_alone(tmp_path: Path) -> None:
    base = random_vit()
    train = metadata_folder(tmp_path / "train", 8)
    head_only = options(method="head-only", epochs=1)
    train_adapter(image_settings(tmp_path, train, **head_only), base=base)
    settings = {"init_from": "acme/eyes", "name": "acme/more", "epochs": 1}
    again = options(**settings)
    with pytest.raises(InvalidConfiguration, match="give --multi-label too"):
        plain = image_folder(tmp_path / "plain", 4)
        train_adapter(image_settings(tmp_path, plain, method="head-only").model_copy(update=settings), base=base)
    made = image_settings(tmp_path, train, method="head-only").model_copy(update=again)
    result = train_adapter(made, base=base)
    assert AdapterStore(made.store).config(result.digest).labels == ["blue", "red"]


def test_patience_without_rows_for_evaluation_is_refused(tmp_path: Path) -> None:
    settings = image_settings(tmp_path, metadata_folder(tmp_path / "rows", 16), **options(eval_fraction=0, patience=1))
    with pytest.raises(InvalidData, match="--patience needs evaluations; give --eval"):
        load_image_classify_data(settings)
