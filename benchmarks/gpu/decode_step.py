"""A whole decode step in a CUDA graph: the base model, its matrix products alone, and the base with adapters.

"transformers" is the model as that library runs it, "base" the same model in the engine's own form, without adapters.
The other cases are in the engine's form too. Ratios are to "base". A base that is slower than its bytes demand flatters
them. So each row also has the ratio to a base that takes no longer than its bytes do (`ratio_at_bound`).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from torch.nn import Linear, functional
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.gpu.decode_model import REPLAYS, DecodeStep, adapt, adapters_of, random_llama
from benchmarks.gpu.engine_step import EngineStep
from benchmarks.gpu.operands import Member
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import ROUNDS, capture, cpu_milliseconds, gpu_milliseconds
from sera_kernels import NO_ADAPTER

SEQUENCES = 64
LORA = (Member(16, 1, False), Member(64, 1, False))
CONTEXT = 256
_MOST_PROFILED = 30


def time_decode(setting: Setting) -> Iterator[Row]:
    """Milliseconds of a step in each mix of adapters, its bound by bytes, and where the time goes by kernel."""
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    sequences, length = (4, 16) if setting.small else (SEQUENCES, CONTEXT)
    model = random_llama(setting, setting.layers, dtype)
    base_only = DecodeStep.make(model, sequences, length)
    # Embeddings are looked up, not read.
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    read = sum(layer.keys.nbytes + layer.values.nbytes for layer in base_only.cache.layers)
    bound = (weights + read) / setting.figure("memory_bytes_per_s") * 1e3
    yield {"sequences": sequences, "context": length, "weight_bytes": weights, "kv_bytes": read, "bound_ms": bound}
    products = matrix_products(model, sequences)
    runs = {"transformers": base_only.ready(setting)}
    runs["matrix products"] = capture(products).replay if setting.on_gpu else products
    # Serving layers may join weights: these are what the graphs captured so far go on reading.
    unmodified = [parameter.data for parameter in model.parameters()]
    # Without a graph the unmodified model has to stay.
    served = model if setting.on_gpu else copy.deepcopy(model)
    step = EngineStep(served, adapt(served, sequences, dtype), sequences, length)
    one = torch.arange(sequences, dtype=torch.int32, device=setting.device)
    mixes = {
        "base": None,
        "no adapter": torch.full_like(one, NO_ADAPTER),
        "1 adapter": torch.zeros_like(one),
        "own adapters": one,
    }
    profiled = {}
    for name, slots in mixes.items():
        runs[name], _ = step.ready(setting, slots)
        setting.say(f"decode step, {name}: ready")
        if setting.on_gpu and name in ("base", "own adapters"):
            profiled[name] = runs[name]
    # The same layers over other adapters. A graph goes on reading those of its capture.
    replaced = []
    for member in LORA:
        replaced.append((step.context.pool, step.context.tables))
        step.context.pool, step.context.tables = adapters_of(served, sequences, member, dtype)
        name = f"own adapters, {member.name}"
        runs[name], _ = step.ready(setting, one)
        setting.say(f"decode step, {name}: ready")
    times = _interleaved(setting, base_only, runs)
    del unmodified, replaced
    for name, ms in times.items():
        over = ms - times["base"]
        ratios = {"ratio": ms / times["base"], "over_bound": ms / bound, "ratio_at_bound": 1 + over / bound}
        yield {"case": name, "layers": setting.layers, "ms": ms, "over_base_ms": over, **ratios}
    for name, run in profiled.items():
        yield from _profile(name, run)


def matrix_products(model: PreTrainedModel, rows: int) -> Callable[[], None]:
    """All matrix products of a step on random inputs, and nothing else: what the library that computes them takes."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    inputs = {width: weights[0].new_empty(rows, width).normal_() for width in {w.shape[1] for w in weights}}

    def run() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)

    return run


def _interleaved(setting: Setting, base_only: DecodeStep, runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median milliseconds of a step of each; on the CPU one step on the host's clock."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(2 if setting.small else 2 * ROUNDS + 1):
        for name, run in runs.items():
            base_only.rewind()
            ms = gpu_milliseconds(run, REPLAYS) if setting.on_gpu else cpu_milliseconds(run)
            if turn:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def _profile(name: str, replay: Callable[[], None]) -> Iterator[Row]:
    """Kernels of one step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_time_total]
    events.sort(key=lambda event: -event.device_time_total)
    for event in events[:_MOST_PROFILED]:
        yield {"profile": name, "kernel": event.key[:90], "count": event.count, "us": round(event.device_time_total)}
    total = sum(event.device_time_total for event in events)
    yield {"profile": name, "kernel": "all", "count": sum(event.count for event in events), "us": round(total)}
