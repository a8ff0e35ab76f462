"""Tenants that want more than their share: what it does to the others, and how service is divided."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import chain, cycle
from typing import Any

from benchmarks.http_load import Answer, LoadClient
from benchmarks.service_figures import failures, fairness, latency
from benchmarks.workload import TimedRequest, WorkloadSpec, make_trace

# Each has a share of one in TENANTS of the capacity; the victim is the last.
TENANTS, FLOOD = 10, 20
# Of the capacity, what the tenants together offer when nobody floods.
LOAD = 0.9


async def measure_flood(client: LoadClient, spec: WorkloadSpec, capacity: float) -> tuple[dict[str, Any], list[Answer]]:
    """The victim's time to the first token in four loads, each of `spec.duration` seconds; and every answer of it.

    * `alone`: the victim offers its share, nobody else anything;
    * `calm`: the other tenants offer theirs too, LOAD of the capacity in all: as busy as can be without a backlog;
    * `crowd`: the others together offer FLOOD times a share, each as much as the next;
    * `flood`: one of the others offers all of that, and the rest nothing.

    The victim's requests are the same in all four, but for the contents of the prompts, which no load finds computed
    already. The total load of the flood is that of the crowd: `ratio` tells what it costs the victim that one tenant
    offers it all, `ratio_to_calm` what it costs that there is a backlog at all.

    Args:
        client: Of a server that has at least TENANTS adapters.
        spec: Lengths, duration, seed and the first of four numbers of prompts; its rate and adapters are not used.
        capacity: Requests a second that the server can answer.
    """
    share = LOAD * capacity / TENANTS
    others = TENANTS - 1
    # How many of the other tenants offer something, and how much each.
    loads = {"alone": (0, 0.0), "calm": (others, share), "crowd": (others, FLOOD * share / others)}
    loads["flood"] = (1, FLOOD * share)
    result: dict[str, Any] = {"share_requests_per_s": round(share, 3), "flood_times_share": FLOOD}
    answers: list[Answer] = []
    for number, (name, (tenants, rate)) in enumerate(loads.items()):
        fresh = replace(spec, adapters=1, prompts=spec.prompts + number)
        busy = [_of(replace(fresh, rate=rate, seed=spec.seed + 1 + tenant), tenant) for tenant in range(tenants)]
        mine, theirs = await asyncio.gather(
            client.open_loop(_of(replace(fresh, rate=share), TENANTS - 1)), client.open_loop(chain(*busy))
        )
        result[name] = latency(mine) | {"requests": len(mine), "failures": failures(mine)}
        if theirs:
            result[name]["others"] = latency(theirs) | {"failures": failures(theirs)}
        answers += mine
    flooded = result["flood"]["ttft_p95_s"]
    for name, other in (("ratio", "crowd"), ("ratio_to_calm", "calm")):
        reference = result[other]["ttft_p95_s"]
        result[name] = round(flooded / reference, 3) if reference and flooded else None
    return result, answers


async def measure_fairness(client: LoadClient, spec: WorkloadSpec, tenants: int, clients: int) -> dict[str, Any]:
    """Service of tenants that always have requests waiting; the first has four times the clients of the others.

    Args:
        client: Of a server that has at least `tenants` adapters.
        spec: Lengths, duration and seed.
        tenants: How many; every second one sends prompts and answers half as long.
        clients: Requests under way for each; together more than the server has in a batch.
    """

    def trace(tenant: int) -> list[TimedRequest]:
        half = tenant % 2 + 1
        inputs = (spec.input_range[0], spec.input_range[1] // half)
        outputs = (spec.output_range[0], spec.output_range[1] // half)
        own = replace(spec, adapters=1, rate=20, seed=spec.seed + tenant, input_range=inputs, output_range=outputs)
        return _of(own, tenant)

    start = time.perf_counter()
    runs = [
        client.closed_loop(cycle(trace(tenant)), clients * (4 if tenant == 0 else 1), spec.duration)
        for tenant in range(tenants)
    ]
    answers = list(chain(*await asyncio.gather(*runs)))
    # Not the beginning, before every tenant has requests waiting.
    return fairness(answers, start + spec.duration / 4, start + spec.duration)


def _of(spec: WorkloadSpec, tenant: int) -> list[TimedRequest]:
    return [replace(request, adapter=tenant) for request in make_trace(spec)]
