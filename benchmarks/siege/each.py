"""The attacks of a mixed siege, one at a time beside healthy clients: which of them costs what."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from benchmarks.siege.cases import Ground, wait_for_answers
from benchmarks.siege.mixed import Besieged, besieged, compared

# After an attack: the server gives freed memory back every 15 s.
REST_S = 18.0


def run_each(ground: Ground, seconds: float, names: Iterable[str], clients: Iterable[str]) -> list[dict[str, Any]]:
    """Run each attack for so long on one server, between two rests; returns a row for each.

    The rest after an attack is the quiet before the next.

    Args:
        ground: Where the server and its stores are.
        seconds: Of each attack.
        names: The attacks, of `mixed.NAMES`.
        clients: Who asks meanwhile, of `mixed.CLIENTS`.
    """
    rows = []
    with besieged(ground, clients) as here:
        # The first rest is longer: caches fill.
        time.sleep(REST_S)
        quiet = time.monotonic()
        time.sleep(REST_S)
        for name in names:
            row = _run_one(here, name, seconds)
            rows.append({"case": name, "times": (quiet, *row.pop("times"))} | row)
            quiet = time.monotonic() - REST_S
        samples = {name: watcher.stop() for name, watcher in here.watchers.items()}
    del samples["healthz"]
    for row in rows:
        quiet, begun, ended = row.pop("times")
        row["clients"] = {name: compared(seen, quiet, begun, ended) for name, seen in samples.items()}
        row["wrong"] = sum(client["siege"]["wrong"] for client in row["clients"].values())
    return rows


def _run_one(here: Besieged, name: str, seconds: float) -> dict[str, Any]:
    start, processor = here.gauge.begin(), here.gauge.processor_s()
    outcome, begun, ended = here.attack([name], seconds)
    used, most = here.gauge.processor_s() - processor, here.gauge.most
    wait_for_answers(here.watchers.values(), ended, REST_S)
    time.sleep(REST_S)
    return {
        "times": (begun, ended),
        "processor_share": round(used / (ended - begun), 2),
        "rss_start_mib": start.rss_mib,
        "rss_most_mib": most.rss_mib,
        "rss_after_mib": here.gauge.now().rss_mib,
        "attacker": outcome.figures.get(name, outcome.figures),
    }


def report_each(rows: list[dict[str, Any]]) -> Table:
    """A table of the attacks: each client's ratio of p95, and the server's memory."""
    names = list(rows[0]["clients"]) if rows else []
    columns = [f"{name} {what}" for name in names for what in ("quiet p95", "p50", "p95", "ratio")]
    table = Table("attack", *columns, "processors", "RSS most", "RSS kept", title="one attack at a time")
    for row in rows:
        cells = [row["case"]]
        for client in row["clients"].values():
            siege = client["siege"]
            cells += map(str, (client["quiet"]["p95"], siege["p50"], siege["p95"], client["ratio"]))
        grown = (row[key] - row["rss_start_mib"] for key in ("rss_most_mib", "rss_after_mib"))
        table.add_row(*cells, str(row["processor_share"]), *(f"{value:+.1f}" for value in grown))
    return table
