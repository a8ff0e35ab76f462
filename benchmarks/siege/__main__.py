"""Attacks on a real server, one after another, and what the server's other clients notice of each.

    python -m benchmarks.siege [--quick] [--case NAME ...] [--mixed MINUTES | --each SECONDS] [--only ATTACK ...]
        [--client NAME ...] [--checkout PATH] [--output FILE]

Each case starts a server with the embedded base in a process of its own. Two healthy clients ask all the time, from
loopback addresses of their own: one the health, one a generation with an adapter. The attacker is a third process; with
`--mixed` it has the lowest priority. With `--checkout` the server runs the code of another checkout, and this one
attacks it. `--each` runs the attacks of `--mixed` one after another, to see which of them costs what; `--only` leaves
the others out of either.

A server that passes 4 GiB is killed, so that the machine survives. The last line is one JSON object; the exit status is
1 if a healthy client had a wrong answer, or if the server did not hold a mixed siege.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.last_line import tell
from benchmarks.server_process import REPOSITORY
from benchmarks.siege.cases import CASES, Ground, run_case
from benchmarks.siege.each import report_each, run_each
from benchmarks.siege.mixed import CLIENTS, NAMES, report, run_mixed

ADAPTERS = 5_000
FOLDER = Path(tempfile.gettempdir()) / "sera-siege"


def make_stores(checkout: Path, folder: Path) -> Path:
    """The folder with the stores that a checkout's own code made, now or in an earlier run."""
    own = folder / hashlib.sha256(str(checkout).encode()).hexdigest()[:12]
    own.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    script = Path(__file__).with_name("stores.py")
    subprocess.run(
        [sys.executable, "-P", str(script), str(own), str(ADAPTERS)],
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    return own


def seconds(value: float | None) -> str:
    """Seconds for a table."""
    return "-" if value is None else f"{value:.3f}"


def table_row(row: dict[str, Any]) -> list[str]:
    """Cells of one row."""
    if "skipped" in row:
        return [row["case"], *[""] * 9, f"skipped: {row['skipped']}"]
    attacker = ", ".join(f"{count:,} {label}" for label, count in row["attacker"].items())
    figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
    got = "; ".join(part for part in (attacker, figures, f"exit {row['exit_status']}") if part)
    if "end_s" in row:
        return [row["case"], *[""] * 9, f"{got}; ended after {row['end_s']} s"]
    client = row["client"]
    failed = ", ".join(f"{count} {label}" for label, count in client["failures"].items())
    grown = f">{row['rss_grown_mib']:,.0f}, killed" if row["over_cap"] else f"{row['rss_grown_mib']:,.0f}"
    return [
        row["case"],
        seconds(row["healthz_pause_s"]),
        seconds(row["quiet_p95_s"]),
        seconds(client["p50"]),
        seconds(client["p95"]),
        seconds(client["longest"]),
        failed or "-",
        grown,
        str(row["files"]),
        f"{row['temp_mib']:,.0f}",
        got,
    ]


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print a table of the cases."""
    columns = ("case", "/healthz pause", "quiet p95", "p50", "p95", "longest", "failed")
    table = Table(*columns, "RSS+ MiB", "files", "temp MiB", "attacker got", title="seconds, of a client's generate")
    for row in rows:
        table.add_row(*table_row(row))
    console.print(table, markup=False)


def _check(given: list[str] | None, known: Collection[str], what: str) -> None:
    if unknown := sorted(set(given or ()) - set(known)):
        raise typer.BadParameter(f"there is no {what} {unknown[0]!r}; they are {', '.join(known)}")


def main(
    quick: Annotated[bool, typer.Option(help="Smaller attacks.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given again.")] = None,
    mixed: Annotated[float, typer.Option(help="Minutes of all attacks at once, in place of the cases.", min=0)] = 0,
    each: Annotated[float, typer.Option(help="Seconds of each attack of the mix, alone.", min=0)] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Of the mix, only this attack; may be given again.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="With --each, only this client; may be given again.")] = None,
    checkout: Annotated[Path, typer.Option(help="Repository whose server is attacked.")] = REPOSITORY,
    folder: Annotated[Path, typer.Option(help="Keeps the stores for the next run.")] = FOLDER,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here, after each case.")] = None,
) -> None:
    """Attack, print a table, then one JSON line."""
    console = Console(stderr=True, width=200)
    if mixed and each:
        raise typer.BadParameter("--mixed and --each are two ways to run the attacks; give one")
    if (only and not (mixed or each)) or (client and not each):
        raise typer.BadParameter("--only needs --mixed or --each, and --client needs --each")
    _check(case, [known.name for known in CASES], "case")
    _check(only, NAMES, "attack")
    _check(client, CLIENTS, "client")
    ground = Ground(checkout.resolve(), make_stores(checkout.resolve(), folder.resolve()), quick)
    rows: list[dict[str, Any]] = []
    correct = True
    if mixed:
        rows.append(run_mixed(ground, mixed, only or NAMES))
        correct = rows[0]["held"]
        console.print(report(rows[0]))
    elif each:
        rows += run_each(ground, each, only or NAMES, client or CLIENTS)
        correct = not any(row["wrong"] for row in rows)
        console.print(report_each(rows))
    else:
        for chosen in CASES:
            if case and chosen.name not in case:
                continue
            rows.append(run_case(chosen, ground))
            console.print(json.dumps(rows[-1]), markup=False, highlight=False, soft_wrap=True)
            correct = not any(row.get("wrong") for row in rows)
            if output is not None:
                output.write_text(json.dumps({"benchmark": "siege", "correct": correct, "rows": rows}))
        print_rows(console, rows)
    tell("siege", rows, correct=correct, is_check=True, output=output)


if __name__ == "__main__":
    typer.run(main)
