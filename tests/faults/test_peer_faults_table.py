"""docs/peer_faults.md has a row for each test of a fault, and names the issues that the test names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = (REPOSITORY / "docs" / "peer_faults.md").read_text(encoding="utf-8")
ISSUE = re.compile(r"(vLLM|SGLang|LoRAX|TensorRT-LLM|TRL|PEFT) (#\d+)((?:, #\d+)*)")
# The faults that this project has set itself to be free of.
FIXED = """
vLLM #22782, SGLang #31305, vLLM #10062, LoRAX #670, vLLM #10898, vLLM #30931, vLLM #54839, vLLM #55193, vLLM #46287,
LoRAX #798, TensorRT-LLM #13391, SGLang #23141, SGLang #28371, vLLM #31941, vLLM #45325, vLLM #12174, vLLM #47724,
vLLM #34186, vLLM #48019, SGLang #24638, TRL #7017, PEFT #981, vLLM #14435, vLLM #43009, vLLM #55967, SGLang #36894,
SGLang #34205, vLLM #51940, LoRAX #429, TensorRT-LLM #11874, vLLM #19710, PEFT #2136
"""


def issues(text: str) -> set[str]:
    """The issues that a text names; `vLLM #1, #2` names two."""
    found = set()
    for peer, first, others in ISSUE.findall(text):
        found |= {f"{peer} {number}" for number in (first, *re.findall(r"#\d+", others))}
    return found


def faults_of_tests() -> dict[str, set[str]]:
    """The issues of each test."""
    module = ast.parse((REPOSITORY / "tests" / "faults" / "test_peer_faults.py").read_text(encoding="utf-8"))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {function.name: issues(ast.get_docstring(function) or "") for function in functions}


def test_table_and_tests_name_the_same_issues() -> None:
    rows = {}
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(test_\w+)`", cells[-1]) if line.startswith("| ") else ():
            assert name not in rows
            rows[name] = issues(cells[1])
    assert rows == faults_of_tests()
    assert all(rows.values())


def test_no_fault_is_left_out() -> None:
    assert issues(FIXED) == set().union(*faults_of_tests().values())


def test_named_benchmarks_exist() -> None:
    named = set(re.findall(r"`benchmarks\.(\w+)`", TABLE))
    assert named
    folder = REPOSITORY / "benchmarks"
    assert all((folder / f"{name}.py").is_file() or (folder / name).is_dir() for name in named)
