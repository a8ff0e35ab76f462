"""Adapt the small ViT to road cracks, and the small CLIP to photographs with captions, with every served method.

    python examples/pretrain_small_images.py vit --out /tmp/small-vit
    python examples/pretrain_small_images.py clip --out /tmp/small-clip
    python examples/images_experiment.py --vit /tmp/small-vit --clip /tmp/small-clip --work /tmp/images

Each method has its default learning rate (`--rate` multiplies it), query and value are adapted, and the head
(image-classify) has the adapter's rate. The best epoch is chosen on held-out rows; the test rows are scored once.
Finished runs are kept in WORK/runs.jsonl, so the same command continues after a stop. The photographs that the small
CLIP was pre-trained on are left out. The bases are small: the numbers tell the order of the methods here, and nothing
of other bases.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pretrain_small_images import CLIP_PHOTOGRAPHS, photographs
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from sera_serve.base import load_base
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings

SHAPES: dict[str, dict[str, Any]] = {
    "SeRA r=8": {"method": "sera", "rank": 8},
    "SeRA r=16": {"method": "sera", "rank": 16},
    "LoRA r=8": {"method": "lora", "rank": 8},
    "MELoRA r=8 n=8": {"method": "melora", "rank": 8},
    "MoSLoRA r=8": {"method": "moslora", "rank": 8},
    "LoRA-FA r=8": {"method": "lora-fa", "rank": 8},
    "head only": {"method": "head-only"},
    # At this rate nothing changes: what the base retrieves by itself.
    "base alone": {"method": "sera", "rank": 8, "learning_rate": 1e-12},
}
# What a task has no use for: retrieve has no head, and image-classify has the head alone as its base.
LEFT_OUT = {"retrieve": "head only", "image-classify": "base alone"}
# Photographs for the test and for choosing the epoch; the rest, after those of pre-training, are learned.
TEST, HELD_OUT = 100, 50


def caption_files(data: Path, work: Path) -> dict[str, Path]:
    """Write captions.csv in three parts: train, eval and test, each with photographs of its own."""
    found = photographs(data)[CLIP_PHOTOGRAPHS:]
    parts = {"test": found[:TEST], "eval": found[TEST : TEST + HELD_OUT], "train": found[TEST + HELD_OUT :]}
    paths = {}
    for use, photos in parts.items():
        paths[use] = work / f"captions-{use}.csv"
        with paths[use].open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "caption"])
            rows.writerows([name, caption] for name, captions in photos for caption in captions)
    return paths


def main(
    work: Annotated[Path, typer.Option(help="Folder for runs.jsonl and the store.")],
    vit: Annotated[
        Path | None,
        typer.Option(help="Folder of the small ViT; without it no image-classify.", exists=True, file_okay=False),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="Folder of the small CLIP; without it no retrieve.", exists=True, file_okay=False),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder with the images.", exists=True, file_okay=False)] = Path(
        "../shared/data/images"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds of each method.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 3,
    train_limit: Annotated[int, typer.Option(help="Training rows of a run, at most.")] = 800,
    rate: Annotated[float, typer.Option(help="Learning rate, in times each method's default.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Run what is not in WORK/runs.jsonl yet, and print a table."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    console = Console(stderr=True)
    work.mkdir(parents=True, exist_ok=True)
    captions = caption_files(data, work)
    tasks: dict[str, tuple[Path | None, dict[str, Any]]] = {
        "image-classify": (vit, {"train": data / "road_crack" / "patches.zip"}),
        "retrieve": (clip, captions | {"images": data / "flickr8k_1k" / "images.zip", "batch_size": 32}),
    }
    log = work / "runs.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    finished = {run["key"] for run in done}
    for task, (folder, options) in tasks.items():
        if folder is None:
            continue
        base = load_base(str(folder))
        jobs = [
            (seed, name, shape) for seed in range(seeds) for name, shape in SHAPES.items() if name != LEFT_OUT[task]
        ]
        for seed, name, shape in track(jobs, task, console=console):
            common = {"base": str(folder), "store": work / "store", "name": f"images/{task}", "task": task}
            common |= {"epochs": epochs, "train_limit": train_limit, "seed": seed}
            if name != "head only":
                common["target_modules"] = ("q_proj", "v_proj")
            settings = TrainSettings(**common, **options, **shape)
            if rate != 1 and settings.learning_rate is None:
                settings = settings.model_copy(update={"learning_rate": rate * settings.peak_learning_rate})
            key = json.dumps([name, settings.identity()], sort_keys=True)
            if key in finished:
                continue
            result = train_adapter(settings, base=base)
            run = {
                "key": key,
                "task": task,
                "method": name,
                "seed": seed,
                "learning_rate": settings.peak_learning_rate,
                "parameters": result.parameters,
                "metrics": result.metrics,
                "seconds": result.train_seconds,
            }
            done.append(run)
            with log.open("a") as file:
                file.write(json.dumps(run) + "\n")
    for task in tasks:
        if runs := [run for run in done if run["task"] == task]:
            show(runs, task)


def show(runs: list[dict[str, Any]], task: str) -> None:
    """Print the means over the seeds of the test metrics."""
    names = [name for name in runs[0]["metrics"] if name.startswith("test_") and name != "test_loss"]
    table = Table("method", "parameters", "rate", *(name.removeprefix("test_") for name in names), title=task)
    for method, rate in dict.fromkeys((run["method"], run["learning_rate"]) for run in runs):
        own = [run for run in runs if (run["method"], run["learning_rate"]) == (method, rate)]
        means = [sum(run["metrics"][name] for run in own) / len(own) for name in names]
        table.add_row(method, f"{own[0]['parameters']:,}", f"{rate:g}", *(f"{mean:.4f}" for mean in means))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
