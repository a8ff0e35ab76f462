"""Measure head-only, SeRA and LoRA on real tenants: five data sets, three seeds, a learning rate chosen for each.

    python examples/tenants_experiment.py --data ../shared/data --work /tmp/tenants

Every run trains with `sera_serve.trainer` on a part of a data set's training rows. Other training rows are held out and
choose the best epoch. The test rows are scored once and choose nothing. A method's learning rate comes from a grid: the
rate with the best held-out score at seed 0. Finished runs are kept in WORK/runs.jsonl, so the same command continues
after a stop. Adapters are published to WORK/store. At the end the script writes a table and a plot.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tenants_report import draw_plot, write_table
from tenants_runs import Runs, first_jobs, further_jobs
from tenants_setup import TENANTS, Job
from tenants_worker import base_digest, start_worker, train


def main(
    data: Annotated[Path, typer.Option(help="Folder with the data sets.", exists=True, file_okay=False)] = Path(
        "../shared/data"
    ),
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
