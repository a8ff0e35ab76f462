"""Measure head-only, SeRA and LoRA on real tenants: five data sets, three seeds, a learning rate chosen for each.

    python examples/tenants_experiment.py --data ../shared/data --work /tmp/tenants

Every run trains with `sera_serve.trainer` on a part of a data set's training rows, keeps its best epoch by rows held
out of them, and is scored once on the test rows. The learning rate of a method is the one of its grid with the best
held-out score at seed 0; the test rows never choose anything. Finished runs are kept in WORK/runs.jsonl, so the same
command goes on after a stop; adapters are published to WORK/store. At the end it writes a table and a plot.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


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
BARE = "bare base"
SEEDS = (0, 1, 2)
# Head-only passes over stored states, so many epochs cost nothing; fewer would hold it back.
HEAD_ONLY_EPOCHS = 30

_worker: dict[str, Any] = {}


def start_worker(base: str) -> None:
    """Load the base once in each process; imports of torch are kept out of the parent."""
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
    if job.variant == BARE:
        metrics, parameters, head = score_bare(TrainSettings(**common)), 0, 0
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


def score_bare(settings: Any) -> dict[str, float]:
    """What the base does on the test rows without an adapter."""
    from sera_serve.trainer.generate_data import load_generate_data
    from sera_serve.trainer.generate_task import GenerateTask

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


def score(tenant: Tenant, metrics: dict[str, float], prefix: str = "") -> float:
    """The data set's score, larger is better."""
    value = metrics[prefix + tenant.score]
    return -value if tenant.score == "perplexity" else value


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


def variants_of(tenant: Tenant) -> list[str]:
    if tenant.task == "generate":
        return [BARE, *[name for name in VARIANTS if name != "head-only"]]
    return list(VARIANTS)


def first_jobs(tenants: list[str]) -> Iterator[Job]:
    for name in tenants:
        for variant in variants_of(TENANTS[name]):
            rates = (0.0,) if variant == BARE else VARIANTS[variant].rates
            for rate in rates:
                yield Job(name, variant, rate, 0)


def further_jobs(tenants: list[str], runs: Runs) -> Iterator[Job]:
    for name in tenants:
        for variant in variants_of(TENANTS[name]):
            if variant != BARE:
                for seed in SEEDS[1:]:
                    yield Job(name, variant, runs.best_rate(name, variant), seed)


def mean_and_spread(values: list[float], places: int) -> str:
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def write_table(runs: Runs, tenants: list[str], path: Path) -> None:
    lines = [
        f"Base weights {runs.base}; {len(SEEDS)} seeds, mean ± standard deviation on the test rows; "
        "parameters without the head.",
        "",
        "| data set | method | parameters | learning rate | score | loss (nats) | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in tenants:
        tenant = TENANTS[name]
        places = 2 if tenant.score == "perplexity" else 4
        for variant in variants_of(tenant):
            chosen = runs.chosen(name, variant)
            scores = [r["metrics"][f"test_{tenant.score}"] for r in chosen]
            losses = [r["metrics"]["test_loss"] for r in chosen]
            rate = "" if variant == BARE else f"{chosen[0]['rate']:g}"
            lines.append(
                f"| {name} ({tenant.score}) | {variant} | {chosen[0]['parameters']:,} | {rate} "
                f"| {mean_and_spread(scores, places)} | {mean_and_spread(losses, 3)} "
                f"| {statistics.fmean(r['seconds'] for r in chosen):.0f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def draw_plot(runs: Runs, tenants: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(1, len(tenants), figsize=(3.4 * len(tenants), 3.6), squeeze=False)
    styles = {"SeRA": ("tab:blue", "o"), "LoRA": ("tab:orange", "s")}
    for axis, name in zip(axes[0], tenants, strict=True):
        tenant = TENANTS[name]
        for family, (colour, marker) in styles.items():
            points = []
            for variant in variants_of(tenant):
                if variant.startswith(family):
                    chosen = runs.chosen(name, variant)
                    values = [r["metrics"][f"test_{tenant.score}"] for r in chosen]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append((chosen[0]["parameters"], statistics.fmean(values), spread))
            x, y, bars = zip(*points, strict=True)
            axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, capsize=3, label=family)
        floor = variants_of(tenant)[0]
        values = [r["metrics"][f"test_{tenant.score}"] for r in runs.chosen(name, floor)]
        axis.axhline(statistics.fmean(values), color="gray", linestyle="--", label=floor)
        axis.set(title=name, xlabel="adapter parameters", xscale="log", ylabel=tenant.score)
        axis.set_xticks([3e4, 1e5, 2e5], labels=["30k", "100k", "200k"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        if tenant.score == "perplexity":
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    data: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("../shared/data"),
    work: Annotated[Path, typer.Option(help="Folder for runs.jsonl and the store.")] = Path("/tmp/tenants"),
    base: Annotated[str, typer.Option(help="Base model.")] = "embedded",
    tenant: Annotated[list[str] | None, typer.Option(help="Only these data sets.")] = None,
    variant: Annotated[str | None, typer.Option(help="Only the one run of this method (with --rate).")] = None,
    rate: Annotated[float, typer.Option(help="Learning rate of that run.")] = 3e-3,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    table: Annotated[Path, typer.Option(help="Table to write.")] = Path("docs/tenants_table.md"),
    plot: Annotated[Path, typer.Option(help="Plot to write.")] = Path("docs/tenants.png"),
) -> None:
    """Measure every method on every tenant, or go on where a stopped measurement was."""
    console = Console()
    tenants = tenant or list(TENANTS)
    work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (base,)) as pool:
        runs = Runs(work / "runs.jsonl", pool.submit(base_digest).result())
        stages = [lambda: first_jobs(tenants), lambda: further_jobs(tenants, runs)]
        if variant is not None:
            stages = [lambda: iter([Job(name, variant, rate, 0) for name in tenants])]
        for stage in stages:
            jobs = [job for job in stage() if job.key not in runs.done]
            futures = {pool.submit(train, job, base, data, work): job for job in jobs}
            begun = time.monotonic()
            for count, future in enumerate(as_completed(futures), 1):
                try:
                    run = future.result()
                except BaseException:
                    # Without this, leaving the pool would first train everything that is queued.
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                runs.add(run)
                left = (time.monotonic() - begun) / count * (len(jobs) - count)
                name = TENANTS[run["tenant"]].score
                console.print(
                    f"{count}/{len(jobs)} {futures[future].key}: held-out {run['metrics'][name]:.4f} "
                    f"test {run['metrics']['test_' + name]:.4f} in {run['seconds']:.0f} s, "
                    f"{math.ceil(left / 60)} min left",
                    highlight=False,
                )
    if variant is None:
        write_table(runs, tenants, table)
        draw_plot(runs, tenants, plot)
        console.print(f"wrote {table} and {plot}")


if __name__ == "__main__":
    typer.run(main)
