"""Ranks by importance beside one rank for all layers, at about as many parameters, on real rows.

    python -m benchmarks.rank_allocation --data ../shared/data [--rows 1000] [--seeds 0,1,2] [--epochs 5]

Base: all-MiniLM-L6-v2. Both train SeRA with split 4 on query and value: `uniform` has rank 8 everywhere, `allocated`
starts at rank 16 and ends at a mean rank of 8 (--budget 8). Rows, order, rates and epochs are the same, the last epoch
is kept, and the score is that of rows that no choice saw. The last line is one JSON object; it is `correct` where
every allocated adapter met its budget.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterStore
from benchmarks.last_line import tell
from benchmarks.minilm import minilm
from sera_serve.base import load_base
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import load_options

# Data set: training rows, test rows, metric.
SETS = {
    "hwu64": ("tenants/hwu64/train.csv", "tenants/hwu64/test.csv", "test_accuracy"),
    "cola": ("glue/cola/train.csv", "glue/cola/dev.csv", "test_matthews"),
}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"rank": 8, "split": 4},
    "allocated": {"rank": 16, "split": 4, "budget": 8},
}


def main(
    data: Annotated[Path, typer.Option(help="Folder with the data sets.", exists=True, file_okay=False)],
    rows: Annotated[int, typer.Option(help="Training rows.")] = 1000,
    seeds: Annotated[str, typer.Option(help="Seeds, by commas.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 5,
    sets: Annotated[str, typer.Option(help="Of hwu64, cola.")] = "hwu64,cola",
) -> None:
    """Train both for each data set and seed."""
    encoder = minilm()
    base = load_base(encoder)
    console = Console(stderr=True)
    results: list[dict[str, Any]] = []
    correct = True
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "store")
        for name in sets.split(","):
            train, test, metric = SETS[name]
            for seed in map(int, seeds.split(",")):
                for arm, shape in ARMS.items():
                    options = {
                        "base": encoder,
                        "store": Path(folder) / "store",
                        "name": f"bench/{name}-{arm}-{seed}",
                        "task": "classify",
                        "train": data / train,
                        "test": data / test,
                        "text_column": "text" if name == "hwu64" else "sentence",
                        "label_column": "label",
                        "eval_fraction": 0.0,
                        "train_limit": rows,
                        "max_length": 32,
                        "target_modules": "query,value",
                        "epochs": epochs,
                        "seed": seed,
                    }
                    result = train_adapter(load_options(None, options | shape), base=base)
                    ranks = [spec.rank for spec in store.config(result.digest).modules.values()]
                    layers = 12
                    correct &= arm == "uniform" or sum(ranks) == 8 * layers
                    row = {"data": name, "seed": seed, "arm": arm, "score": result.metrics[metric]}
                    row |= {"parameters": result.parameters, "ranks": sorted(ranks), "seconds": result.train_seconds}
                    results.append(row)
                    console.print(row)
    table = Table("data", "arm", "score, mean", "deviation", "parameters")
    for name in sets.split(","):
        for arm in ARMS:
            own = [row for row in results if row["data"] == name and row["arm"] == arm]
            scores = [row["score"] for row in own]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells = f"{statistics.mean(scores):.4f}", f"{spread:.4f}"
            table.add_row(name, arm, *cells, f"{statistics.mean(row['parameters'] for row in own):,.0f}")
    console.print(table)
    tell("rank_allocation", results, correct=correct, is_check=True)


if __name__ == "__main__":
    typer.run(main)
