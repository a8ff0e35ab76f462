"""What a quantized base costs and keeps: bytes of weights, training time, and the metric that an adapter reaches.

    python -m benchmarks.quantized_base [--quick] [--data ../shared/data]

A SeRA adapter is trained on part of SST-2, on the embedded base and on all-MiniLM-L6-v2, with the same settings and
seeds on each kind of base. Correct: quantizing costs at most 5 points of accuracy on the development set.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from benchmarks.last_line import tell
from benchmarks.minilm import base_folders
from sera_serve.base import load_base
from sera_serve.layers import adaptable_linears
from sera_serve.layers.quantized_linear import QuantizedLinear
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings

LOSS = 0.05


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, each counted once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def linear_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights of the linear layers that are quantized."""
    return sum(
        layer.quantized.nbytes if isinstance(layer, QuantizedLinear) else layer.get_parameter("weight").nbytes
        for layer in adaptable_linears(model).values()
    )


def measured(base: str, kind: str, data: Path, rows: int, epochs: int, seeds: int, threads: int) -> dict[str, Any]:
    """Train on one kind of one base."""
    loaded = load_base(base, quantize=kind)  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    scores, seconds = [], []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainSettings(
                base=base,
                store=Path(folder) / "store",
                name="acme/sst2",
                task="classify",
                train=data / "glue/sst2/train.csv",
                eval=data / "glue/sst2/dev.csv",
                text_column="sentence",
                train_limit=rows,
                epochs=epochs,
                rank=8,
                seed=seed,
                quantize=kind,  # type: ignore[arg-type]
            )
            begun = time.perf_counter()
            scores.append(train_adapter(settings, base=loaded).metrics["accuracy"])
            seconds.append(time.perf_counter() - begun)
    return {
        "quantize": kind,
        "weights_mib": round(weight_bytes(loaded.model) / 2**20, 2),
        "linear_mib": round(linear_bytes(loaded.model) / 2**20, 2),
        "accuracy": round(statistics.mean(scores), 4),
        "train_s": round(statistics.median(seconds), 1),
    }


def main(
    quick: Annotated[bool, typer.Option(help="Few rows, one seed.")] = False,
    data: Annotated[Path, typer.Option(help="Folder of the data sets.", exists=True, file_okay=False)] = Path(
        "../shared/data"
    ),
    rows: Annotated[int, typer.Option(help="Training rows.")] = 2000,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    bases: Annotated[str, typer.Option(help="embedded, minilm, or both with a comma.")] = "embedded,minilm",
) -> None:
    """Compare the kinds of base, and print a table and one JSON object."""
    disable_progress_bar()
    if quick:
        rows, epochs, seeds = 200, 1, 1
    table, correct = [], True
    for name, base in base_folders(bases).items():
        found = []
        for kind in ("none", "nf4", "int8", "int4"):
            found.append({"base": name, **measured(base, kind, data, rows, epochs, seeds, threads)})
            typer.echo("  ".join(f"{key} {value}" for key, value in found[-1].items()))
            sys.stdout.flush()
        correct &= all(row["accuracy"] >= found[0]["accuracy"] - LOSS for row in found)
        table += found
    # Without the rows, nobody could tell which kind lost how much.
    tell("quantized_base", table, correct=correct, is_check=True)


if __name__ == "__main__":
    typer.run(main)
