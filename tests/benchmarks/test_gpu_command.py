"""The GPU benchmark's command in small mode, and its processes: what CI can see of it without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import wheels
from benchmarks.gpu.plan import COMMANDS, FIRST
from benchmarks.gpu.record import Record, readable
from benchmarks.gpu.report import grid

REPOSITORY = Path(__file__).resolve().parents[2]
# What a machine without a GPU, or without NVIDIA's tools, cannot do.
SKIPPED = {"tuning", "memory check"}
FILES, FILE_BYTES = 8, 16 << 20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
    )


# Both commands in one process, which imports torch and transformers once.
BOTH = """
import sys
from benchmarks.gpu.__main__ import main
for name in ("first", "second"):
    status = main([name, "--small", "--output", sys.argv[1]])
    print(f"status {status}")
"""


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str, dict[str, Any]]]]:
    """The folder, and of each command the exit status, what people see, and the object on the last line."""
    folder = tmp_path_factory.mktemp("small")
    done = run("-c", BOTH, str(folder))
    parts = re.split(r"status (\d)\n", done.stdout)
    runs = {}
    for name, said, status in zip(COMMANDS, parts[0::2], parts[1::2], strict=False):
        people, _, last = said.rstrip().rpartition("\n")
        runs[name] = int(status), people, json.loads(last)
    assert set(runs) == set(COMMANDS), done.stderr
    return folder, runs


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_small_mode_runs_every_section_without_a_gpu(
    name: str, small_runs: tuple[Path, dict[str, tuple[int, str, dict[str, Any]]]]
) -> None:
    folder, runs = small_runs
    status, people, result = runs[name]
    ended = {section["section"]: (section["status"], section["reason"]) for section in result["sections"]}
    assert set(ended) == {section.name for section in COMMANDS[name][0]}
    assert {section: status for section, (status, _) in ended.items() if status != "done"} == {
        section: "skipped" for section in SKIPPED if section in ended
    }, ended
    assert (status, result["benchmark"], result["correct"]) == (0, "gpu", True)
    assert "no figure means anything" in people and "no figure means anything" in result["figures"]
    checked = [row for row in result["rows"] if "correct" in row]
    assert all(row["correct"] for row in checked)
    # Everything that was found is in the file, too.
    kept = Record(folder / f"{name}.jsonl").rows()
    assert [row for row in kept if "status" not in row] == result["rows"]
    files = list(folder.iterdir())
    assert len(files) <= FILES and all(file.stat().st_size < FILE_BYTES for file in files)


# Sections of a module that is not there: a machine that ends in many ways.
SECTIONS = """
import json, os, signal, sys, time, types
from benchmarks.gpu.plan import Section
from benchmarks.gpu.setting import Options, SectionSkipped
from benchmarks.gpu.supervisor import Supervisor

def right(setting):
    yield {"correct": True}

def wrong(setting):
    yield {"correct": True}
    yield {"correct": False}

def crashes(setting):
    yield {"correct": True}
    os.kill(os.getpid(), signal.SIGSEGV)

def raises(setting):
    yield {"correct": True}
    raise RuntimeError("the second case")

def hangs(setting):
    yield {"correct": True, "child": os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "100")}
    time.sleep(100)

def imports(setting):
    import no_such_package

def skips(setting):
    raise SectionSkipped("no such program")
    yield {}

def checks_nothing(setting):
    return []

def times(setting):
    yield {"us": 1.0}

def times_what_is_wrong(setting):
    yield {"correct": False}

module = types.ModuleType("benchmarks.gpu.fake")
module.__dict__.update(globals())
sys.modules["benchmarks.gpu.fake"] = module

def check(name, limit=60.0):
    return Section(name, "fake", name, limit, is_check=True)

def timing(name, *needs, function="times"):
    return Section(name, "fake", function, 60.0, needs=needs)

sections = [
    *(check(name) for name in ("right", "wrong", "crashes", "raises", "imports", "skips", "checks_nothing")),
    check("hangs", limit=1.0),
    timing("on right", "right"),
    timing("wrong figure", "right", function="times_what_is_wrong"),
    timing("on skipped", "skips", "right"),
    *(timing(f"on {name}", "right", name) for name in ("wrong", "crashes", "raises", "hangs", "checks_nothing")),
]
budget = float(sys.argv[2])
options = Options("first", sys.argv[1], sys.argv[1] + ".log", True, 1, None, time.monotonic(), budget, False)
supervisor = Supervisor(options)
supervisor.run(sections)
print(json.dumps({"sections": supervisor.sections, "rows": supervisor.record.rows(),
                  "correct": supervisor.correct(sections), "all_right": supervisor.correct(sections[:1]),
                  "wrong_figure": supervisor.correct(
                      [each for each in sections if each.name in ("right", "wrong figure")])}))
"""


def supervised(tmp_path: Path, budget_s: float) -> dict[str, Any]:
    done = run("-c", SECTIONS, str(tmp_path / "rows.jsonl"), str(budget_s))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_section_that_ends_badly_takes_nothing_with_it_and_forbids_what_rests_on_it(tmp_path: Path) -> None:
    result = supervised(tmp_path, 60)
    ended = {section["section"]: section["status"] for section in result["sections"]}
    assert ended == {
        "right": "done",
        "wrong": "done",
        "crashes": "failed",
        "raises": "failed",
        "imports": "failed",
        "skips": "skipped",
        "checks_nothing": "done",
        "hangs": "killed",
        "on right": "done",
        "wrong figure": "done",
        "on skipped": "done",
        **{f"on {name}": "blocked" for name in ("wrong", "crashes", "raises", "hangs", "checks_nothing")},
    }
    reasons = {section["section"]: section["reason"] for section in result["sections"]}
    assert "the second case" in reasons["raises"] and "-11" in reasons["crashes"] and "its limit" in reasons["hangs"]
    assert "1 of 2 cases of 'wrong' are wrong: no speed is reported" in reasons["on wrong"]
    assert (result["correct"], result["all_right"], result["wrong_figure"]) == (False, True, False)
    # What was found before the end is kept, and what was not to be timed has no figure.
    found = {row["section"] for row in result["rows"] if row.get("correct")}
    assert found == {"right", "wrong", "crashes", "raises", "hangs"}
    assert {row["section"] for row in result["rows"] if "us" in row} == {"on right", "on skipped"}


def test_a_killed_section_s_own_processes_are_killed_too(tmp_path: Path) -> None:
    result = supervised(tmp_path, 60)
    (child,) = (row["child"] for row in result["rows"] if "child" in row)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_time_did_not_allow_is_listed(tmp_path: Path) -> None:
    result = supervised(tmp_path, 0)
    ended = {section["section"]: section["status"] for section in result["sections"]}
    assert {ended[name] for name in ("right", "wrong", "hangs")} == {"not reached"}
    assert ended["on right"] == "blocked" and result["correct"] is False
    assert {row["section"] for row in result["rows"] if row.get("status")} == set(ended)


def test_without_a_gpu_full_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "sees_gpu", lambda: False)
    assert command.main(["first", "--output", str(tmp_path)]) == 2
    assert "--small" in json.loads(capsys.readouterr().out)["reason"]


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "triton" else name)
    assert command.main(["first", "--output", str(tmp_path)]) == 2
    assert json.loads(capsys.readouterr().out)["reason"] == "missing packages: triton"


def test_sections_by_name_bring_the_checks_that_they_rest_on() -> None:
    names = [section.name for section in command.chosen("first", "sampling time")]
    assert names == ["sampling check", "machine", "sampling time"]
    assert command.chosen("first", None) == FIRST
    with pytest.raises(ValueError, match="no section 'speed'"):
        command.chosen("first", "speed")


def test_every_section_rests_on_checks_of_its_own_command() -> None:
    for sections, _ in COMMANDS.values():
        checks = {section.name for section in sections if section.is_check}
        assert all(set(section.needs) <= checks for section in sections)
        assert len({section.name for section in sections}) == len(sections)


def test_rows_are_json_also_where_figures_are_not_finite(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows")
    record.add("kernel", {"error": float("nan"), "us": 1.23456789, "launch": (1, 2)})
    assert record.rows() == [{"section": "kernel", "error": "nan", "us": 1.23457, "launch": [1, 2]}]
    assert readable({"a": [float("inf")]}) == {"a": ["inf"]}


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows")
    record.add("kernel", {"us": 1.0})
    with record.path.open("a") as file:
        file.write('{"section": "ker')
    assert [row["us"] for row in record.rows()] == [1.0]


def test_cells_are_short() -> None:
    table = grid("t", ("a",), [[1.23456], [123456.7], [None], [True]])
    assert list(table.columns[0].cells) == ["1.235", "123457", "", "True"]


def test_wheels_are_fetched_in_our_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def downloaded(line: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        asked.extend(line)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", downloaded)
    with pytest.raises(SystemExit, match="0"):
        wheels.main([str(tmp_path), "--python", "3.13"])
    assert "--abi=cp313" in asked and f"--dest={tmp_path}" in asked
    constraints = wheels.CONSTRAINTS.read_text().splitlines()
    fetched = [argument.partition("==")[0] for argument in asked if argument in constraints]
    assert fetched == list(wheels.PACKAGES)
    # What the command asks for is there already, or fetched.
    assert {name.replace("_", "-") for name in command.NEEDED} <= {*fetched, "torch", "triton", "numpy"}
    with pytest.raises(SystemExit, match="0"):
        wheels.main([str(tmp_path), "--tests"])
    again = [argument.partition("==")[0] for argument in asked if argument in constraints][len(fetched) :]
    assert again == [*wheels.PACKAGES, *wheels.TEST_PACKAGES]
    with pytest.raises(ValueError, match=r"constraints.txt has no version of tritonn; add them"):
        wheels.pins(["tritonn"], wheels.CONSTRAINTS.read_text())
