"""What packing gains on two cores: tokens a second of training steps, packed against padded, on real rows.

Each round takes the steps of one epoch's beginning in turns of all layouts, forward and backward with a SeRA adapter,
and each ratio is the median over the rounds. Tokens are those of rows; padding is none. Layouts:

- random, padded: rows in random order, padded to the longest of a step, as most trainers do;
- by length, padded: this trainer's own order, with similar lengths in a step;
- random, packed, and by length, packed: `--packing` in either order.

    python -m benchmarks.packing
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.last_line import tell
from sera_serve.base import FrozenBase, load_base
from sera_serve.layers import attach_adapter
from sera_serve.trainer.data.passages import load_generate_data
from sera_serve.trainer.order import LengthGroupedOrder
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import GenerateTask

_TOLERANCE = 1e-5
_LAYOUTS = ("random, padded", "by length, padded", "random, packed", "by length, packed")
SOURCES: dict[str, dict[str, Any]] = {
    "e2e": {"train": "generate/e2e/train.jsonl", "format": "prompt-completion"},
    "alpaca": {"train": "generate/alpaca/train.jsonl", "format": "alpaca"},
}


def _tasks(base: FrozenBase, data: Path, source: str, rows: int, max_length: int) -> dict[str, GenerateTask]:
    fields = SOURCES[source] | {"train": data / SOURCES[source]["train"]}
    settings = TrainSettings(
        base="embedded", store=Path("store"), name="a/b", task="generate", eval_fraction=0, train_limit=rows, **fields
    )
    loaded = load_generate_data(settings)
    return {
        layout: GenerateTask(base, loaded, max_length=max_length, packing=layout == "packed")
        for layout in ("padded", "packed")
    }


def _steps(task: GenerateTask, batch_size: int, count: int, *, by_length: bool) -> list[list[int]]:
    order = list(range(len(task.train_rows)))
    if by_length:
        order = list(LengthGroupedOrder(task.lengths, batch_size, 0, lambda: 0))
    else:
        random.Random(0).shuffle(order)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]


def _run(task: GenerateTask, batches: Sequence[dict[str, Tensor]]) -> tuple[float, list[float]]:
    """Seconds of the steps, and the loss of each."""
    losses = []
    task.model.train()
    begun = time.perf_counter()
    for batch in batches:
        loss = task.model(**batch)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        task.model.zero_grad()
    return time.perf_counter() - begun, losses


def main(
    data: Annotated[Path, typer.Option(help="Folder of the real data.", exists=True, file_okay=False)] = Path(
        "../shared/data"
    ),
    rows: Annotated[int, typer.Option(help="Rows of each data set.")] = 1600,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 6,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens.")] = 512,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Print a table, and one JSON object as the last line."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = load_base("embedded")
    shape = TrainSettings(
        base="embedded", store=Path("s"), name="a/b", task="generate", train=Path("x")
    ).adapter_config()
    assert shape is not None
    attach_adapter(base.model, shape)
    found: list[dict[str, Any]] = []
    correct = True
    for source in SOURCES:
        tasks = _tasks(base, data, source, rows, max_length)
        batches: dict[str, list[dict[str, Tensor]]] = {}
        tokens: dict[str, int] = {}
        shown: dict[str, int] = {}
        for layout in _LAYOUTS:
            order, _, kind = layout.partition(", ")
            chosen = _steps(tasks[kind], batch_size, steps, by_length=order == "by length")
            batches[layout] = [tasks[kind].collate([tasks[kind].train_rows[i] for i in step]) for step in chosen]
            tokens[layout] = sum(tasks[kind].lengths[i] for step in chosen for i in step)
            shown[layout] = sum(batch["input_ids"].numel() for batch in batches[layout])
        rates: dict[str, list[float]] = {layout: [] for layout in _LAYOUTS}
        losses: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for layout in random.Random(number).sample(_LAYOUTS, len(_LAYOUTS)):
                seconds, losses[layout] = _run(tasks[layout.partition(", ")[2]], batches[layout])
                # The first round warms caches.
                if number:
                    rates[layout].append(tokens[layout] / seconds)
        for order in ("random", "by length"):
            pairs = zip(losses[f"{order}, padded"], losses[f"{order}, packed"], strict=True)
            correct &= all(abs(padded - packed) <= _TOLERANCE * max(1.0, padded) for padded, packed in pairs)
        for layout in _LAYOUTS:
            ratios = [ours / theirs for ours, theirs in zip(rates[layout], rates[_LAYOUTS[0]], strict=True)]
            found.append(
                {
                    "data": source,
                    "layout": layout,
                    "tokens_a_second": round(median(rates[layout])),
                    "against_random_padded": round(median(ratios), 3),
                    "padding": round(1 - tokens[layout] / shown[layout], 3),
                }
            )
    if correct:
        _show(found)
    tell("packing", found, correct=correct)


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("data", "layout", "tokens a second", "against random, padded", "padding")
    for row in rows:
        table.add_row(
            row["data"],
            row["layout"],
            str(row["tokens_a_second"]),
            f"{row['against_random_padded']:.2f}",
            f"{row['padding']:.0%}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    typer.run(main)
