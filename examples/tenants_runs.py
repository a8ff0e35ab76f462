"""Keeps the finished runs of tenants_experiment.py, and lists the runs that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenants_setup import BASE_ONLY, SEEDS, TENANTS, VARIANTS, Job, score, variants_of


class Runs:
    """The finished runs of one base, kept in a file."""

    def __init__(self, path: Path, base: str) -> None:
        self.path = path
        self.base = base
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                run = json.loads(line)
                same = run["base"] == base and run["setup"] == asdict(TENANTS[run["tenant"]])
                if same:
                    job = Job(run["tenant"], run["variant"], run["rate"], run["seed"])
                    self.done[job.key] = run

    def add(self, run: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        self.done[Job(run["tenant"], run["variant"], run["rate"], run["seed"]).key] = run

    def best_rate(self, tenant: str, variant: str) -> float:
        """By the held-out rows at seed 0, equal scores by their loss."""
        runs = [r for r in self.done.values() if (r["tenant"], r["variant"], r["seed"]) == (tenant, variant, 0)]
        best = max(runs, key=lambda r: (score(TENANTS[tenant], r["metrics"]), -r["metrics"]["loss"]))
        return float(best["rate"])

    def chosen(self, tenant: str, variant: str) -> list[dict[str, Any]]:
        """The runs at the best rate, one a seed."""
        rate = self.best_rate(tenant, variant)
        jobs = [Job(tenant, variant, rate, seed) for seed in SEEDS]
        return [self.done[job.key] for job in jobs if job.key in self.done]


def first_jobs(tenants: list[str]) -> Iterator[Job]:
    for name in tenants:
        for variant in variants_of(TENANTS[name]):
            rates = (0.0,) if variant == BASE_ONLY else VARIANTS[variant].rates
            for rate in rates:
                yield Job(name, variant, rate, 0)


def further_jobs(tenants: list[str], runs: Runs) -> Iterator[Job]:
    for name in tenants:
        for variant in variants_of(TENANTS[name]):
            if variant != BASE_ONLY:
                for seed in SEEDS[1:]:
                    yield Job(name, variant, runs.best_rate(name, variant), seed)
