"""How near the estimates of `train_adapter --dry-run` are to the runs that follow: peak memory, and time.

    python -m benchmarks.dry_run --data ../shared/data

For each shape, the command runs with `--dry-run` and then without, each in a process of its own. The memory is the
largest resident set of the second process; the time is its training time, evaluations included. About 3 minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.last_line import tell

_COMMAND = "from sera_serve.trainer.cli import main; main()"
SHAPES: dict[str, list[str]] = {
    "classify, 32 x 128": [
        *("--task", "classify", "--train", "glue/rte/train.csv", "--text-column", "sentence1"),
        *("--text-pair-column", "sentence2", "--batch-size", "32", "--max-length", "128", "--train-limit", "320"),
    ],
    "classify, 128 x 128": [
        *("--task", "classify", "--train", "glue/rte/train.csv", "--text-column", "sentence1", "--rank", "64"),
        *("--text-pair-column", "sentence2", "--batch-size", "128", "--max-length", "128", "--train-limit", "640"),
    ],
    "generate, 16 x 256": [
        *("--task", "generate", "--train", "generate/e2e/train.jsonl", "--batch-size", "16", "--max-length", "256"),
        *("--train-limit", "320", "--method", "lora"),
    ],
}


def main(
    data: Annotated[
        Path, typer.Option(help="Folder of the data sets (see its README).", exists=True, file_okay=False)
    ] = Path("../shared/data"),
    base: Annotated[str, typer.Option(help="Base of all shapes; an encoder has no shape of generate.")] = "embedded",
    only: Annotated[str, typer.Option(help="Shapes with this text in their name.")] = "",
) -> None:
    """Compare estimates and runs."""
    rows = [_compare(name, options, data, base) for name, options in SHAPES.items() if only in name]
    table = Table("shape", "peak, estimated", "measured", "error", "time, estimated", "measured", "error")
    for row in rows:
        table.add_row(
            row["shape"],
            f"{row['estimated_mib']} MiB",
            f"{row['measured_mib']} MiB",
            f"{row['memory_error']:+.0%}",
            f"{row['estimated_s']} s",
            f"{row['measured_s']} s",
            f"{row['time_error']:+.0%}",
        )
    Console(stderr=True).print(table)
    tell("dry_run", rows, correct=all(row["counted"] for row in rows), is_check=True)


def _compare(name: str, options: list[str], data: Path, base: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _COMMAND, "--base", base, "--store", f"{folder}/store"]
        command += ["--name", "acme/shape", "--epochs", "1", "--json", *options]
        place = command.index("--train") + 1
        command[place] = str(data / command[place])
        planned, _ = _run([*command, "--dry-run"])
        trained, peak = _run(command)
    estimate, seconds = planned["memory"]["peak"], planned["time"]["total"]
    return {
        "shape": name,
        "counted": planned["trained"] == trained["parameters"] + trained["head_parameters"],
        "estimated_mib": round(estimate / 2**20),
        "measured_mib": round(peak / 2**20),
        "memory_error": round(estimate / peak - 1, 3),
        "estimated_s": round(seconds, 1),
        "measured_s": round(trained["train_seconds"], 1),
        "time_error": round(seconds / trained["train_seconds"] - 1, 3),
        "activations_mib": round(planned["memory"]["activations"] / 2**20),
    }


def _run(command: list[str]) -> tuple[dict[str, Any], int]:
    """The JSON line of a command, and the largest resident set of its process in bytes."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        return json.loads(out.read().splitlines()[-1]), usage.ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
