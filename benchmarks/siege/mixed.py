"""All attacks at once, for minutes, beside three healthy clients.

The attackers are one process of low priority, and each attack pauses between its tries: the machine has few cores, and
the question is what the server lets attackers do, not who gets the cores.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from benchmarks.server_process import ServerProcess, Surroundings
from benchmarks.siege import attacks_by_publishing as publishing
from benchmarks.siege import attacks_on_connections as connections
from benchmarks.siege import attacks_on_parsing as parsing
from benchmarks.siege import attacks_on_work as work
from benchmarks.siege.cases import HEALTH_SOURCE, Ground, run_attack, wait_for_answers
from benchmarks.siege.probe import CLASSIFY, HEALTH, OTHER, STREAM, Sample, Watcher, figures, longest_pause
from benchmarks.siege.server import Gauge
from benchmarks.siege.wire import Attack, Outcome, Target

CLIENTS = {"stream": STREAM, "classify": CLASSIFY, "generate": OTHER}
# Of the clients: a closed loop without a pause would take all the cores itself.
PAUSE_S = 0.1
ADDRESSES = 4
MAX_RATIO, MAX_KEPT = 2.0, 0.05
DESCRIPTORS = 1024
NICENESS = 19
# The server's log has a line for a standstill of its event loop, one a second at most.
_PAUSED = re.compile(r"stood still for [0-9.]+ s; route (\S+)")


@dataclass(frozen=True)
class Part:
    """One attack of the mix: its size, its time for a try, and the pause to the next try, in seconds."""

    attack: Attack
    size: int
    seconds: float = 10
    pause: float = 5


PARTS = (
    Part(parsing.pax_digits, 64 << 10),
    Part(parsing.endless_header, 16 << 20, pause=2),
    Part(parsing.endless_uri, 16 << 20, pause=2),
    Part(parsing.endless_trailer, 16 << 20, pause=2),
    Part(parsing.many_headers, 16 << 20, pause=2),
    Part(parsing.pipelined, 2_000, pause=10),
    Part(work.long_prompts, 256 << 10),
    Part(work.listings, 5),
    Part(work.invalid_tokens, 1, pause=10),
    Part(work.deep_nesting, 1, pause=10),
    Part(work.huge_numbers, 1, pause=10),
    Part(connections.idle, 150, 15, 1),
    Part(connections.half_headers, 150, 15, 1),
    Part(connections.half_bodies, 60, 15, 1),
    Part(connections.half_uploads, 20, 15, 1),
    Part(connections.unread_answers, 20, 15, 1),
    Part(publishing.odd_charsets, 1),
    Part(publishing.overflow, 1, pause=10),
)


NAMES = tuple(part.attack.__name__ for part in PARTS)


async def some_at_once(names: frozenset[str], target: Target, size: int, outcome: Outcome) -> None:
    """Run the named parts, again and again, until a little before the target's time is over."""
    loop = asyncio.get_running_loop()
    end = loop.time() + target.seconds - 1

    async def run(index: int, part: Part) -> None:
        sources = tuple(f"127.0.1.{1 + index * ADDRESSES + number}" for number in range(ADDRESSES))
        own = replace(target, sources=sources, seconds=part.seconds)
        counts: Counter[str] = Counter()
        while loop.time() + 2 < end:
            one = Outcome()
            try:
                async with asyncio.timeout_at(min(end, loop.time() + part.seconds + 5)):
                    await part.attack(own, part.size, one)
            except (OSError, ExceptionGroup) as error:
                one.counts[type(error).__name__] += 1
            counts += one.counts
            await asyncio.sleep(min(part.pause, max(0.0, end - loop.time())))
        outcome.figures[part.attack.__name__] = dict(counts)

    async with asyncio.TaskGroup() as group:
        for index, part in enumerate(PARTS):
            if part.attack.__name__ in names:
                group.create_task(run(index, part))


@dataclass(frozen=True)
class Besieged:
    """A server that is to be attacked, the gauge of its process, and the clients that ask it all the time."""

    server: ServerProcess
    gauge: Gauge
    watchers: dict[str, Watcher]
    target: Target
    log: Path

    def attack(self, names: Iterable[str], seconds: float) -> tuple[Outcome, float, float]:
        """Run the named attacks at once for so long; returns what they got, and when they began and ended."""
        begun = time.monotonic()
        target = replace(self.target, seconds=seconds)
        outcome = run_attack(partial(some_at_once, frozenset(names)), target, 0, NICENESS)
        return outcome, begun, time.monotonic()


@contextmanager
def besieged(ground: Ground, clients: Iterable[str]) -> Iterator[Besieged]:
    """Start a server over the large store, and the named clients beside one that asks the health."""
    chosen = set(clients)
    with TemporaryDirectory(dir=ground.folder, ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        temp, store = place / "temp", place / "store"
        temp.mkdir(parents=True)
        shutil.copytree(ground.folder / "large", store)
        around = Surroundings(ground.checkout, {"TMPDIR": str(temp)}, DESCRIPTORS)
        with ServerProcess(Path("embedded"), store, place / "log", around) as server:
            # On a busy machine a start takes minutes.
            server.wait_until_ready(300)
            address = (server.host, server.port)
            gauge = Gauge(server.pid, temp)
            watchers = {"healthz": Watcher(address, HEALTH_SOURCE, HEALTH)}
            for number, (name, question) in enumerate(CLIENTS.items()):
                if name in chosen:
                    watchers[name] = Watcher(address, f"127.0.0.{3 + number}", question, PAUSE_S)
            target = Target(*address, server.pid, store, ground.folder / "bundles", (), 0)
            wait_for_answers(watchers.values(), time.monotonic(), 30)
            try:
                yield Besieged(server, gauge, watchers, target, place / "log")
            finally:
                gauge.close()


def run_mixed(ground: Ground, minutes: float, names: Iterable[str] = NAMES) -> dict[str, Any]:
    """A minute of quiet, the siege, and a minute after it; a quick run has a quarter of a minute of each."""
    rest = 15.0 if ground.quick else 60.0
    with besieged(ground, CLIENTS) as here:
        quiet = time.monotonic()
        time.sleep(rest)
        start = here.gauge.begin()
        outcome, begun, ended = here.attack(names, 60 * minutes)
        wait_for_answers(here.watchers.values(), ended, rest)
        # A minute after the end, whatever became of the attackers' last requests.
        time.sleep(max(0.0, ended + rest - time.monotonic()))
        after, gauge = here.gauge.now(), here.gauge
        gauge.close()
        status = here.server.stop()
        samples = {name: watcher.stop() for name, watcher in here.watchers.items()}
        pauses = Counter(_PAUSED.findall(here.log.read_text(errors="replace")))
    health = samples.pop("healthz")
    row: dict[str, Any] = {"case": "mixed", "seconds": round(ended - begun)}
    row["clients"] = {name: compared(seen, quiet, begun, ended) for name, seen in samples.items()}
    row["healthz_pause_s"] = longest_pause([sample for sample in health if sample.begun < ended], begun)
    row |= {"rss_start_mib": start.rss_mib, "rss_most_mib": gauge.most.rss_mib, "rss_after_mib": after.rss_mib}
    row |= {"files": gauge.most.files, "temp_mib": gauge.most.temp_mib, "over_cap": gauge.over_cap}
    row |= {"logged_pauses": dict(pauses), "attackers": outcome.figures, "exit_status": status}
    return row | {"wrong": sum(client["siege"]["wrong"] for client in row["clients"].values()), "held": held(row)}


def compared(samples: Sequence[Sample], quiet: float, begun: float, ended: float) -> dict[str, Any]:
    """What one client saw in the quiet and in the siege, and the ratio of both p95; None where there is none."""
    reference = next((sample.answer for sample in samples if not sample.failure), None)
    before, during = figures(samples, quiet, begun, reference), figures(samples, begun, ended, reference)
    ratio = round(during.p95 / before.p95, 2) if during.p95 and before.p95 else None
    return {"quiet": asdict(before), "siege": asdict(during), "ratio": ratio}


def held(row: dict[str, Any]) -> bool:
    """Whether nothing was wrong, nothing failed, no client waited twice as long, and the memory came back."""
    clients = row["clients"].values()
    served = all(
        client["ratio"] is not None
        and client["ratio"] <= MAX_RATIO
        and not client["siege"]["wrong"]
        and not client["siege"]["failures"]
        for client in clients
    )
    return served and not row["over_cap"] and bool(row["rss_after_mib"] <= row["rss_start_mib"] * (1 + MAX_KEPT))


def report(row: dict[str, Any]) -> Table:
    """A table of the clients, with the server's memory below."""
    caption = (
        f"longest pause of /healthz {row['healthz_pause_s']} s; memory {row['rss_start_mib']:,} MiB at the start, "
        f"{row['rss_most_mib']:,} at most, {row['rss_after_mib']:,} after; {row['files']} open files, "
        f"{row['temp_mib']:,} MiB of temporary files; held: {row['held']}"
    )
    columns = ("client", "quiet p95", "p95", "ratio", "longest", "answers", "failed", "wrong")
    table = Table(*columns, title=f"{row['seconds']} s of all attacks at once", caption=caption)
    for name, client in row["clients"].items():
        siege = client["siege"]
        failed = ", ".join(f"{count} {label}" for label, count in siege["failures"].items())
        cells = (client["quiet"]["p95"], siege["p95"], client["ratio"], siege["longest"], siege["answers"])
        table.add_row(name, *map(str, cells), failed or "-", str(siege["wrong"]))
    return table
