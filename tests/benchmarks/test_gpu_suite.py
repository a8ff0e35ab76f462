"""The GPU suite in small mode: what CI can see of it without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_kernel_time, gpu_setting, gpu_suite
from benchmarks.gpu_correctness import check_kernel
from benchmarks.gpu_decode import check_decode
from benchmarks.gpu_kernel_time import Point
from benchmarks.gpu_operands import Member
from benchmarks.gpu_report import save, table
from benchmarks.gpu_setting import Setting, find_operation
from sera_kernels import ABSENT, NO_ADAPTER, grouped_sera
from sera_serve.layers import served_linear

REPOSITORY = Path(__file__).resolve().parents[2]
SECTIONS = ["correctness", "decode correctness", "decode step", "capacity", "kernel time"]
FIGURES = {"us", "ms", "load_ms", "over_bound", "times_sera_64", "copy_bytes_per_s", "empty_launch_us"}


@pytest.fixture
def setting() -> Setting:
    now = time.monotonic()
    operation = ("grouped_sera", grouped_sera)
    return Setting(torch.device("cpu"), True, operation, now + 100, 1, None, now)


def run_suite(without: list[str], *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what people see, and the JSON line of a run in which these packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
        "from benchmarks.gpu_suite import main\n"
        f"raise SystemExit(main({list(arguments)!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )
    people, _, last = done.stdout.rstrip().rpartition("\n")
    return done.returncode, people, json.loads(last)


def section_status(result: dict[str, Any]) -> dict[str, str]:
    return {section["section"]: section["status"] for section in result["sections"]}


def figures(value: Any) -> set[str]:
    """Names of all speeds anywhere in a result."""
    if isinstance(value, dict):
        return (FIGURES & value.keys()).union(*map(figures, value.values()))
    return set().union(*map(figures, value)) if isinstance(value, list) else set()


def test_small_mode_runs_everything_without_a_gpu_or_the_command_line_s_packages(tmp_path: Path) -> None:
    status, people, result = run_suite(["typer", "rich", "peft"], "--small", "--output", str(tmp_path))
    assert (status, result["benchmark"], result["correct"]) == (0, "gpu_suite", True)
    assert section_status(result) == dict.fromkeys(SECTIONS, "done")
    assert figures(result) == FIGURES
    assert result["figures"].startswith("not a GPU") and result["figures"] in people
    systems = {row["system"] for row in result["rows"] if row["section"] == "kernel time"}
    assert {"sera r=64 split=64", "lora r=64 bmm", "lora r=16 loop", "vllm"} <= systems
    assert next(row["case"] for row in result["rows"] if row["section"] == "decode step") == "base_only"
    (kept,) = tmp_path.glob("gpu_suite-cpu-*.json")
    assert json.loads(kept.read_text()) == result


def test_the_kernel_s_part_needs_neither_transformers_nor_the_server() -> None:
    status, people, result = run_suite(["transformers", "sera_serve", "adapters_store", "numba"], "--small")
    assert (status, result["correct"]) == (0, True)
    needs_more = ["decode correctness", "decode step", "capacity"]
    assert section_status(result) == {name: "skipped" if name in needs_more else "done" for name in SECTIONS}
    for section in result["sections"]:
        if section["section"] in needs_more:
            assert "import of" in section["reason"] and section["reason"] in people


def one_element_off(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    grouped_sera(x, outputs, *rest)
    outputs[-1][-1, -1] += 0.1 * outputs[-1].abs().max()


def one_element_slightly_off(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    last = outputs[-1][-1]
    before = last.clone()
    grouped_sera(x, outputs, *rest)
    # As much as tf32 would be, and little beside the norm of all elements.
    last[-1] += 4e-4 * (not torch.equal(last, before))


def bare_row_touched(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
    grouped_sera(x, outputs, modules, batch, pool, tables)
    outputs[0][batch.token_slots == NO_ADAPTER] *= 1.000001


def absent_module_touched(
    x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any
) -> None:
    grouped_sera(x, outputs, modules, batch, pool, tables)
    slots = batch.token_slots.long().clamp(min=0)
    outputs[1][tables.offset[modules[1]][slots] == ABSENT] *= 1.000001


def row_too_many(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    grouped_sera(x, outputs, *rest)
    y = outputs[0]
    if y._base is not None:
        y._base[len(y)] = 0


def gap_read(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
    grouped_sera(x, outputs, modules, batch, pool, replace(tables, offset=tables.offset - (tables.offset > 0).long()))


BROKEN = [
    one_element_off,
    one_element_slightly_off,
    bare_row_touched,
    absent_module_touched,
    row_too_many,
    gap_read,
]


@pytest.mark.parametrize("operation", BROKEN, ids=lambda operation: operation.__name__)
def test_correctness_sees_a_broken_kernel(setting: Setting, operation: Callable[..., None]) -> None:
    rows = check_kernel(replace(setting, operation=("broken", operation)))
    assert not all(row["correct"] for row in rows)


def test_replays_see_a_kernel_that_goes_on_with_the_tables_it_first_read(setting: Setting) -> None:
    seen: dict[int, Any] = {}

    def operation(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
        copies = {name: getattr(tables, name).clone() for name in ("offset", "rank", "split", "mixer", "scaling")}
        # The tables are kept with their copy, so that no others get their identity.
        _, first = seen.setdefault(id(tables), (tables, replace(tables, **copies)))
        grouped_sera(x, outputs, modules, batch, pool, first)

    wrong = [
        row["case"] for row in check_kernel(replace(setting, operation=("broken", operation))) if not row["correct"]
    ]
    assert {"replay, adapter removed", "replay, shapes swapped", "replay, contents"} >= set(wrong) > set()


def test_a_broken_kernel_ends_in_status_1_and_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_setting, "find_operation", lambda device: ("broken", one_element_off))
    assert gpu_suite.main(["--small"]) == 1
    people, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    result = json.loads(last)
    assert result["correct"] is False
    assert figures(result) == set()
    assert "WRONG" in people and "no speed is reported" in people
    assert all(section_status(result)[name] == "skipped" for name in ("decode step", "capacity", "kernel time"))


def test_the_decode_check_sees_wrong_serving(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = served_linear.add_updates

    def next_adapter(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, *rest: Any) -> None:
        right(x, outputs, modules, replace(batch, token_slots=(batch.token_slots + 1) % 3), *rest)

    monkeypatch.setattr(served_linear, "add_updates", next_adapter)
    assert not any(row["correct"] for row in check_decode(setting))


def test_what_time_did_not_allow_is_reported(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--small", "--budget-s", "0"]) == 1
    result = json.loads(capsys.readouterr().out.rstrip().rpartition("\n")[2])
    assert section_status(result) == dict.fromkeys(SECTIONS, "not reached")
    rows = gpu_kernel_time.time_kernels(replace(setting, deadline=setting.started), 1e9, 1.0)
    assert [row["status"] for row in rows if "tokens" in row] == ["not reached", "not reached"]


def test_what_was_found_before_a_failure_is_kept(setting: Setting) -> None:
    def section() -> Iterator[dict[str, Any]]:
        yield {"case": "first"}
        raise RuntimeError("the second one")

    suite = gpu_suite.Suite(setting)
    suite.run("kernel time", section)
    assert suite.rows == [{"section": "kernel time", "case": "first"}]
    assert suite.status("kernel time") == "failed" and "the second one" in suite.sections[0]["reason"]


def test_a_point_without_memory_is_a_row_and_the_next_is_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_kernel_time.interleaved

    def interleaved(setting: Setting, cases: Any) -> dict[str, float]:
        monkeypatch.setattr(gpu_kernel_time, "interleaved", right)
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(gpu_kernel_time, "interleaved", interleaved)
    rows = [row for row in gpu_kernel_time.time_kernels(setting, 1e9, 1.0) if "tokens" in row]
    assert (rows[0]["status"], rows[0]["reason"]) == ("failed", "too much")
    assert all(row["us"] > 0 for row in rows[1:]) and len(rows) > 1


def test_without_a_gpu_full_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "--small" in json.loads(capsys.readouterr().out)["reason"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_suite, "find_spec", lambda name: None if name == "triton" else name)
    assert gpu_suite.main([]) == 2
    assert json.loads(capsys.readouterr().out)["reason"] == "missing packages: triton"


def test_under_the_interpreter_the_triton_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert find_operation(torch.device("cpu"))[1].__name__ == "grouped_sera_triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert find_operation(torch.device("cpu"))[1] is grouped_sera


def test_bytes_of_a_launch_by_hand() -> None:
    # 64 tokens: x 4096, y 4096 read and written; 64 adapters: A and B 4096 each, C 64 x 64; two bytes an element.
    assert Point(4096, (4096,), 64, 64).bytes(Member(64, 64)) == 2 * (64 * 3 * 4096 + 64 * 3 * 4096)
    # LoRA of rank 16 on two outputs: A for each.
    assert Point(8, (8, 4), 1, 2).bytes(Member(16, 1, False)) == 2 * (8 + 2 * 12 + 2 * 16 * (16 + 12))


def test_result_files_are_named_by_gpu_and_time(tmp_path: Path) -> None:
    head = dict.fromkeys(["torch", "triton", "transformers", "commit", "figures", "operation"], "x")
    sections = [{"section": "correctness", "status": "done", "reason": None, "seconds": 1.0}]
    date = "2026-11-24T10:40:44+00:00"
    result = {**head, "gpu": "NVIDIA H200", "date": date, "sections": sections, "rows": []}
    kept = save(result, tmp_path)
    assert kept.name == "gpu_suite-nvidia-h200-20261124T104044.json"
    assert kept.with_suffix(".txt").read_text() == table(result) + "\n"


def test_the_table_names_what_was_not_reached() -> None:
    rows = [{"section": "kernel time", "shape": "4096->4096", "tokens": 1, "adapters": 1, "status": "not reached"}]
    sections = [{"section": "kernel time", "status": "done", "reason": None, "seconds": 1.0}]
    head = dict.fromkeys(["gpu", "torch", "triton", "transformers", "commit", "date", "figures", "operation"], "x")
    assert "4096->4096 1 1: not reached" in table({**head, "sections": sections, "rows": rows})
