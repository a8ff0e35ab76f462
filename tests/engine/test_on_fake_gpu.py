"""The code for a GPU, run whole without one: results are the CPU's, and no access to memory is out of order."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_serving_elsewhere import check_same

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, ImageInput
from sera_serve.engine import GenerateParams, ServingEngine
from sera_serve.engine.constraint import ConstraintSpec
from sera_serve.engine.loop import graphs
from support.engine import SHAPE, acting_for, classify, collect, settled
from support.factories import random_adapter, random_decoder, random_encoder, with_vectors
from support.fake_gpu import FakeGpu, fake_gpu
from support.other_device import move
from support.vision import image_file, random_clip, retriever

# Of the interpreter's numpy, where a GPU is silent.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")]

Start = Callable[..., ServingEngine]
SHAPES = [SHAPE, SeraConfig(4, 1, 8.0, ("q_proj", "v_proj"), use_mixer=False), SeraConfig(8, 2, 8.0, "all-linear")]
# Kernels run some thousand times slower than elsewhere.
SETTINGS = {"max_resident": 3, "max_sequences": 3, "kv_cache_tokens": 512, "pool_mib": 1, "request_timeout_s": 900}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    # Fewer and smaller graphs, and nothing to compile.
    monkeypatch.setattr(graphs, "_MOST_TOKENS", 8)
    monkeypatch.setattr(graphs, "token_buckets", lambda rows, most: [rows, most])
    monkeypatch.setattr("sera_serve.engine.engine.warm_up", lambda device, dtype: None)
    with fake_gpu() as gpu:
        yield gpu


def moved(base: FrozenBase) -> FrozenBase:
    model = copy.deepcopy(base.model)
    move(model)
    return replace(base, model=model)


def on_both(
    base: FrozenBase, store: AdapterStore, start_engine: Start, calls: Callable[[ServingEngine], list[Any]], **more: Any
) -> list[list[Any]]:
    """The results of the calls, all at once, on the CPU and there. Few adapters fit, so some are evicted."""

    async def run(engine: ServingEngine) -> list[Any]:
        results = await asyncio.gather(*calls(engine))
        await settled(engine)
        return results

    found = []
    for here, device in ((base, "cpu"), (moved(base), "cuda")):
        engine = start_engine(here, store, **SETTINGS, device=device, **more)
        found.append(asyncio.run(run(engine)))
        engine.stop()
    return found


async def given_up(engine: ServingEngine, adapter: str) -> None:
    """A client that leaves after the first token."""
    params = GenerateParams(adapter=adapter, prompt="to be left", max_new_tokens=20)
    stream = await engine.generate(params, acting_for(adapter))
    async for _ in stream:
        break
    await stream.aclose()


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoder(gpu: FakeGpu, store: AdapterStore, start_engine: Start, cuda_graphs: bool, dtype: torch.dtype) -> None:
    base = random_decoder(layers=1)
    base = replace(base, model=base.model.to(dtype))
    for seed, shape in enumerate(SHAPES):
        vectors = ("q_proj", "v_proj") if seed == 2 else ()
        bundle = with_vectors(random_adapter(base, shape, seed), gain=vectors, offset=vectors[:1])
        store.publish(bundle, f"acme/w{seed}")
        store.publish(random_adapter(base, shape, seed, ["a", "b", "c"]), f"acme/c{seed}")
    options: list[dict[str, Any]] = [
        {},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 20},
        {"presence_penalty": 0.5, "logit_bias": {70: 2.0}},
        {"constraint": ConstraintSpec("json_object")},
    ]

    def calls(engine: ServingEngine) -> list[Any]:
        return [
            *(
                collect(engine, adapter=adapter, prompt="abc" * (1 + i), max_new_tokens=4, **each)
                for i, each in enumerate(options)
                for adapter in [f"acme/w{i % 3}", *([None] if i < 2 else [])]
            ),
            given_up(engine, "acme/w1"),
            *(classify(engine, f"acme/c{i}", ["some", "text"]) for i in range(3)),
            engine.embed(None, ["ab", "cde"], acting_for(None)),
        ]

    here, there = on_both(base, store, start_engine, calls, cuda_graphs=cuda_graphs)
    assert gpu.found == {}
    for mine, other in zip(here, there, strict=True):
        if dtype == torch.float32 and mine is not None:
            check_same(mine, other)
    assert (len(gpu.graphs) > 10) == cuda_graphs
    assert gpu.launches.keys() > {"_rotate_kernel", "_silu_mul_kernel", "expand", "reduce_mix", "reduce_parts"}


@pytest.mark.parametrize("kind", ["encoder", "dual"])
def test_passes(gpu: FakeGpu, store: AdapterStore, start_engine: Start, kind: str) -> None:
    inputs: list[Any] = ["a cat", ImageInput(image_file(1), "inputs[1].image")]
    names = ["acme/w0", "acme/w1"]
    if kind == "dual":
        base = random_clip()
        store.publish(retriever(base, SHAPE, 0), names[0])
    else:
        base, inputs = random_encoder(layers=1), ["a cat", "b"]
        for name, shape in zip(names, [SHAPE, SHAPES[2]], strict=True):
            store.publish(random_adapter(base, shape, 0, ["a", "b"]), name)

    def calls(engine: ServingEngine) -> list[Any]:
        if kind == "dual":
            return [engine.embed(names[0], inputs, acting_for(names[0]))]
        return [engine.embed(None, inputs, acting_for(None)), *(classify(engine, name, inputs) for name in names)]

    here, there = on_both(base, store, start_engine, calls)
    for mine, other in zip(here, there, strict=True):
        check_same(mine, other)
    assert gpu.found == {}
    assert len(gpu.graphs) > 2 and gpu.launches.keys() >= {"expand", "reduce_mix"}
