"""The comparison of systems at its smallest: every case runs, and no speed is reported where an output is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import mixed_batch
from benchmarks.batch_driver import Run
from benchmarks.system_process import System, SystemProcess
from benchmarks.systems import Setting, generate_system


class LocalSystem:
    """A system in this process, smaller than asked; with `spoil`, one case of it answers wrongly."""

    spoil: str | None = None
    running: ClassVar[list[System]] = []

    def __init__(self, system: Callable[[Setting], System], setting: Setting) -> None:
        self._system = system(replace(setting, width=64, layers=1, rank=4, new_tokens=4))
        self.running.append(self._system)
        # Once, so that an engine's thread has set itself up, and does not draw from the next system's random weights.
        next(iter(self._system.cases.values()))()

    def run(self, case: str) -> Run:
        run = self._system.cases[case]()
        if case == self.spoil:
            run.outputs[7][-1] += 1
        return run

    def close(self) -> None:
        self._system.close()
        self.running.remove(self._system)


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mixed_batch, "SystemProcess", LocalSystem)
    monkeypatch.setattr(LocalSystem, "running", [])
    yield
    assert not LocalSystem.running


def run(*arguments: str) -> tuple[int, dict[str, object]]:
    app = typer.Typer()
    app.command()(mixed_batch.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


# PEFT still asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_every_case_is_reported() -> None:
    status, report = run("--quick")
    assert (status, report["benchmark"], report["correct"]) == (0, "mixed_batch", True)
    rows = report["rows"]
    assert isinstance(rows, list)
    assert [row["case"] for row in rows] == mixed_batch.CASES
    assert {(row["width"], row["rank"]) for row in rows} == {(256, 16)}
    assert all(row["tokens_per_s"] > 0 and row["ratio_to_base"] > 0 for row in rows)
    assert rows[0]["ratio_to_base"] == 1
    long_prompts = report["prompts_of_256"]
    assert isinstance(long_prompts, list)
    assert [row["case"] for row in long_prompts] == ["base", "hf_generate_16"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["base", "enabled_base_only", "sera_1", "sera_16", "sera_64"])
def test_a_wrong_output_is_reported_without_speeds(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalSystem, "spoil", case)
    status, report = run("--quick", "--no-peft")
    assert (status, report) == (1, {"benchmark": "mixed_batch", "correct": False, "rows": []})


@pytest.mark.slow
def test_a_system_runs_in_a_process_of_its_own() -> None:
    process = SystemProcess(generate_system, Setting(64, 4, 1, 8, 3))
    try:
        assert [len(output) for output in process.run("hf_generate_16").outputs] == [3] * 16
    finally:
        process.close()
