"""One training run of tenants_experiment.py, in a process that has the base loaded."""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenants_setup import BASE_ONLY, TENANTS, VARIANTS, Job, Tenant

# Head-only trains on stored states, so many epochs cost almost nothing. With fewer epochs its score is lower.
HEAD_ONLY_EPOCHS = 30

_worker: dict[str, Any] = {}


def start_worker(base: str) -> None:
    """Load the base once in each process. The parent process never imports torch."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.base import load_base

    torch.set_num_threads(1)
    disable_progress_bar()
    _worker["base"] = load_base(base)


def base_digest() -> str:
    """Which weights the workers have loaded: results of others are not mixed with theirs."""
    digest: str = _worker["base"].info.weights_digest[:16]
    return digest


def train(job: Job, base: str, data: Path, work: Path) -> dict[str, Any]:
    """Run a job in a worker; returns the line to keep."""
    from sera_serve.trainer.run import train_adapter
    from sera_serve.trainer.settings import TrainSettings

    tenant = TENANTS[job.tenant]
    common: dict[str, Any] = {
        "base": base,
        "store": work / "store",
        "name": f"{job.tenant}/{slug(job.variant)}-s{job.seed}",
        "task": tenant.task,
        "train": data / tenant.folder / f"train{tenant.suffix}",
        "test": test_file(tenant, data, work),
        "train_limit": tenant.train_limit,
        "max_length": tenant.max_length,
        "batch_size": tenant.batch_size,
        "epochs": tenant.epochs,
        "seed": job.seed,
    }
    begun = time.monotonic()
    if job.variant == BASE_ONLY:
        metrics, parameters, head = score_base_only(TrainSettings(**common)), 0, 0
    else:
        options = {"learning_rate": job.rate, **VARIANTS[job.variant].options}
        if job.variant == "head-only":
            options["epochs"] = HEAD_ONLY_EPOCHS
        result = train_adapter(TrainSettings(**(common | options)), base=_worker["base"])
        metrics, parameters, head = result.metrics, result.parameters, result.head_parameters
    return {
        **asdict(job),
        "base": base_digest(),
        "setup": asdict(tenant),
        "metrics": metrics,
        "parameters": parameters,
        "head_parameters": head,
        "seconds": round(time.monotonic() - begun, 1),
    }


def score_base_only(settings: Any) -> dict[str, float]:
    """What the base does on the test rows without an adapter."""
    from sera_serve.trainer.data.passages import load_generate_data
    from sera_serve.trainer.tasks import GenerateTask

    task = GenerateTask(_worker["base"], load_generate_data(settings), max_length=settings.max_length)
    held_out, test = task.evaluate(task.eval_rows), task.evaluate(task.test_rows)
    return held_out | {f"test_{name}": value for name, value in test.items()}


def test_file(tenant: Tenant, data: Path, work: Path) -> Path:
    """The test rows, or a fixed random part of them."""
    source = data / tenant.folder / f"test{tenant.suffix}"
    if tenant.test_limit >= 100_000:
        return source
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    part = work / f"{tenant.name}-test-{tenant.test_limit}{tenant.suffix}"
    # Another worker may be writing the same bytes.
    draft = part.with_suffix(f".{os.getpid()}")
    draft.write_text("".join(random.Random(0).sample(lines, tenant.test_limit)), encoding="utf-8")
    draft.replace(part)
    return part


def slug(variant: str) -> str:
    return variant.lower().replace(" r=split=", "").replace(" r=", "").replace(" ", "-")
