"""Answers of the API for the console's tests: states that a server with a stub for an engine does not come to."""

from __future__ import annotations

from typing import Any

KEY: dict[str, Any] = {
    "id": "0123456789ab",
    "tenant": "acme",
    "scopes": ["infer"],
    "name": "web shop",
    "created_at": "2026-11-20T08:00:00Z",
    "expires_at": None,
    "status": "active",
}
JOB: dict[str, Any] = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1_795_700_000,
    "finished_at": None,
    "status": "running",
    "model": "stub",
    "fine_tuned_model": None,
    "training_file": "file-1",
    "validation_file": None,
    "seed": 1,
    "error": None,
    "result_files": [],
    "suffix": "support",
    "adapter": {"name": "acme/support", "task": "generate", "init_from": None, "method": None, "rank": 8, "split": 2},
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1}},
    },
}


def events() -> dict[str, Any]:
    """A page of a job's events, newest first: forty steps, a validation at every tenth."""
    found = []
    for step in range(1, 41):
        data: dict[str, Any] = {"step": step, "total_steps": 100, "epoch": step / 50, "train_loss": 2 - step * 0.02}
        if step % 10 == 0:
            data["eval_loss"] = 2.1 - step * 0.02
        found.append({"id": f"ev-{step}", "created_at": JOB["created_at"] + step, "type": "metrics", "data": data})
    found.append({"id": "ev-0", "created_at": JOB["created_at"], "type": "message", "message": "Training began"})
    common = {"object": "fine_tuning.job.event", "level": "info"}
    return {"object": "list", "data": [common | event for event in reversed(found)], "has_more": False}


def stats(step: int = 0) -> dict[str, Any]:
    """The server's counters after a number of steps of two seconds: 50 new tokens a second, three hits in four."""
    return {
        "at": 1_795_700_000 + 2 * step,
        "requests_in_flight": 3,
        "waiting": 1,
        "running": 2,
        "tokens": {"prompt": 400 * step, "completion": 100 * step},
        "classified_inputs": 0,
        "first_token": {"count": 4 * step, "sum": 0.4 * step},
        "waits": {"count": 4 * step, "sum": 0.04 * step},
        "adapters": {
            "resident": 3,
            "pinned": 1,
            "loading": 0,
            "device_bytes": 4096,
            "device_limit": 8192,
            "host_bytes": 512,
            "host_limit": 1024,
            "hits": {"device": 6 * step, "host": step, "store": step},
            "evictions": 4,
        },
        "cache_pages": {"in_use": 5, "total": 8},
        "by_tenant": {"acme": {"requests": step, "tokens": 100 * step}},
        "by_adapter": {"acme/support": {"requests": step, "tokens": 100 * step, "classified_inputs": 0}},
    }
