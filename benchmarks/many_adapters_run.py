"""One run of many_adapters: how much is measured, the servers, the load on them, and what was found wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from rich.console import Console

from benchmarks.cold_start import measure_cold_start, publish_cold
from benchmarks.fleet import MEGABYTE, SHAPES, Fleet, adapter_name, save_endless_base
from benchmarks.flood import measure_fairness, measure_flood
from benchmarks.http_load import Answer, LoadClient
from benchmarks.peft_swap import PeftSwap
from benchmarks.reference import wrong_answers
from benchmarks.server_process import ServerProcess, Surroundings, adapter_figures
from benchmarks.service_figures import failures, latency, rates, span
from benchmarks.workload import TimedRequest, WorkloadSpec, make_trace

OWN = "sera-serve"
# A flood opens more than a server allows one address by default.
_CONNECTIONS = 4096
# What another checkout runs to make stores: a base, a folder, and sizes. Its fleet is made of the same random numbers.
_PUBLISH = """
import sys
from pathlib import Path
import torch
from benchmarks.fleet import Fleet
from sera_serve.base import load_base
base = load_base(sys.argv[1])
torch.manual_seed(0)
fleet = Fleet(base)
for size in sys.argv[3:]:
    fleet.publish(Path(sys.argv[2]) / f"store-{size}", int(size))
"""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: Registered adapters of each server.
        resident: The most adapters on a device.
        host_cache_mib: The server's default, less than the largest fleet takes: all three tiers are at work.
        clients: Requests under way at saturation.
        sequences: The most in a batch; fewer than the clients of the fairness run.
        load: Offered rate of the open loop, as a share of the smallest server's capacity.
        rounds: Of each server; at 5 adapters each round has another one of them as the most popular.
        open_s, saturated_s: Seconds of each round.
        flood_s: Seconds of each load of the flood.
        pairs: Of a cold and a resident adapter.
        peft_requests: How much of the trace PEFT gets.
        checked: Answers of each load that are checked.
        width: Of a larger base, see `save_endless_base`; the embedded one if None.
        touch: Ask each adapter once before, as if the server had been up for long; else most loads are first ones.
    """

    sizes: tuple[int, ...] = (5, 100, 1000, 5000)
    resident: int = 200
    host_cache_mib: int = 1024
    clients: int = 48
    sequences: int = 64
    load: float = 0.8
    rounds: int = 5
    open_s: float = 10
    saturated_s: float = 8
    flood_s: float = 20
    pairs: int = 30
    peft_requests: int = 40
    checked: int = 8
    width: int | None = None
    touch: bool = False


class Served(NamedTuple):
    """A server of one run.

    Attributes:
        system: Whose code it runs.
        size: How many adapters are registered.
    """

    system: str
    size: int


class ManyAdapters:
    """One run: servers, the load on them, and what was found wrong."""

    def __init__(self, plan: Plan, folder: Path, alpha: float, console: Console) -> None:
        """Publish the fleets under `folder`; the servers are started by `run`."""
        self.plan = plan
        self.alpha = alpha
        self.wrong: list[str] = []
        self.ttfts: dict[str, list[float]] = {}
        self._folder = folder
        self._console = console
        # Every load has prompts of its own: one that had those of another would find them computed.
        self._prompts = count()
        self.base = save_endless_base(folder / "base", plan.width)
        self._fleet = Fleet(self.base)
        self._cold = Fleet(self.base, (MEGABYTE,))
        begun = time.perf_counter()
        for size in plan.sizes:
            self._fleet.publish(folder / f"store-{size}", size)
        seconds = time.perf_counter() - begun
        console.print(f"{sum(plan.sizes)} adapters published, {1000 * seconds / sum(plan.sizes):.1f} ms each")
        self.cold_bytes = publish_cold(self._cold, folder / f"store-{plan.sizes[0]}", plan.pairs)

    def run(self) -> dict[str, Any]:
        """Measure everything; `rows` and `figures` are only right if `wrong` stays empty."""
        plan = self.plan
        with ExitStack() as stack:
            servers = {size: stack.enter_context(self._server(size)) for size in plan.sizes}
            for server in servers.values():
                server.wait_until_ready()
            for size, server in servers.items():
                self._check_first(size, server)
            if self.wrong:
                return {}
            smallest = servers[plan.sizes[0]]
            if plan.touch:
                for size, server in servers.items():
                    self._touch(size, server)
            capacity = self._capacity(smallest)
            if self.wrong:
                return {}
            rows = self._rounds({Served(OWN, size): server for size, server in servers.items()}, capacity)
            figures = self._figures(rows) | {"capacity_requests_per_s": capacity}
            figures["cold_start"], answers = uvloop.run(measure_cold_start(smallest.host, smallest.port, plan.pairs))
            figures["cold_start"]["adapter_bytes"] = self.cold_bytes
            self.wrong += wrong_answers(self._cold, answers[:: max(1, len(answers) // plan.checked)])
            busy = servers[next(size for size in plan.sizes if size >= 10)]
            client = LoadClient(busy.host, busy.port, adapter_name)
            spec = replace(self._spec(10, 1, 0), duration=plan.flood_s)
            figures["flood"], answers = uvloop.run(measure_flood(client, spec, capacity))
            self.wrong += wrong_answers(self._fleet, random.Random(1).sample(answers, min(plan.checked, len(answers))))
            spec = replace(self._spec(10, 1, 1000), duration=plan.flood_s)
            figures["fairness"] = uvloop.run(measure_fairness(client, spec, 8, max(2, plan.sequences // 5)))
            for size, server in servers.items():
                cached = server.metrics().get('sera_tokens_total{kind="cached_prompt"}', 0.0)
                if cached:
                    self.wrong.append(f"{cached:.0f} prompt tokens of the server of {size} were computed before")
        rows += self._peft(plan.load * capacity)
        return {"rows": rows, "figures": figures}

    def compare(self, checkout: Path) -> dict[str, Any]:
        """The rounds alone, of servers of this code and of another checkout's side by side; as `run`.

        Args:
            checkout: A repository. Its own code makes its stores, whose format may be another.
        """
        plan = self.plan
        theirs = self._folder / "theirs"
        self._console.print(f"{checkout} publishes its adapters")
        paths = [str(checkout), str(checkout / "kernels")]
        command = [sys.executable, "-P", "-c", _PUBLISH, str(self._folder / "base"), str(theirs)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([*command, *map(str, plan.sizes)], env=environment, check=True)
        with ExitStack() as stack:
            servers = {}
            for size in plan.sizes:
                servers[Served(OWN, size)] = stack.enter_context(self._server(size))
                around = Surroundings(checkout)
                servers[Served(checkout.name, size)] = stack.enter_context(self._server(size, theirs, around))
            for served, server in servers.items():
                server.wait_until_ready()
                self._check_first(served.size, server)
                if plan.touch:
                    self._touch(served.size, server)
            if self.wrong:
                return {}
            rows = self._rounds(servers, self._capacity(servers[Served(OWN, plan.sizes[0])]))
        # Of each size, this code's and the other's.
        pairs = zip(rows[::2], rows[1::2], strict=True)
        return {"rows": rows, "figures": {str(own["adapters"]): _ratios(own, other) for own, other in pairs}}

    def _server(self, size: int, stores: Path | None = None, around: Surroundings | None = None) -> ServerProcess:
        settings = {
            "max_resident": self.plan.resident,
            "host_cache_mib": self.plan.host_cache_mib,
            "max_sequences": self.plan.sequences,
            # The other core is the clients' and the loaders': threads that share theirs wait for each other.
            "cpu_threads": 1,
        }
        if around is None:
            # All clients have one address. Another checkout may not know these.
            settings |= {"max_connections": _CONNECTIONS, "max_connections_per_address": _CONNECTIONS}
        folder = stores or self._folder
        return ServerProcess(
            self._folder / "base", folder / f"store-{size}", folder / f"server-{size}.log", around, **settings
        )

    def _spec(self, size: int, rate: float, number: int) -> WorkloadSpec:
        rotation, seed = number % len(SHAPES), 42 + number
        return WorkloadSpec(
            size, rate, self.plan.open_s, self.alpha, rotation=rotation, seed=seed, prompts=next(self._prompts)
        )

    def _check_first(self, size: int, server: ServerProcess) -> None:
        """One adapter of every shape, among the first and the last of the fleet, all in one batch."""
        trace = make_trace(replace(self._spec(size, 1000, 0), duration=0.01))
        indices = [*range(len(SHAPES)), *range(size - len(SHAPES), size)]
        client = LoadClient(server.host, server.port, adapter_name)
        requests = [replace(request, adapter=index) for request, index in zip(trace, indices, strict=True)]
        self.wrong += wrong_answers(self._fleet, uvloop.run(client.open_loop(requests)))

    def _touch(self, size: int, server: ServerProcess) -> None:
        client = LoadClient(server.host, server.port, adapter_name)
        requests = [TimedRequest(0.0, index, (5, 6, 7), 1) for index in range(size)]
        answers = uvloop.run(client.closed_loop(requests, self.plan.clients, 600))
        self._check(answers, answers)

    def _saturate(self, server: ServerProcess, size: int, number: int, seconds: float) -> dict[str, float]:
        """Requests and tokens a second with always as many under way; the first quarter is not counted."""
        client = LoadClient(server.host, server.port, adapter_name)
        trace = make_trace(self._spec(size, 100, number))
        start = time.perf_counter()
        answers = uvloop.run(client.closed_loop(cycle(trace), self.plan.clients, seconds))
        self._check(answers, [answer for answer in answers if answer.complete])
        return rates(answers, start + seconds / 4, start + seconds)

    def _capacity(self, server: ServerProcess) -> float:
        """Requests a second that the smallest server answers at saturation, measured as in the rounds to come.

        The first time is of a server that still compiles and loads, and does not count.
        """
        size, seconds = self.plan.sizes[0], self.plan.saturated_s
        rounds = [self._saturate(server, size, number, seconds) for number in (0, *range(self.plan.rounds))][1:]
        capacity = sum(figures["requests_per_s"] for figures in rounds) / len(rounds)
        self._console.print(f"capacity at {size} adapters: {capacity:.2f} requests a second")
        # Should no request at all have ended, on a machine that is busy with other work: one.
        return round(max(capacity, 1 / seconds), 2)

    def _rounds(self, servers: dict[Served, ServerProcess], capacity: float) -> list[dict[str, Any]]:
        rate = self.plan.load * capacity
        opened: dict[Served, list[list[Answer]]] = {served: [] for served in servers}
        saturated: dict[Served, list[dict[str, float]]] = {served: [] for served in servers}
        metrics = {served: server.metrics() for served, server in servers.items()}
        tiers: dict[Served, dict[str, float | None]] = {}
        for number in range(self.plan.rounds):
            # Every second round backwards: none always comes after the same one.
            turns = list(servers.items())[:: -1 if number % 2 else 1]
            for served, server in turns:
                client = LoadClient(server.host, server.port, adapter_name)
                answers = uvloop.run(client.open_loop(make_trace(self._spec(served.size, rate, number))))
                self._check(answers, answers)
                opened[served].append(answers)
            for served, server in turns:
                tiers[served] = adapter_figures(metrics[served], server.metrics())
            for served, server in turns:
                saturated[served].append(self._saturate(server, served.size, number, self.plan.saturated_s))
        return [self._row(served, opened[served], saturated[served], tiers[served]) for served in servers]

    def _row(
        self,
        served: Served,
        rounds: list[list[Answer]],
        saturated: list[dict[str, float]],
        tiers: dict[str, float | None],
    ) -> dict[str, Any]:
        everything = [answer for answers in rounds for answer in answers]
        name = f"{served.size:,} adapters" if served.system == OWN else f"{served.size:,} adapters, {served.system}"
        self.ttfts[name] = [answer.ttft for answer in everything if answer.times]
        each = [rates(answers, *span(answers)) for answers in rounds]
        row: dict[str, Any] = {"system": served.system, "adapters": served.size}
        row |= {key: round(sum(r[key] for r in each) / len(each), 2) for key in ("requests_per_s", "tokens_per_s")}
        row |= latency(everything) | tiers | {"requests": len(everything), "failures": failures(everything)}
        row |= {f"saturated_{key}": round(sum(r[key] for r in saturated) / len(saturated), 2) for key in saturated[0]}
        row["saturated_rounds"] = [round(r["tokens_per_s"], 1) for r in saturated]
        row["client_late_p99_s"] = sorted(a.sent - a.due for a in everything)[int(0.99 * len(everything))]
        return row

    def _check(self, answers: list[Answer], ended: list[Answer]) -> None:
        """Answers that came at all must be right; a sample of them is compared with the reference."""
        self.wrong += [f"{a.adapter}: {a.status} {a.error}" for a in answers if a.status not in (200, 429, 503, 0)]
        begun = [answer for answer in ended if answer.status == 200]
        chosen = random.Random(len(answers)).sample(begun, min(self.plan.checked, len(begun)))
        self.wrong += wrong_answers(self._fleet, chosen)

    @staticmethod
    def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {f"{name}_ratio": ratio for name, ratio in _ratios(rows[-1], rows[0]).items()}

    def _peft(self, rate: float) -> list[dict[str, Any]]:
        """Rows of the baseline on the fewest and on the most adapters."""
        rows = []
        for size in dict.fromkeys((self.plan.sizes[0], self.plan.sizes[-1])):
            trace = make_trace(self._spec(size, rate, 0))[: self.plan.peft_requests]
            used = {request.adapter for request in trace}
            peft = PeftSwap(self.base, self._folder / f"peft-{size}", used, self.plan.resident)
            answers = peft.run(trace)
            self.wrong += [f"PEFT, {answer.adapter}" for answer in answers if not answer.right_length]
            self.ttfts[f"PEFT, {size:,} adapters"] = [answer.ttft for answer in answers]
            row = {"system": "peft-swap", "adapters": size} | rates(answers, *span(answers)) | latency(answers)
            rows.append(row | {"hit_rate": round(1 - len(used) / len(trace), 4), "requests": len(trace)})
        return rows


def _ratios(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Figures of one row over those of another."""
    compared = {"throughput": "saturated_tokens_per_s", "ttft_p50": "ttft_p50_s", "ttft_p99": "ttft_p99_s"}
    return {
        name: round(row[key] / other[key], 3) if other[key] and row[key] else None for name, key in compared.items()
    }
