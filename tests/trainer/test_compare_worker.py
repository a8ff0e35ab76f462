"""The process that trains the runs of a comparison, and the command over it: whole, so slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trainer_samples import ending_rule, write_csv

from sera_serve.trainer.compare.worker import train_one

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_worker_says_that_it_is_ready_and_ends_with_its_input() -> None:
    command = [sys.executable, "-m", "sera_serve.trainer.compare.worker"]
    worker = subprocess.run(command, input="", stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT)
    assert worker.stdout == "ready\n"


def test_a_run_without_rows_to_test_on_scores_none(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ending_rule(48))
    settings = {"base": str(tiny_encoder), "task": "classify", "train": str(train), "test": str(train), "epochs": 1}
    for rows, expected in ((0, False), (5, True)):
        run = {"settings": settings | {"method": "head-only"}, "baseline": None, "test_rows": rows}
        assert ("test_accuracy" in train_one(run)["metrics"]) == expected


def test_a_comparison_from_the_command_line(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ending_rule(48))
    plan = {
        "bases": {"tiny": {"base": str(tiny_encoder), "target_modules": "query,value"}},
        "data": {"words": {"train": str(train), "test": str(train), "test_rows": 20}},
        "methods": [
            {"method": "sera", "rank": 4},
            {"method": "vera", "rank": 16, "learning_rate": 0.01},
            {"method": "houlsby", "learning_rate": 0.01},
            {"method": "head-only", "learning_rate": 0.01},
        ],
        "seeds": [0, 1],
        "settings": {"epochs": 1, "pooling": "mean"},
        "learning_rates": {"ladder": [0.01, 0.1], "start": [0.01], "seed": 9},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-c", "from sera_serve.trainer.cli import main; main()", "compare", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["left"] == 0
    cells = {cell["method"]: cell for cell in table["cells"]}
    assert list(cells) == ["sera r=4", "vera r=16", "houlsby 1/16", "head-only"]
    for name, cell in cells.items():
        assert cell["runs"] == (0 if name == "houlsby 1/16" else 2), (name, cell["error"])
    assert "needs the library adapters" in cells["houlsby 1/16"]["error"]
    assert cells["head-only"]["parameters"] == 0
    assert (tmp_path / "plan.png").is_file()
    results = (tmp_path / "plan.results.jsonl").read_text().splitlines()
    # Equal settings give equal figures, whenever they run.
    (tmp_path / "plan.results.jsonl").write_text("".join(line + "\n" for line in results[:-3]))
    subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    again = (tmp_path / "plan.results.jsonl").read_text().splitlines()
    assert [json.loads(line).get("metrics") for line in again] == [json.loads(line).get("metrics") for line in results]
