"""The engine token for token: on the CPU, on the GPU step by step, and on the GPU with decode steps as graphs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters_store import AdapterStore
from benchmarks.gpu.bases import random_bundles, store_of, tiny_base
from benchmarks.gpu.engine_driver import ask_all, principal, running_engine, settled
from benchmarks.gpu.operands import Member
from benchmarks.gpu.setting import Row, Setting
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine

# One after the other: all layers, LoRA on two, SeRA of segments of four on three, and a gain and an offset on five.
SHAPES: tuple[tuple[Member, tuple[str, ...], bool], ...] = (
    (Member(16, 16), (), False),
    (Member(8, 1, False), ("q_proj", "v_proj"), False),
    (Member(16, 4), ("k_proj", "o_proj", "down_proj"), False),
    (Member(16, 16), ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), True),
)
NAMES = [f"acme/a{i}" for i in range(6)]
# One of each shape, for passes: those of adapters of generation are watched for overflows, and no graph can be.
CLASSIFIERS = [f"acme/c{i}" for i in range(len(SHAPES))]
# Fewer slots than adapters: they are evicted and loaded again meanwhile.
SLOTS = 3
MODES = {"eager": False, "graphs": True}
# Two tokens whose log-probabilities differ by less may change places in bfloat16, where a batch computes its matrix
# products in another order than a request alone: logits of size 8 to 16 are multiples of 1/16.
TIE = 0.2
# Of the numbers of a vector of length 1, in float32: a GPU adds in another order.
VECTOR_TOLERANCE = 1e-3


def check_engine(setting: Setting, part: str) -> Iterator[Row]:
    """Check a part, a dtype and a mode such as "float32 graphs".

    float32 is checked against the CPU. Of other dtypes, every request of a batch is checked against the request alone.
    """
    dtype, mode = part.split()
    check = _against_cpu if dtype == "float32" else _against_solo
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_base(setting.device, getattr(torch, dtype), setting.small)
        yield from check(setting, base, tiny_store(base, Path(folder)), mode)


def tiny_store(base: FrozenBase, folder: Path) -> AdapterStore:
    """Six adapters of four shapes, and a classifier of each."""
    bundles = {}
    for i, name in enumerate([*NAMES, *CLASSIFIERS]):
        member, only, vectors = SHAPES[i % len(SHAPES)]
        labels = ("no", "yes") if name in CLASSIFIERS else ()
        (bundles[name],) = random_bundles(
            base, member, 1, strength=0.5, only=only, labels=labels, vectors=vectors, seed=i
        )
    return store_of(folder, bundles)


def batches(small: bool) -> dict[str, list[GenerateParams]]:
    """Greedy and sampled requests, of the base model and of all adapters, with prompts of 1 to 200 tokens.

    Some tokens of one batch are chosen from a graph's logits. And single ones that a graph holds alone, with more
    tokens than have programs of their own.
    """

    def ask(i: int, adapter: str | None = None, length: int | None = None, **options: Any) -> GenerateParams:
        length = length or 1 + i * 37 % (20 if small else 200)
        prompt = "".join(chr(97 + (i + p * p) % 26) for p in range(length))
        new = 4 + i % 3 if small else 20 + i % 9
        return GenerateParams(adapter=adapter, prompt=prompt, max_new_tokens=new, **options)

    least = 7 if small else 30
    long = (40, 50) if small else (300, 500)
    chosen: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 2},
        {"logit_bias": {101: 3.0}, "min_tokens": 3, "temperature": 0.8},
    ]
    return {
        "base": [ask(i) for i in range(7)],
        "adapters": [ask(i, [*NAMES, None][i % 7]) for i in range(least)],
        "sampled": [ask(i, NAMES[i % 6], temperature=0.8, seed=i) for i in range(9)],
        "limited": [ask(i, NAMES[i % 3], temperature=1.0, top_k=30, top_p=0.8, seed=i) for i in range(11)],
        "chosen": [ask(i, NAMES[i % 3], seed=i, **chosen[i % 4]) for i in range(9)],
        "long": [ask(1, length=long[0])],
        "long, adapter": [ask(2, NAMES[0], length=long[1])],
    }


def settings(small: bool) -> dict[str, int]:
    """Of the engines: few slots, and a cache that cannot hold all requests at once."""
    return {
        "pool_mib": 8,
        "max_resident": SLOTS,
        "kv_cache_tokens": 1024 if small else 2048,
        "max_batch_tokens": 64 if small else 512,
        "max_sequences": 32,
    }


def _against_cpu(setting: Setting, base: FrozenBase, store: AdapterStore, mode: str) -> Iterator[Row]:
    asked = batches(setting.small)
    reference = tiny_base(torch.device("cpu"), torch.float32, setting.small)
    with running_engine(reference, store, **settings(setting.small)) as engine:
        want = {name: ask_all(engine, batch) for name, batch in asked.items()}
        vectors = _vectors(engine)
    started = time.monotonic()
    with running_engine(base, store, cuda_graphs=MODES[mode], **settings(setting.small)) as engine:
        setting.say(f"engine, {mode}: started in {time.monotonic() - started:.1f} s")
        yield _graphs(setting, engine, mode)
        for name, batch in asked.items():
            got = ask_all(engine, batch)
            equal = [a.token_ids == b.token_ids for a, b in zip(got, want[name], strict=True)]
            row = {"mode": mode, "batch": name, "correct": all(equal), "equal": sum(equal), "of": len(equal)}
            yield row | {"first_differences": _first_differences(got, want[name])}
        yield _passes(engine, _vectors(engine), vectors, mode)
        yield _evictions(engine, mode)


def _against_solo(setting: Setting, base: FrozenBase, store: AdapterStore, mode: str) -> Iterator[Row]:
    asked = batches(setting.small)
    with running_engine(base, store, cuda_graphs=MODES[mode], **settings(setting.small)) as engine:
        yield _graphs(setting, engine, mode)
        for name in ("adapters", "limited"):
            batch = asked[name][: 4 if setting.small else 12]
            got = ask_all(engine, asked[name])[: len(batch)]
            alone = [ask_all(engine, [params])[0] for params in batch]
            equal, right = [], []
            for params, mine, solo in zip(batch, got, alone, strict=True):
                equal.append(mine.token_ids == solo.token_ids)
                # A sampled token also depends on noise; of these the number that differ is reported alone.
                is_sampled = params.temperature > 0
                right.append(equal[-1] or is_sampled or is_tie(engine, params, mine.token_ids, solo.token_ids))
            row = {"mode": mode, "batch": name, "correct": all(right), "equal": sum(equal), "of": len(equal)}
            yield row | {"first_differences": _first_differences(got, alone)}
        yield _evictions(engine, mode)


def is_tie(engine: ServingEngine, params: GenerateParams, mine: list[int], solo: list[int], gap: float = TIE) -> bool:
    """Whether two greedy answers part where both tokens are equally likely but for `gap`. Nothing may be in flight."""
    at = _first_difference(mine, solo)
    if at < 0 or at >= min(len(mine), len(solo)):
        return False
    prompt = engine.base.preprocessor.prompt(params.prompt, params.token_ids) + solo[:at]
    scores = []
    for token in (mine[at], solo[at]):
        asked = GenerateParams(
            adapter=params.adapter, token_ids=[*prompt, token], max_new_tokens=1, prompt_logprobs=1, logprobs=1
        )
        scores.append(ask_all(engine, [asked])[0].prompt_logprobs[-1].logprob)
    return None not in scores and abs(scores[0] - scores[1]) < gap  # type: ignore[operator]


def _graphs(setting: Setting, engine: ServingEngine, mode: str) -> Row:
    """Whether steps run as graphs where they are to: an engine that cannot capture them goes on without."""
    steps = engine.runners["generate"].runner.static is not None  # type: ignore[attr-defined]
    passes = engine.runners["classify"].graphs is not None  # type: ignore[attr-defined]
    return {"mode": mode, "batch": "graphs", "correct": steps == passes == (MODES[mode] and setting.on_gpu)}


def _vectors(engine: ServingEngine) -> list[NDArray[np.float32]]:
    """Vectors of texts of several lengths under every classifier: twice, so that graphs are captured and replayed."""
    texts = [[(7 * row + at * at) % 250 for at in range(length)] for row, length in enumerate((3, 20, 17, 40, 1))]

    async def embed() -> list[NDArray[np.float32]]:
        found = []
        for _ in range(2):
            calls = (engine.embed(name, texts, principal(name)) for name in (*CLASSIFIERS, None))
            found += [vector for result in await asyncio.gather(*calls) for vector in result.vectors]
            found += (await engine.embed(CLASSIFIERS[0], texts[:1], principal(CLASSIFIERS[0]))).vectors
        await settled(engine)
        return found

    return asyncio.run(embed())


def _passes(engine: ServingEngine, got: list[NDArray[np.float32]], want: list[NDArray[np.float32]], mode: str) -> Row:
    """Whether the vectors of classification passes are the CPU's, and whether adapters ran in graphs, if there are any.

    The vectors have length 1.
    """
    far = [float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)]
    right = sum(each < VECTOR_TOLERANCE for each in far)
    graphs = engine.runners["classify"].graphs  # type: ignore[attr-defined]
    with_adapters = None if graphs is None else sum(key.classes.width > 0 for key in graphs.keys)
    row = {"mode": mode, "batch": "passes", "correct": right == len(far) and with_adapters != 0, "equal": right}
    return row | {"of": len(far), "farthest": max(far), "graphs_with_adapters": with_adapters}


def _evictions(engine: ServingEngine, mode: str) -> Row:
    """Whether adapters were evicted: a check without it would prove less."""
    evictions = engine.stats().evictions
    return {"mode": mode, "batch": "evictions", "correct": evictions > 0, "equal": evictions}


def _first_difference(a: list[int], b: list[int]) -> int:
    """Index of the first token that differs; the length of the shorter where it is the beginning of the other."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, -1 if len(a) == len(b) else min(len(a), len(b)))


def _first_differences(got: list[GenerationResult], want: list[GenerationResult]) -> list[int]:
    """Of the answers that differ, the first token that does."""
    found = (_first_difference(a.token_ids, b.token_ids) for a, b in zip(got, want, strict=True))
    return [at for at in found if at >= 0]
