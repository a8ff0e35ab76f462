"""The run card: what a training record tells people, also where others wrote the record; and the hub's model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import BASE, make_bundle, make_classifier
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.card import MAX_LINES, MAX_TEXT, run_card
from sera_serve.cli import build_cli
from sera_serve.commands.model_card import model_card

RECORD: dict[str, Any] = {
    "settings": {"epochs": 5, "rank": 8, "dropout": 0.1, "eval": None, "multi_label": False, "train_factors": ["b"]},
    "learning_rate": 0.01,
    "rows": {"train": 2239, "eval": 249, "test": 0},
    "data_sha256": {"train": "a" * 64},
    "metrics": {"accuracy": 0.87654321, "loss": 0.5},
    "chosen_step": 1120,
    "chosen_epoch": 2,
    "epochs": 3,
    "evaluations": [{"epoch": 1, "accuracy": 0.5, "loss": 0.7}, {"epoch": 2, "accuracy": 0.8765, "loss": None}],
    "trained_tokens": 616545,
    "notes": ["5 of 2239 training rows were cut to 128 tokens"],
    "init_from": {"adapter": "acme/a@v1", "digest": "b" * 64},
    "description": "Tells\nlines",
}


def test_the_trainers_record_in_words() -> None:
    assert run_card(make_bundle(training=RECORD).config) == {
        "description": "Tells lines",
        "goes on from": f"adapter acme/a@v1, digest {'b' * 64}",
        "rows": "2,239 train, 249 eval",
        "sha256 of the data": f"train {'a' * 16}",
        "changes to the data": "5 of 2239 training rows were cut to 128 tokens",
        "settings": 'epochs=5, rank=8, dropout=0.1, train_factors=["b"]',
        "learning rate": "0.01",
        "trained tokens": "616,545",
        "chosen epoch": "2 of 3, step 1,120",
        "metrics": "accuracy 0.8765, loss 0.5",
        "metrics by epoch": "accuracy 0.5 0.8765; loss 0.7 null",
    }
    assert run_card(make_bundle(training={}).config) == {}


def test_a_record_of_others_is_shown_as_it_is() -> None:
    record: dict[str, Any] = dict.fromkeys(RECORD, 7) | {"notes": [], "my_field": {"a": [1]}, "x" * 100: "y" * 5000}
    card = run_card(make_bundle(training=record).config)
    assert card["rows"] == card["settings"] == card["metrics by epoch"] == "7"
    assert card["changes to the data"] == "none"
    assert card["my field"] == '{"a": [1]}'
    assert len(card["x" * 64]) == MAX_TEXT and card["x" * 64].endswith("…")
    many = {f"field{i}": i for i in range(100)}
    assert len(run_card(make_bundle(training=many).config)) == MAX_LINES
    long = {"evaluations": [{"epoch": i, "loss": i} for i in range(1, 40)], "chosen_epoch": "x"}
    assert run_card(make_bundle(training=long).config) == {
        "chosen epoch": "x",
        "metrics by epoch": "loss 1 2 3 4 5 6 7 8 9 10 11 …",
    }


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.publish(make_classifier(training=RECORD), "acme/spam")
    return store


def test_export_writes_a_card_beside_a_bundle_that_imports_still(store: AdapterStore, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(build_cli(), ["adapters", *map(str, arguments), "--store", str(store.root)])

    out = tmp_path / "out"
    inside = run("export", "acme/spam", "--output", out, "--card", out / "README.md")
    assert inside.exit_code == 1 and "is inside the bundle" in inside.stderr and not out.exists()
    for taken in (out, out / "adapter_config.json"):
        result = run("export", "acme/spam", "--format", "peft", "--output", out, "--card", taken)
        assert result.exit_code == 1 and f"{taken.name} exists" in result.stderr and not out.exists()
    path = tmp_path / "cards" / "README.md"
    result = run("export", "acme/spam", "--output", out, "--card", path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["card"] == str(path)
    assert AdapterBundle.load(out).digest == store.resolve("acme/spam").digest
    card = ModelCard.load(path)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["sera-serve", "adapter", "sera"]
    for text in ("# acme/spam", "2 of 3, step 1,120", "| labels | no, yes |", "serve --base tiny --store store"):
        assert text in card.text
    again = run("export", "acme/spam", "--output", tmp_path / "more", "--card", path)
    assert again.exit_code == 1 and "README.md exists" in again.stderr
    assert not (tmp_path / "more").exists()
    # The store sorts the keys of a record.
    assert "| rows | 2,239 train, 249 eval |" in card.text
    shown = run("inspect", "acme/spam").stdout
    assert "training: chosen epoch" in shown and "2 of 3" in shown


def test_a_card_of_a_hostile_bundle_has_no_markup_of_its_own() -> None:
    hostile = "x | y\n# Title [link](http://a) <script> `code` $(touch z)"
    bundle = make_classifier(base={**BASE, "name": hostile}, labels=["a|b", "<i>"], training={"description": hostile})
    text = model_card("acme/spam", 1, bundle.digest, bundle.config).text
    assert "<script" not in text and "\n# Title" not in text and "<i>" not in text
    assert "serve --base BASE --store" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    assert "\\[link](http" in text and "\\`code\\`" in text
