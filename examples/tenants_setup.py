"""What tenants_experiment.py measures: data sets, methods at their sizes, and single training runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tenant:
    """A data set and how much of it one run uses."""

    name: str
    task: str
    folder: str
    suffix: str
    train_limit: int
    epochs: int
    batch_size: int
    max_length: int
    score: str
    test_limit: int = 100_000


@dataclass(frozen=True)
class Variant:
    """A method at a size, and the learning rates to try, best guess first."""

    name: str
    options: dict[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One training run."""

    tenant: str
    variant: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.tenant} {self.variant} {self.rate:g} {self.seed}"


TENANTS = {
    t.name: t
    for t in [
        Tenant("sms_spam", "classify", "tenants/sms_spam", ".csv", 1500, 3, 16, 96, "macro_f1"),
        Tenant("subjectivity", "classify", "tenants/subjectivity", ".csv", 1600, 3, 16, 96, "accuracy"),
        Tenant("ag_news", "classify", "tenants/ag_news", ".csv", 1200, 3, 16, 96, "accuracy"),
        Tenant("hwu64", "classify", "tenants/hwu64", ".csv", 4500, 3, 16, 48, "accuracy"),
        Tenant("e2e", "generate", "generate/e2e", ".jsonl", 600, 3, 16, 160, "perplexity", 300),
    ]
}
VARIANTS = {
    v.name: v
    for v in [
        Variant("head-only", {"method": "head-only"}, (1e-2, 3e-2, 3e-3)),
        Variant("SeRA r=split=16", {"method": "sera", "rank": 16}, (1e-2, 2e-2)),
        Variant("SeRA r=split=64", {"method": "sera", "rank": 64}, (1e-2, 2e-2)),
        Variant("LoRA r=2", {"method": "lora", "rank": 2}, (3e-3, 1e-2, 1e-3)),
        Variant("LoRA r=8", {"method": "lora", "rank": 8}, (3e-3, 1e-2, 1e-3)),
    ]
}
BASE_ONLY = "base model"
SEEDS = (0, 1, 2)


def variants_of(tenant: Tenant) -> list[str]:
    if tenant.task == "generate":
        return [BASE_ONLY, *[name for name in VARIANTS if name != "head-only"]]
    return list(VARIANTS)


def score(tenant: Tenant, metrics: dict[str, float], prefix: str = "") -> float:
    """The data set's score, larger is better."""
    value = metrics[prefix + tenant.score]
    return -value if tenant.score == "perplexity" else value
