"""Thousands of streams whose clients read slowly, or stop: the server's memory, other clients' waiting, every token.

    python -m benchmarks.slow_readers [--streams 2000] [--tokens 48] [--slow-pause 0.5] [--width 64] [--quick]

A process of its own serves a small random base without an end token. Each stream has 20 log-probabilities a token: a
kilobyte, more than a reader of some kilobytes a second takes as it comes. In turn:

* `quiet`: four other clients alone, of another tenant;
* `fast`: so many streams, each read as it comes; what they give is the reference;
* `slow`: the same streams, each read by some kilobytes at a time with a rest after it. Answers of the other clients
  count as `slow_busy` while tokens are computed, and as `slow_held` when all tokens are there and unread;
* `stopped`: an eighth of the streams, 176 tokens long, each read once and then left. The systems of both sides buffer
  some 100 KiB of a stream. The server keeps 64 KiB more, and ends the connection after `write_timeout_s`, 20 s here.

The four other clients ask all the time. Memory is the resident set of the server's process. The last line is one JSON
object; the exit status is 1 if a stream lost or changed a token, if a request of the other clients failed, if the
server still held something at the end, or if a stopped client was not cut off.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.fleet import Fleet, adapter_name, save_endless_base
from benchmarks.http_load import Answer, LoadClient
from benchmarks.last_line import tell
from benchmarks.server_process import ServerProcess
from benchmarks.service_figures import failures, percentiles
from benchmarks.slow_reading import Reading, StreamRead, read_streams
from benchmarks.workload import TimedRequest
from sera_serve import SeraConfig

WRITE_TIMEOUT_S = 20
SHAPE = SeraConfig(8, 8, 16.0, ("q_proj", "v_proj"))
OTHERS, OTHERS_TOKENS = 4, 16
STOPPED_TOKENS = 176
# Both sides of each connection, and the rest.
_SPARE_DESCRIPTORS = 512


@dataclass
class Watch:
    """What was seen beside the streams.

    Attributes:
        answers: Of the other clients, by what went on when they were asked.
        memory: The server's resident set by phase: the largest of its samples, bytes.
    """

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    phase: str = "start"
    is_computing: bool = True

    def label(self) -> str:
        """What goes on now, as figures of the other clients are grouped."""
        if self.phase != "slow":
            return self.phase
        return "slow_busy" if self.is_computing else "slow_held"


async def watch_server(server: ServerProcess, watch: Watch) -> None:
    """Ask as the other clients do, and sample memory, until cancelled."""
    process = psutil.Process(server.pid)
    client = LoadClient(server.host, server.port, lambda index: adapter_name(1))

    async def ask(number: int) -> None:
        request = TimedRequest(0.0, 0, tuple(range(10 + number, 26 + number)), OTHERS_TOKENS)
        while True:
            label = watch.label()
            answer = await client.ask(request)
            # What began in one phase and ended in another belongs to neither.
            if label == watch.label():
                watch.answers.setdefault(label, []).append(answer)
            await asyncio.sleep(0.05)

    async def sample() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            while True:
                used = process.memory_info().rss
                watch.memory[watch.phase] = max(used, watch.memory.get(watch.phase, 0))
                with suppress(httpx.HTTPError):
                    watch.is_computing = _computing((await client.get("/metrics")).text)
                await asyncio.sleep(0.25)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sample())
        for number in range(OTHERS):
            tasks.create_task(ask(number))


def _computing(metrics: str) -> bool:
    """Whether more requests wait or run than those of the other clients."""
    lines = (line for line in metrics.splitlines() if line.startswith(("sera_waiting ", "sera_running ")))
    return sum(float(line.split(" ")[1]) for line in lines) > OTHERS


async def measure(
    server: ServerProcess, reading: Reading, slow_pause_s: float, held_s: float, quiet_s: float, console: Console
) -> dict[str, Any]:
    """Run every phase, and return the figures."""
    watch = Watch()
    watching = asyncio.ensure_future(watch_server(server, watch))
    loop = asyncio.get_running_loop()
    outcomes: dict[str, list[StreamRead]] = {}
    seconds: dict[str, float] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as readers:
        # The first call imports what the process needs.
        await loop.run_in_executor(readers, read_streams, replace(reading, streams=1))
        watch.phase = "quiet"
        await asyncio.sleep(quiet_s)
        phases = {
            "fast": reading,
            "slow": replace(reading, pause_s=slow_pause_s),
            "stopped": replace(
                reading,
                streams=-(-reading.streams // 8),
                new_tokens=STOPPED_TOKENS,
                stops=True,
                held_s=held_s,
            ),
        }
        for phase, plan in phases.items():
            watch.phase, watch.is_computing = phase, True
            began = time.perf_counter()
            outcomes[phase] = await loop.run_in_executor(readers, read_streams, plan)
            seconds[phase] = time.perf_counter() - began
            console.print(f"{phase}: {plan.streams} streams in {seconds[phase]:.1f} s")
            watch.phase = f"after_{phase}"
            await asyncio.sleep(3)
        watch.phase = "end"
        await asyncio.sleep(quiet_s / 2)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    left = await _left(server)
    figures = {
        "streams": reading.streams,
        "tokens": reading.new_tokens,
        "write_timeout_s": WRITE_TIMEOUT_S,
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        "response_kib": round(sum(read.received for read in outcomes["fast"]) / reading.streams / 1024, 1),
        "memory_mib": {phase: round(value / 2**20, 1) for phase, value in watch.memory.items()},
        "others": {label: others(answers) for label, answers in watch.answers.items()},
        "fast": outcome(outcomes["fast"], outcomes["fast"], reading.new_tokens),
        "slow": outcome(outcomes["slow"], outcomes["fast"], reading.new_tokens),
        "stopped": outcome(outcomes["stopped"], outcomes["fast"], STOPPED_TOKENS),
        "left": left,
    }
    return figures


def others(answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of the other clients in one phase: time to the first token and to the last."""
    whole = [answer for answer in answers if answer.right_length]
    first = percentiles("ttft", [answer.ttft for answer in whole])
    last = percentiles("latency", [answer.ended - answer.due for answer in whole])
    return {"requests": len(answers), "failures": failures(answers)} | first | last


def outcome(reads: Sequence[StreamRead], fast: Sequence[StreamRead], new_tokens: int) -> dict[str, int]:
    """How many streams were whole, cut, refused, or not what the same stream gave when it was read fast."""
    wrong = sum(
        not _begins_alike(read.tokens, reference.tokens) or not _begins_alike(read.text, reference.text)
        for read, reference in zip(reads, fast, strict=False)
    )
    return {
        "streams": len(reads),
        "whole": sum(read.complete and len(read.tokens) == new_tokens for read in reads),
        "cut": sum(read.status == 200 and not read.complete for read in reads),
        "refused": sum(read.status != 200 for read in reads),
        "wrong": wrong,
    }


def _begins_alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def is_correct(figures: dict[str, Any]) -> bool:
    """Whether no token was lost, nobody else was refused, and nothing is left."""
    streams = figures["streams"]
    whole = all(figures[phase]["whole"] == streams and figures[phase]["wrong"] == 0 for phase in ("fast", "slow"))
    cut = figures["stopped"]["cut"] == figures["stopped"]["streams"] and figures["stopped"]["wrong"] == 0
    served = not any(figure["failures"] for figure in figures["others"].values())
    return whole and cut and served and not any(figures["left"].values())


async def _left(server: ServerProcess) -> dict[str, int]:
    """What the server holds when no client is there any more."""
    process = psutil.Process(server.pid)
    deadline = time.monotonic() + 10
    while True:
        metrics = server.metrics()
        connections = [c for c in process.net_connections("tcp") if c.status not in (psutil.CONN_LISTEN,)]
        left = {
            "in_flight": int(metrics["sera_requests_in_flight"]),
            "waiting": int(metrics["sera_waiting"]),
            "running": int(metrics["sera_running"]),
            "connections": len([c for c in connections if c.status == psutil.CONN_ESTABLISHED]),
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the tables for people."""
    table = Table("phase", "requests", "first token p50", "p95", "whole answer p50", "p95")
    for label, row in figures["others"].items():
        values = (row["ttft_p50_s"], row["ttft_p95_s"], row["latency_p50_s"], row["latency_p95_s"])
        table.add_row(
            label, str(row["requests"]), *(f"{value:.3f} s" if value is not None else "-" for value in values)
        )
    console.print(table)
    memory = Table("phase", "memory, MiB")
    for phase, used in figures["memory_mib"].items():
        memory.add_row(phase, f"{used:.0f}")
    console.print(memory)


def raise_descriptors(needed: int) -> int:
    """Raise this process's limit of open files, which its children have too, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, needed) if hard != resource.RLIM_INFINITY else needed
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(soft, limit)


def settings_for(streams: int) -> dict[str, int | float]:
    """The settings of a server that lets so many streams in from one address."""
    return {
        "max_connections": streams + 64,
        "max_connections_per_address": streams + 64,
        "max_queue": streams + 64,
        "max_queue_per_tenant": streams + 32,
        "request_timeout_s": 600,
        "write_timeout_s": WRITE_TIMEOUT_S,
    }


def main(
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 2000,
    tokens: Annotated[int, typer.Option(help="Tokens of a stream.", min=8, max=400)] = 48,
    slow_pause: Annotated[float, typer.Option(help="Rest of a slow reader after each read, seconds.", min=0.01)] = 0.5,
    held: Annotated[float, typer.Option(help="Seconds for which stopped clients keep their connections.")] = 60,
    quiet: Annotated[float, typer.Option(help="Seconds of the quiet phase.", min=0.5)] = 10,
    width: Annotated[int, typer.Option(help="Of the base.", min=64)] = 64,
    quick: Annotated[bool, typer.Option("--quick", help="40 streams and short phases.")] = False,
) -> None:
    """Measure, and print a table and a line of JSON."""
    if quick:
        streams, tokens, slow_pause, held, quiet = 40, 48, 0.1, 30, 1
    console = Console(stderr=True)
    descriptors = raise_descriptors(2 * streams + _SPARE_DESCRIPTORS)
    if descriptors < streams + _SPARE_DESCRIPTORS:
        raise typer.BadParameter(f"at most {descriptors} files may be open; raise the limit (ulimit -Hn)")
    with tempfile.TemporaryDirectory() as folder:
        base = save_endless_base(Path(folder, "base"), width)
        store = Fleet(base, (SHAPE,)).publish(Path(folder, "store"), 2)
        with ServerProcess(Path(folder, "base"), store.root, Path(folder, "log"), **settings_for(streams)) as server:
            server.wait_until_ready()
            reading = Reading(server.host, server.port, adapter_name(0), streams, tokens)
            figures = uvloop.run(measure(server, reading, slow_pause, held, quiet, console))
    show(figures, console)
    tell("slow_readers", [figures], correct=is_correct(figures), is_check=True)


if __name__ == "__main__":
    typer.run(main)
