"""What a cold adapter costs: its first token against that of a resident one, on an idle server."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from adapters_store import AdapterStore
from benchmarks.fleet import Fleet
from benchmarks.http_load import Answer, LoadClient
from benchmarks.workload import TimedRequest

# A new token more than the first, so that the stream is like any other.
PROMPT, NEW_TOKENS = 32, 2


def cold_name(index: int) -> str:
    """Tenants apart from those of the load."""
    return f"cold/a{index:04d}"


def publish_cold(fleet: Fleet, folder: Path, pairs: int) -> int:
    """Add `pairs` + 1 adapters of the fleet to a store, on the disk and not in its cache; returns the bytes of one."""
    store = AdapterStore(folder)
    bundles = [fleet.bundle(index) for index in range(pairs + 1)]
    for index, bundle in enumerate(bundles):
        store.publish(bundle, cold_name(index))
    for path in (folder / "bundles").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return bundles[0].nbytes


async def measure_cold_start(host: str, port: int, pairs: int) -> tuple[dict[str, Any], list[Answer]]:
    """Ask for an adapter that is resident, then for one that never was, in turn; and the answers, to be checked.

    Returns:
        Medians of both, and the median of the differences of each pair, seconds.
    """
    client = LoadClient(host, port, cold_name)

    def request(adapter: int, number: int) -> TimedRequest:
        return TimedRequest(0.0, adapter, tuple(range(100 + number, 100 + number + PROMPT)), NEW_TOKENS)

    answers = [await client.ask(request(0, 0))]
    for index in range(pairs):
        answers.append(await client.ask(request(index, 2 * index + 1)))
        answers.append(await client.ask(request(index + 1, 2 * index + 2)))
    if not all(answer.times for answer in answers):
        return {"pairs": 0}, answers
    resident = [answer.ttft for answer in answers[1::2]]
    cold = [answer.ttft for answer in answers[2::2]]
    return {
        "pairs": pairs,
        "resident_s": round(statistics.median(resident), 5),
        "cold_s": round(statistics.median(cold), 5),
        "difference_s": round(statistics.median(c - r for c, r in zip(cold, resident, strict=True)), 5),
    }, answers
