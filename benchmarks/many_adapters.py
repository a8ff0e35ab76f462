"""Far more adapters than fit: throughput and latency over HTTP, from 5 to 5,000 registered adapters.

    python -m benchmarks.many_adapters [--quick] [--against CHECKOUT]

Servers over stores of 5, 100, 1,000 and 5,000 adapters of mixed shapes, each with room for 200 on the device, get the
same arrivals and lengths (S-LoRA's synthetic workload), open loop, at a share of the capacity that the smallest
showed; then as much as they can take. No prompt comes twice, for a server keeps what it has computed of one. Rounds go
through the servers in turn, so that a slow moment of the machine hits all. Beside them: the same trace through PEFT, a
cold adapter against a resident one, a tenant that floods, and service among tenants with a backlog. Answers are checked
first and throughout, and no speed is reported where one is wrong. The last line is one JSON object.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fleet import SHAPES
from benchmarks.last_line import tell
from benchmarks.many_adapters_run import ManyAdapters, Plan
from benchmarks.plots import plot_many_adapters

PLOT = Path(__file__).parent / "results" / "many_adapters.png"
COLUMNS = ["system", "adapters", "requests_per_s", "tokens_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s"]
COLUMNS += ["itl_p99_s", "hit_rate"]
QUICK = Plan((5, 20), 10, 16, 8, 16, 0.5, 1, 1, 1.5, 0.6, 4, 2, 4)


def report(wrong: list[str], result: dict[str, Any], console: Console) -> None:
    """Print what was wrong; where nothing was, the table of a run."""
    for line in wrong[:20]:
        console.print(f"wrong: {line}", markup=False)
    if wrong:
        return
    table = Table(*COLUMNS)
    for row in result["rows"]:
        table.add_row(*(str(row[key]) for key in COLUMNS))
    console.print(table)
    console.print(str(result["figures"]), markup=False)


def main(
    quick: Annotated[bool, typer.Option(help="Two small fleets, one round: seconds, and figures of no worth.")] = False,
    alpha: Annotated[float, typer.Option(help="Popularity: 1 is uniform, less is more skewed.")] = 0.6,
    touch: Annotated[bool, typer.Option(help="Ask every adapter once before anything is measured.")] = False,
    host_cache_mib: Annotated[
        int | None, typer.Option(min=0, help="Host memory for adapters; by default less than 5,000 of them take.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=128, help="Of a larger base of eight layers, e.g. 768; its adapters are larger too."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Of each load of each round; a larger base needs longer ones.")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(min=len(SHAPES), help="Registered adapters of each server, ascending, the last at least 10."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another checkout whose servers take the same rounds, instead of all the rest.")
    ] = None,
    plot: Annotated[Path, typer.Option(help="Where the PNG goes.")] = PLOT,
) -> None:
    """Measure, print a table, then one JSON line."""
    if size and (size != sorted(set(size)) or size[-1] < 10):
        raise typer.BadParameter("sizes ascend, and the last is at least 10", param_hint="--size")
    console = Console(stderr=True, width=140)
    with tempfile.TemporaryDirectory(prefix="many-adapters-") as folder:
        plan = replace(QUICK if quick else Plan(), touch=touch, width=width)
        if host_cache_mib is not None:
            plan = replace(plan, host_cache_mib=host_cache_mib)
        if seconds is not None:
            plan = replace(plan, open_s=seconds, saturated_s=seconds)
        if size:
            plan = replace(plan, sizes=tuple(size))
        run = ManyAdapters(plan, Path(folder), alpha, console)
        result = run.run() if against is None else run.compare(against.resolve())
    report(run.wrong, result, console)
    facts = {"alpha": alpha, "touched": touch, "host_cache_mib": plan.host_cache_mib, "width": width}
    facts |= {"open_s": plan.open_s, "saturated_s": plan.saturated_s, "load": plan.load}
    if against is None and not run.wrong:
        plot_many_adapters(plot, result["rows"], run.ttfts)
        facts["plot"] = str(plot)
    tell("many_adapters", result.pop("rows", []), correct=not run.wrong, **result, **facts)


if __name__ == "__main__":
    typer.run(main)
