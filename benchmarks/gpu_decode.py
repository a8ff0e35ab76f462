"""Section 3: a whole decode step in a CUDA graph, on the base model and with an adapter for each token.

The base has Llama-3-8B's shape and random weights, in transformers' own implementation with its static cache. Its many
small kernels leave it slower than its weights' bytes demand, which flatters the ratio; so each row also has the ratio
on a base that takes no longer than reading its weights does (`ratio_at_weights_bound`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.gpu_operands import Member, uniform_pool
from benchmarks.gpu_setting import Row, Setting
from benchmarks.gpu_timing import ROUNDS, capture
from sera_kernels import NO_ADAPTER, AdapterBatch, AdapterTables
from sera_serve.layers import AdapterContext, adaptable_linears, attach_serving, find_shared_inputs, linear_widths

SEQUENCES = 64
CONTEXT = 256
# Steps between two readings of the clock; the last positions of the cache are theirs.
REPLAYS = 4
MEMBER = Member(64, 64)
# Of float32 logits against those of merged weights, and of bfloat16 ones, whose merged weights are rounded too.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def attend_to_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Attention of a decode step over a full cache, for transformers: no mask, and keys are not repeated for each head.

    transformers' own takes the static cache's mask as given and then repeats keys and values, which costs as much as
    the weights do.
    """
    rows, heads, length, width = query.shape
    packed = query.reshape(rows, key.shape[1], -1, width)
    output = functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return output.reshape(rows, heads, length, width).transpose(1, 2).contiguous(), None


def random_llama(setting: Setting, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Llama-3-8B with another number of layers, random weights, on the device; tiny in small mode."""
    width = 128 if setting.small else 4096
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // (32 if setting.small else 128),
        num_key_value_heads=2 if setting.small else 8,
        vocab_size=512 if setting.small else 128256,
        max_position_embeddings=8192,
        # Wide enough that logits depend on the input.
        initializer_range=width**-0.5,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    AttentionInterface.register("attend_to_all", attend_to_all)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="attend_to_all")
    return model.eval().requires_grad_(False)


@dataclass
class DecodeStep:
    """One new token for each sequence over a full cache; what it reads stays in place, so a graph can replay it."""

    model: PreTrainedModel
    context: AdapterContext | None
    tokens: Tensor
    slots: Tensor
    cache: StaticCache
    first_free: int
    logits: Tensor

    @classmethod
    def make(cls, model: PreTrainedModel, sequences: int, cache_length: int) -> DecodeStep:
        """A step of the base model, over random keys and values."""
        device = model.device
        cache = StaticCache(config=model.config, max_cache_len=cache_length)
        tokens = torch.randint(model.config.vocab_size, (sequences, 1), device=device)
        slots = torch.full((sequences,), NO_ADAPTER, dtype=torch.int32, device=device)
        logits = torch.empty(sequences, model.config.vocab_size, dtype=model.dtype, device=device)
        step = cls(model, None, tokens, slots, cache, cache_length - REPLAYS, logits)
        # The first pass makes the cache.
        step.run()
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        return step

    def over(self, context: AdapterContext, slots: Tensor) -> DecodeStep:
        """The same step with these adapters; the cache is shared."""
        return replace(self, context=context, slots=slots, logits=torch.empty_like(self.logits))

    def run(self) -> None:
        """One forward pass; `logits` (sequences, vocabulary) changes in place."""
        positions = torch.full_like(self.tokens, self.first_free)
        arguments = {"position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        if self.context is None:
            output = self.model(self.tokens, **arguments)
        else:
            with self.context.run(AdapterBatch(self.slots)):
                output = self.model(self.tokens, **arguments)
        self.logits.copy_(output.logits[:, -1])

    def rewind(self) -> None:
        """Make room for `REPLAYS` steps: the cache counts its tokens."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.first_free)

    def ready(self, setting: Setting) -> Callable[[], None]:
        """The step as the replay of a graph, or itself on the CPU."""
        self.rewind()
        return capture(self.run).replay if setting.on_gpu else self.run


def adapt(model: PreTrainedModel, slots: int, dtype: torch.dtype) -> AdapterContext:
    """Attach serving layers to every linear layer, over random adapters of `MEMBER`'s shape."""
    shapes = [linear_widths(module) for module in adaptable_linears(model).values()]
    device = model.device
    pool, tables = uniform_pool(shapes, slots, MEMBER, dtype, device)
    # An update of about a tenth of a layer's own output.
    scalings = [0.1 * (d_in / MEMBER.split * MEMBER.rank) ** -0.5 for d_in, _ in shapes]
    tables.scaling.copy_(torch.tensor(scalings, device=device)[:, None].expand_as(tables.scaling))
    context = AdapterContext(pool, tables)
    attach_serving(model, context, find_shared_inputs(model))
    return context


def check_decode(setting: Setting) -> list[Row]:
    """A two-layer base with three adapters: logits against merged weights, through one graph over changing slots."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_llama(setting, 2, dtype)
        linears = adaptable_linears(model)
        base_only = DecodeStep.make(model, 4, 16)
        context = adapt(model, 3, dtype)
        step = base_only.over(context, torch.zeros_like(base_only.slots))
        run = step.ready(setting)
        got = []
        for slot in (0, 1, 2, NO_ADAPTER):
            # Beside it another adapter and the base model, so that a mixed batch is what is checked.
            step.slots.copy_(torch.tensor([slot, 2, slot, NO_ADAPTER]))
            step.rewind()
            run()
            got.append(step.logits[::2].clone())
        for slot, mine in zip((0, 1, 2, NO_ADAPTER), got, strict=True):
            want = _merged_logits(base_only, linears, context, slot)
            error = ((mine - want).norm() / want.norm()).item()
            correct = error <= TOLERANCE[dtype]
            if dtype == torch.float32:
                correct &= torch.equal(mine.argmax(-1), want.argmax(-1))
            moved = ((want - got[-1]).norm() / want.norm()).item()
            # An adapter that changes nothing would prove nothing.
            correct &= slot == NO_ADAPTER or moved > 2 * TOLERANCE[dtype]
            case = {"case": "decode, merged weights", "dtype": str(dtype).removeprefix("torch."), "slot": slot}
            rows.append({**case, "correct": correct, "error": error, "moved_by_adapter": moved})
        del model, context, base_only, step, run
    return rows


def _merged_logits(base_only: DecodeStep, linears: dict[str, nn.Module], context: AdapterContext, slot: int) -> Tensor:
    """Logits of every second sequence with one adapter in the weights themselves and no serving layer at work."""
    kept = [linear.weight.clone() for linear in linears.values()]
    if slot != NO_ADAPTER:
        for module, linear in enumerate(linears.values()):
            delta = _delta(context.pool, context.tables, module, slot, *linear_widths(linear))
            linear.weight.copy_((linear.weight.double() + delta.T).to(linear.weight.dtype))
    base_only.rewind()
    base_only.run()
    for linear, weight in zip(linears.values(), kept, strict=True):
        linear.weight.copy_(weight)
    return base_only.logits[::2].clone()


def _delta(pool: Tensor, tables: AdapterTables, module: int, slot: int, d_in: int, d_out: int) -> Tensor:
    (entry,) = tables.entries(module, [slot])
    a, c, b = (None if factor is None else factor.double() for factor in entry.factors(pool, d_in, d_out))
    assert a is not None and b is not None
    left = torch.block_diag(*a.view(entry.split, -1, entry.segment_rank))
    right = torch.block_diag(*b.view(entry.segment_rank, entry.split, -1).transpose(0, 1))
    return entry.scaling * ((left if c is None else left @ c) @ right)


def time_decode(setting: Setting, bandwidth: float) -> list[Row]:
    """Milliseconds of a step: unmodified base, base with serving layers, one adapter, an adapter for each token."""
    dtype = torch.float32 if not setting.on_gpu else torch.bfloat16
    sequences, length = (4, 16) if setting.small else (SEQUENCES, CONTEXT)
    model = random_llama(setting, setting.layers, dtype)
    # Embeddings are looked up, not read.
    weight_bytes = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    setting.say(f"decode: a base of {setting.layers} layers, {weight_bytes / 1e9:.2f} GB read a step")
    base_only = DecodeStep.make(model, sequences, length)
    steps, runs = {"base_only": base_only}, {"base_only": base_only.ready(setting)}
    # From here on the model has serving layers; the graph of the base model's step is of the unmodified one.
    context = adapt(model, sequences, dtype)
    one = torch.arange(sequences, dtype=torch.int32, device=setting.device)
    mixes = {"no adapter": torch.full_like(one, NO_ADAPTER), "1 adapter": torch.zeros_like(one), "own adapters": one}
    for name, slots in mixes.items():
        steps[name] = base_only.over(context, slots)
        runs[name] = steps[name].ready(setting)
        setting.say(f"decode: {name} ready")
    times = _interleaved(setting, steps, runs)
    ideal = weight_bytes / bandwidth * 1e3
    rows = []
    for name, ms in times.items():
        row = {"case": name, "tokens": sequences, "layers": setting.layers, "ms": ms, "ratio": ms / times["base_only"]}
        more = ms - times["base_only"]
        rows.append(row | {"adapters_ms": more, "ratio_at_weights_bound": 1 + more / ideal})
    return rows


def _interleaved(
    setting: Setting, steps: dict[str, DecodeStep], runs: dict[str, Callable[[], None]]
) -> dict[str, float]:
    """Median milliseconds of a step of each; on the CPU one step on the host's clock."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(2 if setting.small else 2 * ROUNDS + 1):
        for name, run in runs.items():
            steps[name].rewind()
            ms = _gpu_milliseconds(run) if setting.on_gpu else _cpu_milliseconds(run)
            if turn:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def _gpu_milliseconds(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPLAYS


def _cpu_milliseconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
