"""The last line of every benchmark: a name, whether all was right, and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import training_jobs
from benchmarks.last_line import tell

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = [
    *(path for path in sorted(ROOT.glob("*.py")) if '__name__ == "__main__"' in path.read_text()),
    ROOT / "siege" / "__main__.py",
]
ROW = {"case": "one", "tokens_per_s": 9.0}


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_a_right_run_tells_its_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tell("some", [ROW], output=tmp_path / "some.json", threads=2)
    told = last_line(capsys)
    assert told == {"benchmark": "some", "correct": True, "rows": [ROW], "threads": 2}
    assert json.loads((tmp_path / "some.json").read_text()) == told


def test_a_wrong_run_tells_no_speed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as ended:
        tell("some", [ROW], correct=False, output=tmp_path / "some.json", ratio=1.5)
    told = last_line(capsys)
    assert ended.value.exit_code == 1
    assert (
        told == json.loads((tmp_path / "some.json").read_text()) == {"benchmark": "some", "correct": False, "rows": []}
    )


def test_a_wrong_check_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        tell("some", [{"wrong": 3}], correct=False, is_check=True, seconds=2)
    assert last_line(capsys) == {"benchmark": "some", "correct": False, "rows": [{"wrong": 3}], "seconds": 2}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_benchmark_ends_so(program: Path) -> None:
    name = program.parent.name if program.stem == "__main__" else program.stem
    assert f'tell("{name}", ' in program.read_text()


@pytest.mark.parametrize("together", [0.9, 0.5])
def test_times_of_other_adapters_are_not_told(
    together: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(base: str, mode: str, *sizes: int) -> dict[str, Any]:
        scores = [{"accuracy": together if mode == "together" else 0.9}]
        return {"seconds": 12.5, "gained_kib": 1024, "peak_kib": 2048, "metrics": scores}

    monkeypatch.setattr(training_jobs, "measured", measured)
    if together == 0.9:
        training_jobs.main(quick=True, bases="embedded")
        told = last_line(capsys)
        assert told["correct"] and told["rows"][0]["together_s"] == 12.5
        return
    with pytest.raises(typer.Exit):
        training_jobs.main(quick=True, bases="embedded")
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1]) == {"benchmark": "training_jobs", "correct": False, "rows": []}
    assert "12.5" not in output
