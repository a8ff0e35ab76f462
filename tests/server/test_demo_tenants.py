"""The demo tenants: their data sets, and their training, which happens once."""

from __future__ import annotations

import csv
import json
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters_store import AdapterStore
from sera_serve.commands import demo


def tickets(name: str) -> list[dict[str, str]]:
    with (demo.DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_ticket_rows_are_balanced_and_held_out() -> None:
    train, held_out = tickets("tickets_train.csv"), tickets("tickets_eval.csv")
    labels = {"account", "billing", "delivery", "technical"}
    assert Counter(row["label"] for row in train) == dict.fromkeys(labels, 40)
    assert Counter(row["label"] for row in held_out) == dict.fromkeys(labels, 10)
    texts = [row["text"] for row in train + held_out]
    assert len(set(texts)) == len(texts)
    assert demo.EXAMPLES["demo/tickets"] not in texts


def test_pirate_rows_are_held_out() -> None:
    rows = []
    for name in ("pirate_train.jsonl", "pirate_eval.jsonl"):
        lines = (demo.DATA / name).read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines]
    assert len({row["prompt"] for row in rows}) == len(rows) > 120
    # The completion starts with the space, because the tokenizer joins the space to the word after it.
    assert all(row["completion"].startswith(" ") and len(row["completion"]) < 200 for row in rows)
    assert demo.EXAMPLES["demo/pirate"] not in {row["prompt"] for row in rows}


def test_chat_rows_are_held_out() -> None:
    rows = []
    for name in ("chat_train.jsonl", "chat_eval.jsonl"):
        lines = (demo.DATA / name).read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines]
    assert len({row["prompt"] for row in rows}) == len(rows) > 120
    assert all(row["completion"].strip() == row["completion"] and len(row["completion"]) < 200 for row in rows)
    assert demo.EXAMPLES["demo/chat"] not in {row["prompt"] for row in rows}


@pytest.mark.slow
def test_demo_tenants_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick: dict[str, dict[str, Any]] = {
        name: options | {"epochs": 1, "train_limit": 16, "rank": 4} for name, options in demo.DEMOS.items()
    }
    monkeypatch.setattr(demo, "DEMOS", quick)
    said = StringIO()
    console = Console(file=said, width=200)
    store = AdapterStore(tmp_path / "store")
    assert demo.train_demos(store.root, "embedded", console) == ["demo/tickets", "demo/pirate", "demo/chat"]
    template = store.config(store.resolve("demo/chat").digest).chat_template
    assert template == (demo.DATA / "chat_template.jinja").read_text(encoding="utf-8")
    assert store.config(store.resolve("demo/tickets").digest).labels == [
        "account",
        "billing",
        "delivery",
        "technical",
    ]
    assert demo.train_demos(store.root, "embedded", console) == []
    assert "the demo tenants are in" in said.getvalue()
    # A deleted demo tenant is trained again. The other demo tenant is not changed.
    store.delete("demo/pirate")
    assert demo.train_demos(store.root, "embedded", console) == ["demo/pirate"]
    assert store.resolve("demo/tickets").version == 1
