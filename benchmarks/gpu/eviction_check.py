"""Adapters under constant eviction, with clients that leave and classifications beside, against requests alone."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.gpu.bases import random_bundles, store_of, tiny_base
from benchmarks.gpu.engine_check import SHAPES, is_tie
from benchmarks.gpu.engine_driver import ask_all, principal, running_engine, settled, start
from benchmarks.gpu.setting import Row, Setting
from sera_serve.base import FrozenBase
from sera_serve.engine import ClassifyResult, GenerateParams, ServingEngine

SECONDS, SMALL_SECONDS = 20.0, 1.0
SLOTS = 6
LABELS = ("no", "maybe", "yes")
# float32: a batch rounds sums in another order than a request alone.
TIE = 1e-3
PROBABILITY_TOLERANCE = 1e-3
CANCELLED_SHARE = 0.2


class Stress:
    """The load on one engine, and what came of it."""

    def __init__(self, engine: ServingEngine, generators: list[str], classifiers: list[str], small: bool) -> None:
        self._engine = engine
        self._requests = [
            GenerateParams(adapter=name, prompt=chr(97 + i % 26) * (3 + i % 60), max_new_tokens=4 if small else 24)
            for i, name in enumerate(generators)
        ]
        self._classifiers = classifiers
        self._texts = [chr(97 + i) * (2 + 5 * i) for i in range(5)]
        self.counts: Counter[str] = Counter()
        self.different: list[tuple[GenerateParams, list[int], list[int]]] = []

    def alone(self) -> None:
        """Ask for each request with nothing beside it."""
        self._want = [ask_all(self._engine, [params])[0].token_ids for params in self._requests]

        async def classify_alone() -> list[ClassifyResult]:
            return [await self._classify(name) for name in self._classifiers]

        self._want_labels = asyncio.run(classify_alone())

    async def run(self, clients: int, seconds: float) -> None:
        """Keep so many clients busy, one in eight of them with classifications."""
        deadline = time.monotonic() + seconds
        makers = [self._classifying if i % 8 == 0 else self._generating for i in range(clients)]
        await asyncio.gather(*(make(random.Random(i), deadline) for i, make in enumerate(makers)))
        await settled(self._engine)

    async def _generating(self, draw: random.Random, deadline: float) -> None:
        while time.monotonic() < deadline:
            at = draw.randrange(len(self._requests))
            params, want = self._requests[at], self._want[at]
            leave_after = draw.randrange(len(want)) if draw.random() < CANCELLED_SHARE else len(want)
            stream = await start(self._engine, params)
            got: list[int] = []
            with suppress(StopAsyncIteration):
                while len(got) < leave_after:
                    got += (await anext(stream)).token_ids
            await stream.aclose()
            self.counts["cancelled" if leave_after < len(want) else "generated"] += 1
            if got != want[: len(got)]:
                self.different.append((params, got, want[: len(got)]))

    async def _classifying(self, draw: random.Random, deadline: float) -> None:
        while time.monotonic() < deadline:
            at = draw.randrange(len(self._classifiers))
            got, want = await self._classify(self._classifiers[at]), self._want_labels[at]
            self.counts["classified"] += 1
            for mine, right in zip(got.results, want.results, strict=True):
                far = [abs(mine.probabilities[label] - right.probabilities[label]) for label in LABELS]
                self.counts["wrong classifications"] += max(far) > PROBABILITY_TOLERANCE

    async def _classify(self, name: str) -> ClassifyResult:
        return await self._engine.classify(name, self._texts, principal(name))


def check_eviction(setting: Setting) -> Iterator[Row]:
    """float32 on the tiny base, decode steps as graphs where there is a GPU: every token against the request alone."""
    base = tiny_base(setting.device, torch.float32, setting.small)
    clients, adapters = (8, 8) if setting.small else (48, 40)
    with tempfile.TemporaryDirectory() as folder:
        generators, classifiers = _publish(base, Path(folder), adapters)
        settings = {"pool_mib": 8, "max_resident": SLOTS, "kv_cache_tokens": 2048, "max_batch_tokens": 128}
        store = store_of(Path(folder), {})
        with running_engine(base, store, max_sequences=32, **settings) as engine:
            stress = Stress(engine, generators, classifiers, setting.small)
            stress.alone()
            setting.say("eviction: every request was asked alone")
            before = engine.stats()
            began = time.monotonic()
            asyncio.run(stress.run(clients, SMALL_SECONDS if setting.small else SECONDS))
            after = engine.stats()
            wrong = [case for case in stress.different if not is_tie(engine, *case, gap=TIE)]
            row = {
                "seconds": time.monotonic() - began,
                **stress.counts,
                "evictions": after.evictions - before.evictions,
                "failed_loads": sum(after.failed_loads.values()) - sum(before.failed_loads.values()),
                "ties": len(stress.different) - len(wrong),
                "wrong": len(wrong),
            }
            done = all(stress.counts[name] for name in ("generated", "cancelled", "classified"))
            right = not (wrong or stress.counts["wrong classifications"] or row["failed_loads"])
            yield row | {"correct": done and right and row["evictions"] > adapters}


def _publish(base: FrozenBase, folder: Path, count: int) -> tuple[list[str], list[str]]:
    """Generators of all shapes, and as many classifiers as there are shapes."""
    bundles = {}
    for i in range(count):
        member, only, vectors = SHAPES[i % len(SHAPES)]
        (bundles[f"acme/a{i}"],) = random_bundles(base, member, 1, strength=0.5, only=only, vectors=vectors, seed=i)
    generators = list(bundles)
    for i, (member, only, vectors) in enumerate(SHAPES):
        (bundles[f"acme/c{i}"],) = random_bundles(
            base, member, 1, strength=0.5, only=only, labels=LABELS, vectors=vectors, seed=1000 + i
        )
    store_of(folder, bundles)
    return generators, [name for name in bundles if name not in generators]
