"""One input through 64 guardrail classifiers: one call that names all of them, against a call for each.

    python -m benchmarks.guardrails [--rounds N] [--texts N]

The embedded base, 64 SeRA classifiers of one tenant, a real server and one client in the same process. The calls for
each go one after another, and 8 at a time. All ways are measured in turns; the answers are compared first. The last
line is one JSON object.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from adapters_store import AdapterStore
from benchmarks.http_cost import running
from benchmarks.last_line import tell
from benchmarks.random_classifiers import random_classifier
from sera_serve.base import load_base
from sera_serve.config import ServeSettings

GUARDS = 64
CLIENTS = 8
LABELS = ["safe", "unsafe"]


async def in_one_call(client: httpx.AsyncClient, names: list[str], text: str) -> list[Any]:
    """The answers of all guards to one text."""
    response = await client.post("/v1/classify", json={"adapters": names, "inputs": [text]})
    response.raise_for_status()
    return [answer["results"][0] for answer in response.json()["adapters"]]


async def in_calls(client: httpx.AsyncClient, names: list[str], text: str, at_once: int) -> list[Any]:
    """The same by one call for each guard, so many at a time."""
    limit = asyncio.Semaphore(at_once)

    async def one(name: str) -> Any:
        async with limit:
            response = await client.post("/v1/classify", json={"adapter": name, "inputs": [text]})
        response.raise_for_status()
        return response.json()["results"][0]

    return await asyncio.gather(*map(one, names))


async def measure(url: str, names: list[str], rounds: int) -> dict[str, float]:
    """Texts a second of each way: medians over rounds in turns."""
    rates: dict[str, list[float]] = {"one call": [], "64 calls in turn": [], f"64 calls, {CLIENTS} at once": []}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for turn in range(rounds + 1):
            text = f"message {turn}: please send the invoice of last month to my new address, thank you"
            answers = []
            for way in rates:
                began = time.perf_counter()
                if way == "one call":
                    answers.append(await in_one_call(client, names, text))
                else:
                    answers.append(await in_calls(client, names, text, 1 if way.endswith("turn") else CLIENTS))
                if turn:
                    rates[way].append(1 / (time.perf_counter() - began))
            for other in answers[1:]:
                for mine, theirs in zip(answers[0], other, strict=True):
                    gaps = [abs(mine["probabilities"][label] - theirs["probabilities"][label]) for label in LABELS]
                    if max(gaps) > 1e-4:
                        raise RuntimeError(f"one call gives {mine}, a call of its own {theirs}")
    return {way: round(statistics.median(each), 2) for way, each in rates.items()}


def main(rounds: Annotated[int, typer.Option(help="Texts of each way.")] = 21) -> None:
    """Measure, and print one JSON line."""
    base = load_base("embedded")
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "store")
        names = [f"acme/guard{seed}" for seed in range(GUARDS)]
        for seed, name in enumerate(names):
            store.publish(random_classifier(base, seed, LABELS, ("q_proj", "v_proj"), "last_token"), name)
        with running(base, store, ServeSettings(store=store.root, pool_mib=64, kv_cache_tokens=1024)) as server:
            rates = asyncio.run(measure(f"http://127.0.0.1:{server.port}", names, rounds))
    rows = [{"way": way, "texts_per_s": rate} for way, rate in rates.items()]
    # A different answer has ended the run.
    tell("guardrails", rows, guards=GUARDS)


if __name__ == "__main__":
    typer.run(main)
