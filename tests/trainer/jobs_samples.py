"""Jobs that differ in all that a job may have of its own, and their results alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_samples import beginning_rule, ending_rule, settings_for, write_csv, write_jsonl

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.together.jobs import JobResult


def mixed_jobs(folder: Path, seconds: float = 1000) -> list[TrainSettings]:
    """Jobs that differ in all that a job may have of its own."""
    rows = write_csv(folder / "rows.csv", ending_rule(30))
    more = write_csv(folder / "more.csv", beginning_rule(20, seed=3))
    texts = write_jsonl(folder / "texts.jsonl", [{"prompt": f"p{i}" * (i % 5), "completion": "abc"} for i in range(24)])
    shared: dict[str, Any] = {"checkpoint_seconds": seconds, "log_steps": 1, "learning_rate": 3e-3}
    own: list[dict[str, Any]] = [
        {"name": "acme/sera", "train": rows, "dropout": 0.2},
        {"name": "acme/lora", "train": more, "method": "lora", "batch_size": 5, "epochs": 3, "seed": 4, "rank": 2},
        {"name": "acme/head", "train": rows, "method": "head-only", "epochs": 1},
        {"name": "acme/text", "train": texts, "task": "generate", "target_modules": "q_proj,down_proj", "seed": 1},
    ]
    return [settings_for(Path("tiny"), folder, **(shared | options)) for options in own]


def trained(results: list[JobResult]) -> list[dict[str, Any]]:
    assert [result.error for result in results] == [None] * len(results)
    return [result.result or {} for result in results]


def tensors_of(store: Path, reference: str) -> dict[str, torch.Tensor]:
    opened = AdapterStore(store)
    return opened.load(opened.resolve(reference).digest).tensors


def alone(jobs: list[TrainSettings], base: FrozenBase, folder: Path) -> list[TrainResult]:
    return [train_adapter(job.model_copy(update={"store": folder / "alone"}), base=base) for job in jobs]
