"""Half an hour at saturation while tenants upload, switch aliases and delete: nothing wrong, nothing lost, no growth.

    python -m benchmarks.soak [--minutes 30] [--burst 10000]

More requests are under way than the batch has room for, over far more adapters than the device and the host cache
hold. Every slice of the time has a burst of tiny requests at once, and ends with clients that close their connections
in mid-stream. All answers are counted, a sample of each slice is compared with the merged model, and the server's books
are checked. The last line is one JSON object; the exit status is 1 if anything but an intended refusal happened, if
memory grew by 2% or more, or if an invariant was broken.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
import uvloop
from rich.console import Console

from benchmarks.fleet import Fleet, adapter_name, save_endless_base
from benchmarks.http_load import LoadClient
from benchmarks.last_line import tell
from benchmarks.reference import wrong_answers
from benchmarks.server_process import values_of
from benchmarks.service_figures import rates
from benchmarks.soak_server import serve_soak
from benchmarks.soak_tenants import ChangingTenant, Ledger
from benchmarks.workload import WorkloadSpec, make_trace
from sera_serve.commands.serve import bound_socket

SETTINGS = {"max_resident": 60, "host_cache_mib": 24, "max_sequences": 32, "cpu_threads": 1}
ADAPTERS, CLIENTS, CHANGING, CHECKED = 300, 64, 3, 6
INTENDED = (429, 503)
MAX_GROWTH = 0.02


class Soak:
    """The load on one server, and everything that came of it."""

    def __init__(self, url: str, host: str, port: int, pid: int, fleet: Fleet, console: Console) -> None:
        self.ledger = Ledger()
        self.rows: list[dict[str, Any]] = []
        self._url = url
        self._client = LoadClient(host, port, adapter_name)
        self._process = psutil.Process(pid)
        self._fleet = fleet
        self._tokens = 0
        self._console = console

    async def run(self, minutes: float, seconds: float, burst: int, changing: list[ChangingTenant]) -> None:
        """Load the server for so long, then wait until nothing is under way and check what it holds.

        Each slice of so many seconds has a burst of so many requests.
        """
        begun = time.perf_counter()
        end = asyncio.Event()
        lives = [asyncio.ensure_future(tenant.run(self.ledger, end)) for tenant in changing]
        while time.perf_counter() < begun + 60 * minutes:
            await self._slice(len(self.rows), seconds, burst)
            self.rows[-1]["minute"] = round((time.perf_counter() - begun) / 60, 2)
            self._console.print(str(self.rows[-1]), markup=False)
            for life in lives:
                if life.done():
                    life.result()
        end.set()
        await asyncio.gather(*lives)
        held = await self._integrity()
        for _ in range(100):
            if not held["in_flight"] and not held["leases"]:
                break
            await asyncio.sleep(0.1)
            held = await self._integrity()
        self.ledger.expect("nothing held at the end", not held["in_flight"] and not held["leases"], held)
        await self._check_counts()
        gone = [f"{tenant.digests & set(held['resident'])}" for tenant in changing]
        self.ledger.expect("deleted adapters gone from the device", set(gone) == {"set()"}, gone)

    def growth(self, minutes: float) -> float:
        """Resident memory at the end over that at minute 5, or at a sixth of a shorter run, minus 1."""
        settled = next(row for row in self.rows if row["minute"] >= min(5, minutes / 6))
        return float(self.rows[-1]["rss_mib"] / settled["rss_mib"] - 1)

    async def _slice(self, number: int, seconds: float, burst: int) -> None:
        trace = make_trace(WorkloadSpec(ADAPTERS, 100, seconds, seed=number))
        tiny = [replace(r, new_tokens=1, prompt=r.prompt[:4], due=0.0) for r in islice(cycle(trace), burst)]
        start = time.perf_counter()
        load, tinies = await asyncio.gather(
            self._client.closed_loop(cycle(trace), CLIENTS, seconds), self._client.open_loop(tiny)
        )
        end = start + seconds
        cut = [answer for answer in load if not answer.ended or answer.ended >= end - 0.1]
        answers = [answer for answer in load if answer not in cut] + tinies
        refused = Counter(f"{a.status} {a.error}" for a in answers if a.status in INTENDED)
        self.ledger.intended += refused
        self.ledger.done["generated"] += sum(answer.right_length for answer in answers)
        self.ledger.done["left in mid-stream"] += len(cut)
        for answer in answers:
            if answer.status in INTENDED:
                if answer.retry_after is None and not answer.tokens:
                    self.ledger.wrong.append(f"{answer.status} {answer.error} without Retry-After")
            elif not answer.right_length:
                self.ledger.wrong.append(
                    f"{answer.adapter}: {answer.status} {answer.error}, {len(answer.tokens)} tokens"
                )
        whole = [answer for answer in answers if answer.right_length]
        self._tokens += sum(len(answer.tokens) for answer in whole)
        sample = random.Random(number).sample(whole, min(CHECKED, len(whole)))
        self.ledger.wrong += await asyncio.to_thread(wrong_answers, self._fleet, sample)
        held = await self._integrity()
        row: dict[str, Any] = {"rss_mib": round(self._process.memory_info().rss / 2**20, 1)}
        row |= rates(load, start, end) | {"refused": dict(refused)}
        row |= {key: held[key] for key in ("device_bytes", "host_bytes", "in_flight", "leases")}
        self.rows.append(row)

    async def _integrity(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            answer = await client.get("/integrity")
        self.ledger.expect("invariants hold", answer.status_code == 200, answer.text)
        held: dict[str, Any] = answer.json()
        return held

    async def _check_counts(self) -> None:
        """The metrics by tenant and by adapter add up to those of all, and have the tokens of every whole answer."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            counts = values_of((await client.get("/metrics")).text)
        for kind in ("prompt", "cached_prompt", "completion"):
            sums = {
                of: sum(
                    value
                    for name, value in counts.items()
                    if name.startswith(f"sera_{of}tokens_total{{") and f'kind="{kind}"' in name
                )
                for of in ("", "tenant_", "adapter_")
            }
            self.ledger.expect(f"{kind} tokens add up", len(set(sums.values())) == 1, sums)
        told = counts['sera_tokens_total{kind="completion"}']
        self.ledger.expect("no generated token uncounted", told >= self._tokens, f"{told} of {self._tokens}")


def main(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.1)] = 30,
    burst: Annotated[int, typer.Option(help="Tiny requests at once in every slice.", min=0)] = 200,
    slice_seconds: Annotated[float, typer.Option(help="Length of a slice.", min=1)] = 20,
) -> None:
    """Soak a server, then print one JSON line."""
    console = Console(stderr=True, width=200)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, bound_socket("127.0.0.1", 0) as listener:
        folder = Path(name)
        fleet = Fleet(save_endless_base(folder / "base"))
        store = fleet.publish(folder / "store", ADAPTERS)
        listener.listen(4096)
        host, port = listener.getsockname()[:2]
        url = f"http://{host}:{port}"
        server = multiprocessing.get_context("spawn").Process(
            target=serve_soak, args=(listener, str(folder / "base"), folder / "store", SETTINGS)
        )
        server.start()
        assert server.pid is not None
        try:
            soak = Soak(url, host, port, server.pid, fleet, console)
            client = LoadClient(host, port, adapter_name)
            changing = [ChangingTenant(url, client, fleet, store, tenant) for tenant in range(CHANGING)]
            httpx.get(f"{url}/readyz", timeout=120).raise_for_status()
            uvloop.run(soak.run(minutes, min(slice_seconds, 60 * minutes), burst, changing))
        finally:
            server.terminate()
            server.join(30)
            server.kill()
        store.check_integrity()
    ledger, growth = soak.ledger, soak.growth(minutes)
    for line, count in Counter(ledger.wrong).most_common(20):
        console.print(f"wrong, {count} times: {line}", markup=False)
    figures: dict[str, Any] = {"minutes": minutes, "rss_growth": round(growth, 4), "wrong": len(ledger.wrong)}
    figures |= {"done": dict(ledger.done), "intended_refusals": dict(ledger.intended)}
    correct = not ledger.wrong and growth < MAX_GROWTH
    tell("soak", soak.rows, correct=correct, is_check=True, figures=figures)


if __name__ == "__main__":
    typer.run(main)
