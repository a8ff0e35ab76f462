"""Classification passes on an engine: how long one takes, and what generation loses beside them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import count

from benchmarks.gpu.engine_driver import collect, principal, settled
from benchmarks.gpu.setting import Row, Setting
from sera_serve.engine import GenerateParams, ServingEngine

REPEATS = 6
LENGTH = 30


def _texts(turn: int, rows: int) -> list[list[int]]:
    return [[(31 * turn + 37 * row + place * place) % 250 for place in range(LENGTH)] for row in range(rows)]


async def _embed(engine: ServingEngine, turn: int, rows: int, adapters: Sequence[str | None]) -> None:
    """One pass: rows for each of some adapters."""
    calls = (engine.embed(name, _texts(turn, rows), principal(name)) for name in adapters)
    await asyncio.gather(*calls)


def time_passes(setting: Setting, engine: ServingEngine, mode: str, adapters: Sequence[str]) -> Iterator[Row]:
    """Milliseconds from call to vectors with nothing else running; the first of each case may compile and capture.

    With adapters of generation, passes would be watched for overflows, and would be no graphs: they are classifiers.
    """
    many = len(adapters)
    cases: dict[str, tuple[int, Sequence[str | None]]] = {
        "base, 1 text": (1, [None]),
        "adapter, 1 text": (1, adapters[:1]),
        f"adapter, {many} texts": (many, adapters[:1]),
        f"{many} texts of {many} adapters": (1, adapters),
    }

    async def times() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {case: [] for case in cases}
        for turn in range(1 + (1 if setting.small else REPEATS)):
            for case, (rows, names) in cases.items():
                began = time.perf_counter()
                await _embed(engine, turn, rows, names)
                found[case].append((time.perf_counter() - began) * 1e3)
        await settled(engine)
        return found

    for case, taken in asyncio.run(times()).items():
        yield {"mode": mode, "pass": case, "first_ms": taken[0], "median_ms": statistics.median(taken[1:])}


def time_beside(engine: ServingEngine, mode: str, adapters: Sequence[str], classifier: str, new: int) -> Iterator[Row]:
    """A token of each of many generations, alone and while one client after another asks for a vector."""
    runner = engine.runners["generate"]

    async def generate(turn: int, clients: int) -> Row:
        steps, passes, is_over = runner.steps, 0, False  # type: ignore[attr-defined]

        async def ask() -> None:
            nonlocal passes
            for number in count():
                if is_over:
                    return
                await _embed(engine, turn + number, 1, [classifier])
                passes += 1

        began = time.perf_counter()
        asking = [asyncio.create_task(ask()) for _ in range(clients)]
        tokens = ([(turn + 41 * place + at * at) % 250 for at in range(LENGTH)] for place in range(len(adapters)))
        asked = [
            GenerateParams(token_ids=own, max_new_tokens=new, adapter=name)
            for own, name in zip(tokens, adapters, strict=True)
        ]
        await asyncio.gather(*(collect(engine, params) for params in asked))
        seconds, is_over = time.perf_counter() - began, True
        steps = runner.steps - steps  # type: ignore[attr-defined]
        await asyncio.gather(*asking)
        await settled(engine)
        return {
            "mode": mode,
            "clients": clients,
            "ms_per_step": seconds / steps * 1e3,
            "passes_per_s": passes / seconds,
        }

    for turn, clients in enumerate((0, 1, 8)):
        yield asyncio.run(generate(7000 + turn, clients))
