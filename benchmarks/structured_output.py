"""Structured output on the embedded base: do 500 random schemas give valid JSON, and what do they cost other requests?

Half of a batch asks for JSON of a random schema each, and the other half for free text. The same free requests then run
beside free requests in place of the others. Both cases run in each round.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import typer
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterStore
from benchmarks.last_line import tell
from benchmarks.random_schemas import random_schema
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import BASE_PRINCIPAL, ConstraintSpec, GenerateParams, GenerationResult, ServingEngine

BATCH = 32
PROMPT = "The answer in JSON:"
# Every text under a schema ends by itself before.
NEW = 400
FREE_NEW = 256
# Of dates, jsonschema refuses the year 0, which RFC 3339 has.
_FORMATS = jsonschema.FormatChecker(["ipv4", "uuid"])


def main(
    quick: Annotated[bool, typer.Option(help="48 schemas, two rounds: some ten seconds.")] = False,
    schemas: Annotated[int, typer.Option(help="Number of random schemas.")] = 500,
    rounds: Annotated[int, typer.Option(help="Rounds of the comparison.")] = 7,
    by_processor: Annotated[bool, typer.Option(help="Count seconds of processor time, not of the clock.")] = False,
) -> None:
    """Measure, print a table, then one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder) / "store")
        settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=16_384, max_sequences=BATCH)
        engine = ServingEngine(load_base("embedded"), store, settings)
        engine.start()
        try:
            rows = asyncio.run(_measure(engine, 48 if quick else schemas, 2 if quick else rounds, by_processor))
        finally:
            engine.stop()
    table = Table("case", "figures")
    for row in rows:
        table.add_row(str(row["case"]), ", ".join(f"{key} {value}" for key, value in row.items() if key != "case"))
    Console(stderr=True).print(table)
    # Where a text was invalid, the counts alone are there.
    tell("structured_output", rows, correct=rows[0]["invalid"] == 0, is_check=True)


async def _measure(engine: ServingEngine, schemas: int, rounds: int, by_processor: bool) -> list[dict[str, Any]]:
    validity = await _validity(engine, schemas)
    if validity["invalid"]:
        return [validity]
    ratios: list[float] = []
    speeds: dict[str, list[float]] = {"beside free requests": [], "beside schemas": []}
    # The first round warms up.
    for round_ in range(rounds + 1):
        plain = await _free_speed(engine, False, round_, by_processor)
        beside = await _free_speed(engine, True, round_, by_processor)
        if round_:
            speeds["beside free requests"].append(plain)
            speeds["beside schemas"].append(beside)
            ratios.append(beside / plain)
    cost = [{"case": f"free, {case}", "tokens_per_s": round(statistics.median(s), 1)} for case, s in speeds.items()]
    return [validity, *cost, {"case": "beside schemas over beside free", "ratio": round(statistics.median(ratios), 3)}]


async def _validity(engine: ServingEngine, schemas: int) -> dict[str, Any]:
    """Every schema in one stream of requests, with a free request for each."""
    room = asyncio.Semaphore(BATCH)
    counts = {"valid": 0, "cut": 0, "invalid": 0}

    async def one(seed: int) -> None:
        schema = random_schema(seed)
        async with room:
            result = await _run(engine, _constrained(seed, NEW))
        if result.finish_reason == "length":
            counts["cut"] += 1
            return
        try:
            jsonschema.validate(json.loads(result.text), schema, format_checker=_FORMATS)
            counts["valid"] += 1
        except ValueError as error:
            counts["invalid"] += 1
            Console(stderr=True).print(f"schema {seed}: {error}")
        except jsonschema.ValidationError as error:
            counts["invalid"] += 1
            Console(stderr=True).print(f"schema {seed}: {error.message}")

    async def free(seed: int) -> None:
        async with room:
            await _run(engine, _free(seed, 64))

    started = time.monotonic()
    await asyncio.gather(*(task(seed) for seed in range(schemas) for task in (one, free)))
    return {"case": "random schemas", "schemas": schemas, **counts, "seconds": round(time.monotonic() - started, 1)}


async def _free_speed(engine: ServingEngine, constrained: bool, seed: int, by_processor: bool) -> float:
    """Tokens a second of the free half of a batch; the other half runs as long as the free half."""
    stop = asyncio.Event()
    other = _constrained if constrained else _free

    async def neighbour(number: int) -> None:
        turn = 0
        while not stop.is_set():
            await _run(engine, other(1000 * seed + 100 * number + turn, FREE_NEW))
            turn += 1

    neighbours = [asyncio.create_task(neighbour(number)) for number in range(BATCH // 2)]
    # On a machine that others use too, the processor time is steadier than the wall time.
    clock = time.process_time if by_processor else time.monotonic
    started = clock()
    results = await asyncio.gather(
        *(_run(engine, _free(10_000 + seed * BATCH + number, FREE_NEW)) for number in range(BATCH // 2))
    )
    seconds = clock() - started
    stop.set()
    await asyncio.gather(*neighbours)
    return sum(len(result.token_ids) for result in results) / seconds


def _constrained(seed: int, new: int) -> GenerateParams:
    spec = ConstraintSpec("json_schema", json.dumps(random_schema(seed)))
    return GenerateParams(prompt=PROMPT, temperature=1.0, seed=seed, max_new_tokens=new, constraint=spec)


def _free(seed: int, new: int) -> GenerateParams:
    return GenerateParams(prompt=PROMPT, temperature=1.0, seed=seed, max_new_tokens=new, ignore_eos=True)


async def _run(engine: ServingEngine, params: GenerateParams) -> GenerationResult:
    return await (await engine.generate(params, BASE_PRINCIPAL)).collect()


if __name__ == "__main__":
    typer.run(main)
