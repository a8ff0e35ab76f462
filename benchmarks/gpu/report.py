"""The results as a table for people, and as one object."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.record import Row

if TYPE_CHECKING:
    from benchmarks.gpu.supervisor import Supervisor

_WIDTH = 180
_MOST_WRONG_ROWS = 20
_NO_GPU = "not a GPU at full size: no figure means anything"


def describe_machine() -> Row:
    """When and with what it runs; a version is None where the package is missing. `machine` has the GPU."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy", "numba")},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout, with a + where files differ from it; None outside one."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def summary(supervisor: Supervisor, correct: bool) -> Row:
    """Everything that was found."""
    options = supervisor.options
    found = [row for row in supervisor.record.rows() if "status" not in row]
    return {
        "benchmark": "gpu",
        "command": options.command,
        "correct": correct,
        "figures": "of a GPU" if options.has_gpu and not options.small else _NO_GPU,
        "sections": supervisor.sections,
        "rows": found,
    }


def write(result: Row, path: Path) -> None:
    """Print the table, and keep it."""
    with path.open("w") as file:
        for console in (Console(width=_WIDTH, color_system=None, file=file), Console(width=_WIDTH, color_system=None)):
            _print(result, console)


def _print(result: Row, console: Console) -> None:
    console.print(
        f"{result['command']}: {_verdict(result)}; figures: {result['figures']}",
        highlight=False,
    )
    head = ("section", "status", "seconds", "at", "reason")
    console.print(grid("sections", head, ([row[name] for name in head] for row in result["sections"])))
    names = dict.fromkeys(row["section"] for row in result["rows"])
    checks = [name for name in names if any("correct" in row for row in _rows(result, name))]
    if checks:
        console.print(_checks(result, checks))
    for name in names:
        rows = _rows(result, name)
        for row in [row for row in rows if row.get("correct") is False][:_MOST_WRONG_ROWS]:
            console.print(f"WRONG: {json.dumps(row)}", highlight=False)
        if name not in checks:
            console.print(*_TABLES.get(name, _as_they_are)(name, rows))


def _verdict(result: Row) -> str:
    if result["correct"]:
        return "all checks are right"
    return "NOT CORRECT" if any("correct" in row for row in result["rows"]) else "nothing was checked"


def _rows(result: Row, section: str) -> list[Row]:
    return [row for row in result["rows"] if row["section"] == section]


def _checks(result: Row, names: list[str]) -> Table:
    head = ("check", "cases", "right", "largest error")
    lines = []
    for name in names:
        rows = [row for row in _rows(result, name) if "correct" in row]
        errors = [row["error"] for row in rows if "error" in row]
        right = sum(row["correct"] for row in rows)
        lines.append([name, len(rows), right, max(errors, key=float, default=None)])
    return grid("checks", head, lines)


def _as_they_are(name: str, rows: list[Row]) -> Iterable[Table]:
    """A table for each run of rows with the same columns; columns without a figure in any row are left out."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(key for key in row if key != "section"), []).append(row)
    return [grid(name, columns, ([row[key] for key in columns] for row in group)) for columns, group in found.items()]


def _kernel_time(name: str, rows: list[Row]) -> Iterable[Table]:
    """One line a point: the bound of the first system, then every system in microseconds."""
    timed = [row for row in rows if "us" in row]
    systems = list(dict.fromkeys(row["system"] for row in timed))
    points: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in timed:
        points.setdefault((row["shape"], row["tokens"], row["adapters"]), {})[row["system"]] = row
    lines = []
    for point, found in points.items():
        first = found[systems[0]]
        figures = [found[system]["us"] if system in found else None for system in systems]
        lines.append([*point, first["bound_us"], first["over_bound"], *figures])
    tables = _as_they_are(name, [row for row in rows if "us" not in row])
    title = f"{name}: microseconds of a launch; the bound and its ratio are of {systems[0]}" if systems else name
    return [grid(title, ("shape", "tokens", "adapters", "bound", "x bound", *systems), lines), *tables]


_TABLES: dict[str, Callable[[str, list[Row]], Iterable[Table]]] = {"kernel time": _kernel_time}


def grid(title: str, head: Iterable[str], lines: Iterable[Iterable[Any]]) -> Table:
    """A table of plain text."""
    table = Table(*head, title=title, title_justify="left", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*map(_cell, line))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)
