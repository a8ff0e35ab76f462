"""The GPU suite's results: a table for people, and a file."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def describe_machine(device: Any) -> Row:
    """When and on what it ran; a version is None where the package is missing."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy")},
        "cuda": torch.version.cuda,
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


def rounded(value: Any) -> Any:
    """A result with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def save(result: Row, folder: Path) -> Path:
    """Write the result as JSON under a name that tells GPU and time, and the table beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", result["gpu"] or "cpu").strip("-").lower()
    stamp = re.sub(r"[^0-9T]", "", result["date"].removesuffix("+00:00"))
    path = folder / f"gpu_suite-{gpu}-{stamp}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".txt").write_text(table(result) + "\n")
    return path


def table(result: Row) -> str:
    """Everything that was found, as plain text."""
    parts = [
        f"gpu_suite: {result['gpu'] or 'no GPU'}, torch {result['torch']}, triton {result['triton']}, "
        f"transformers {result['transformers']}, commit {result['commit']}, {result['date']}",
        f"figures: {result['figures']}; computed by {result['operation']}",
    ]
    if "copy_bytes_per_s" in result:
        parts.append(
            f"copy: {result['copy_bytes_per_s'] / 1e12:.2f} TB/s read and written; "
            f"an empty launch: {result['empty_launch_us']:.2f} us"
        )
    parts.append(_grid([("section", "status", "seconds", "reason"), *map(_section, result["sections"])]))
    for name, describe in _TABLES.items():
        rows = [row for row in result["rows"] if row["section"] == name]
        if rows:
            parts.append(f"{name}\n{describe(rows)}")
    return "\n\n".join(parts)


def _section(section: Row) -> tuple[str, ...]:
    return section["section"], section["status"], str(section["seconds"]), section["reason"] or ""


def _correctness(rows: list[Row]) -> str:
    wrong = [row for row in rows if not row["correct"]]
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), row["error"])
    errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    lines = [f"{len(rows) - len(wrong)} of {len(rows)} cases right; largest error of an update by dtype: {errors}"]
    return "\n".join(lines + [f"WRONG: {json.dumps(row)}" for row in wrong[:20]])


def _kernel_time(rows: list[Row]) -> str:
    """One line a point: the bound of SeRA r=64, then every system in microseconds."""
    timed = [row for row in rows if "us" in row]
    notes = [
        f"{_place(row)}: {row['status']}" + (f", {row['reason']}" if "reason" in row else "")
        for row in rows
        if "status" in row
    ]
    if not timed:
        return "\n".join(notes)
    systems = list(dict.fromkeys(row["system"] for row in timed))
    points: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in timed:
        points.setdefault((row["shape"], row["tokens"], row["adapters"]), {})[row["system"]] = row
    lines = [("shape", "tokens", "adapters", "bound us", "x bound", *systems)]
    for point, found in points.items():
        first = found[systems[0]]
        figures = [_us(found.get(name), name == systems[0]) for name in systems]
        lines.append((*map(str, point), f"{first['bound_us']:.1f}", f"{first['over_bound']:.2f}", *figures))
    return "\n".join([_KERNEL_NOTE, _grid(lines), *notes])


_KERNEL_NOTE = (
    "microseconds of a launch, and in brackets how many times the first system's; bound (bytes at the copy's speed, "
    "and an empty launch) and x bound are of the first system"
)


def _us(row: Row | None, first: bool) -> str:
    if row is None:
        return "-"
    return f"{row['us']:.1f}" + ("" if first else f" ({row['times_sera_64']:.2f})")


def _place(row: Row) -> str:
    return row.get("system") or f"{row['shape']} {row['tokens']} {row['adapters']}"


def _decode(rows: list[Row]) -> str:
    head = ("case", "tokens", "layers", "ms", "ratio to base model", "ratio at weights' bound")
    lines = [
        (
            row["case"],
            str(row["tokens"]),
            str(row["layers"]),
            f"{row['ms']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_at_weights_bound']:.3f}",
        )
        for row in rows
    ]
    return _grid([head, *lines])


def _capacity(rows: list[Row]) -> str:
    head = ("adapter", "MB", "adapters per GiB", "load ms", "GB/s")
    lines = [
        (
            row["system"],
            f"{row['adapter_bytes'] / 1e6:.2f}",
            str(row["adapters_per_gib"]),
            f"{row.get('load_ms', 0):.3f}",
            f"{row.get('load_gb_per_s', 0):.2f}",
        )
        for row in rows
    ]
    return _grid([head, *lines])


_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "correctness": _correctness,
    "decode correctness": _correctness,
    "kernel time": _kernel_time,
    "decode step": _decode,
    "capacity": _capacity,
}


def _grid(lines: Iterable[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell."""
    cells = list(lines)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
