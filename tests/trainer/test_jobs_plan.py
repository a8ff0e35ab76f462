"""What a plan may hold, and what it is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer_samples import ending_rule, write_csv
from typer.testing import CliRunner

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer import cli
from sera_serve.trainer.together.plan import load_plan


def write_plan(folder: Path, plan: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(plan if isinstance(plan, str) else yaml.safe_dump(plan))
    return path


DEFAULTS = {"base": "embedded", "store": "store", "task": "classify", "train": "a.csv", "epochs": 2}


def test_defaults_jobs_and_flags(tmp_path: Path) -> None:
    jobs = [{"name": "acme/a"}, {"name": "acme/b", "epochs": 5, "task": "generate", "rank": 4}]
    plan = load_plan(write_plan(tmp_path, {"defaults": DEFAULTS, "jobs": jobs}), {"seed": 3, "rank": None})
    assert [(job.name, job.epochs, job.task, job.rank, job.seed) for job in plan.jobs] == [
        ("acme/a", 2, "classify", 16, 3),
        ("acme/b", 5, "generate", 4, 3),
    ]
    assert plan.together == 8


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("jobs: [", "is not valid YAML"),
        ("- a", "must hold `defaults:` and `jobs:`"),
        ({"jobs": []}, "jobs must be a list"),
        ({"jobs": [{"name": "acme/a"}], "defaults": []}, "defaults must hold `option: value` lines"),
        ({"job": []}, "unknown key 'job'; the keys are defaults, together, jobs"),
        ({"jobs": ["acme/a"]}, "job 1 must hold `option: value` lines"),
        ({"jobs": [{"name": "acme/a"}], "together": 0}, "together is 0; it must be a number from 1 to 64"),
        ({"jobs": [{"name": "acme/a", "epoch": 2}]}, "job 1: unknown option 'epoch'; did you mean 'epochs'"),
        ({"jobs": [{"name": "acme/a", "split": 3}]}, "job 1 (acme/a): split 3 does not divide rank 16"),
        ({"jobs": [{"rank": 2}]}, "job 1: missing --name"),
        ({"jobs": [{"name": "acme/a"}, {"name": "acme/a"}]}, "job 2 (acme/a) has the name of job 1"),
        ({"jobs": [{"name": "a/a", "task": "generate", "packing": True}]}, "has packing, whose rows have masks"),
        (
            {"jobs": [{"name": "a/a", "dropout": 0.1, "checkpoint_activations": True}]},
            "has dropout and checkpoint_activations, whose second pass would draw other numbers",
        ),
        ({"jobs": [{"name": "a/a"}, {"name": "a/b", "base": "other"}]}, "has base other, and job 1 has embedded"),
        ({"jobs": [{"name": "a/a"}, {"name": "a/b", "dtype": "bfloat16"}]}, "has dtype bfloat16, and job 1 has auto"),
    ],
)
def test_refused(tmp_path: Path, plan: Any, message: str) -> None:
    if isinstance(plan, dict) and "jobs" in plan:
        plan = {"defaults": DEFAULTS, **plan}
    with pytest.raises(InvalidConfiguration) as refusal:
        load_plan(write_plan(tmp_path, plan))
    assert message in refusal.value.message
    assert refusal.value.message.startswith(f"--jobs {tmp_path / 'plan.yaml'}")


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    found = {}
    monkeypatch.setattr("typer.main.Typer.__call__", lambda app: found.update(app=app))
    cli.main()
    result = CliRunner().invoke(found["app"], list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "a.csv", ending_rule(24))
    defaults = DEFAULTS | {"base": str(tiny_base), "epochs": 1, "rank": 2, "batch_size": 8}
    jobs = [{"name": "acme/a"}, {"name": "acme/b", "train": "none.csv"}]
    plan = write_plan(tmp_path, {"defaults": defaults, "jobs": jobs})
    status, out, err = run_cli(monkeypatch, "--jobs", str(plan), "--json")
    answer = json.loads(out.splitlines()[-1])
    assert (status, answer["failed"]) == (1, 1)
    assert [(job["name"], job["status"]) for job in answer["jobs"]] == [("acme/a", "trained"), ("acme/b", "failed")]
    assert "1 of 2 jobs failed: acme/b: " in err
    write_csv(tmp_path / "none.csv", ending_rule(24, seed=1))
    status, out, err = run_cli(monkeypatch, "--jobs", str(plan))
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["acme/a", "published"], ["acme/b", "trained"]]
    status, _, err = run_cli(monkeypatch, "--jobs", str(plan), "--config", str(plan))
    assert (status, "--jobs excludes --config" in err) == (2, True)
    status, _, err = run_cli(monkeypatch, "--jobs", str(plan), "--name", "acme/c")
    assert (status, "has the name of job 1" in err) == (2, True)
