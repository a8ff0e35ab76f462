"""The engine on a base of Llama-3-8B's shape: tokens a second, and how long the first token of a request takes."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bases import large_base, random_bundles, store_of
from benchmarks.gpu.engine_check import MODES
from benchmarks.gpu.engine_driver import ask_all, running_engine, settled, start
from benchmarks.gpu.operands import Member
from benchmarks.gpu.pass_time import time_beside, time_passes
from benchmarks.gpu.setting import Row, Setting
from sera_serve.engine import GenerateParams, ServingEngine

MEMBER = Member(64, 64)
SEQUENCES = 64
PROMPT = 32
COLD = 9
CLASSIFIERS = 32
# Of each mode, after one round that loads the adapters and compiles.
ROUNDS = {"eager": 1, "graphs": 3}


def time_engine(setting: Setting) -> Iterator[Row]:
    """64 sequences at once of the base model, of one adapter, and of 64 adapters, in both modes.

    With graphs also of 64 adapters where tokens are chosen from the graph's logits: of one request, and of all. Then
    classification passes, and with graphs generation beside them.
    """
    began = time.monotonic()
    base = large_base(setting, setting.layers)
    sequences = 4 if setting.small else SEQUENCES
    cold, classifiers = (2, 2) if setting.small else (COLD, CLASSIFIERS)
    new = 6 if setting.small else 64
    member = Member(8, 8) if setting.small else MEMBER
    made = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bundles = random_bundles(base, member, sequences + cold)
        named = {f"acme/a{i}": bundle for i, bundle in enumerate(bundles)}
        labelled = random_bundles(base, member, classifiers, labels=("no", "yes"))
        store = store_of(Path(folder), named | {f"acme/c{i}": bundle for i, bundle in enumerate(labelled)})
        yield {"base_s": made - began, "publish_s": time.monotonic() - made, "layers": setting.layers}
        settings = {
            "pool_mib": 16 if setting.small else 1024,
            "max_resident": 2 * sequences,
            "kv_cache_tokens": sequences * 256,
            "max_batch_tokens": 2048,
            "max_sequences": sequences,
        }
        # Graphs first: time may not be enough for the other mode.
        for mode in reversed(MODES):
            began = time.monotonic()
            if setting.on_gpu:
                # The base was made in float32, which took more than any engine does.
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with running_engine(base, store, cuda_graphs=MODES[mode], **settings) as engine:
                yield {"mode": mode, "start_s": time.monotonic() - began}
                yield from _throughput(setting, engine, mode, sequences, new)
                own = [f"acme/a{i}" for i in range(sequences)]
                yield from time_passes(setting, engine, mode, [f"acme/c{i}" for i in range(classifiers)])
                if mode == "graphs":
                    yield from time_beside(engine, mode, own, "acme/c0", new)
                    yield from _first_tokens(setting, engine, sequences, cold)
            if setting.on_gpu:
                peaks = {
                    "peak_gib": torch.cuda.max_memory_allocated(),
                    "reserved_gib": torch.cuda.max_memory_reserved(),
                }
                yield {"mode": mode} | {name: nbytes / (1 << 30) for name, nbytes in peaks.items()}


def _ask(turn: int, i: int, new: int, adapter: str | None, length: int = PROMPT, **options: Any) -> GenerateParams:
    """Prompts that no request before had: their pages are not cached."""
    tokens = [(7919 * turn + 37 * i + p * p) % 250 for p in range(length)]
    return GenerateParams(token_ids=tokens, max_new_tokens=new, adapter=adapter, **options)


def _throughput(setting: Setting, engine: ServingEngine, mode: str, sequences: int, new: int) -> Iterator[Row]:
    own = [f"acme/a{i}" for i in range(sequences)]
    # The adapters, how many requests have options, and these.
    cases: dict[str, tuple[Sequence[str | None], int, dict[str, Any]]] = {
        "base": ([None] * sequences, 0, {}),
        "1 adapter": (["acme/a0"] * sequences, 0, {}),
        "own adapters": (own, 0, {}),
    }
    if mode == "graphs":
        cases |= {
            "own adapters, one penalty": (own, 1, {"frequency_penalty": 0.5}),
            "own adapters, all penalties": (own, sequences, {"frequency_penalty": 0.5}),
            "own adapters, all log-probabilities": (own, sequences, {"logprobs": 1}),
        }
    runner = engine.runners["generate"]
    turn = 0
    for rounds in range(1 + (1 if setting.small else ROUNDS[mode])):
        for name, (adapters, count, options) in cases.items():
            turn += 1
            wanted = new if rounds else 4
            batch = [
                _ask(turn, i, wanted, adapter, **(options if i < count else {})) for i, adapter in enumerate(adapters)
            ]
            steps = runner.steps  # type: ignore[attr-defined]
            began = time.perf_counter()
            results = ask_all(engine, batch)
            seconds = time.perf_counter() - began
            steps = runner.steps - steps  # type: ignore[attr-defined]
            row = {"mode": mode, "case": name, "round": rounds, "seconds": seconds, "steps": steps}
            tokens = sum(len(result.token_ids) for result in results)
            yield row | {"tokens_per_s": tokens / seconds, "ms_per_step": seconds / steps * 1e3}


def _first_tokens(setting: Setting, engine: ServingEngine, sequences: int, cold: int) -> Iterator[Row]:
    """Milliseconds from a request to its first token, with nothing else running."""
    resident = ["acme/a0"] * cold
    none: list[str | None] = [None] * cold
    # The longest prompts that run in graphs, and some that do not.
    lengths = (8, 40) if setting.small else (256, 512, 520, 2048)
    cases: dict[str, tuple[int, Sequence[str | None]]] = {
        "base": (PROMPT, none),
        "resident adapter": (PROMPT, resident),
        "cold adapter": (PROMPT, [f"acme/a{sequences + i}" for i in range(cold)]),
    }
    for length in lengths:
        cases |= {f"base, prompt of {length}": (length, none)}
        cases |= {f"resident adapter, prompt of {length}": (length, resident)}

    async def first_token(turn: int, length: int, adapter: str | None) -> float:
        began = time.perf_counter()
        stream = await start(engine, _ask(turn, turn, 2, adapter, length))
        await anext(stream)
        seconds = time.perf_counter() - began
        await stream.aclose()
        await settled(engine)
        return seconds * 1e3

    async def times_of(place: int, length: int, adapters: Sequence[str | None]) -> list[float]:
        return [await first_token(1000 + 100 * place + i, length, name) for i, name in enumerate(adapters)]

    for place, (case, (length, adapters)) in enumerate(cases.items()):
        # The first of a kind may compile.
        times = asyncio.run(times_of(place, length, adapters))[1:]
        yield {"first_token": case, "median_ms": statistics.median(times), "most_ms": max(times), "of": len(times)}
