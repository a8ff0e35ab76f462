"""A whole decode step of a Llama with random weights: on the base model, or with an adapter for each token.

The base is transformers' own implementation with its static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, StaticCache

from benchmarks.gpu.bases import llama_config
from benchmarks.gpu.operands import Member, uniform_pool
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import capture
from sera_kernels import NO_ADAPTER, AdapterBatch, AdapterTables
from sera_serve.engine.loop.hugging_face import cache_argument
from sera_serve.layers import (
    AdapterContext,
    ServedLinear,
    SideStream,
    adaptable_linears,
    attach_serving,
    find_shared_inputs,
    linear_widths,
)

# Steps between two readings of the clock; the last positions of the cache are theirs.
REPLAYS = 4
MEMBER = Member(64, 64)


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
    config = llama_config(setting.small, layers)
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

    def over(self, context: AdapterContext | None, slots: Tensor) -> DecodeStep:
        """The same step with these adapters; the cache is shared."""
        return replace(self, context=context, slots=slots, logits=torch.empty_like(self.logits))

    def run(self) -> None:
        """One forward pass; `logits` (sequences, vocabulary) changes in place."""
        positions = torch.full_like(self.tokens, self.first_free)
        arguments = {"position_ids": positions, cache_argument(self.model): self.cache, "use_cache": True}
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


def adapters_of(model: PreTrainedModel, slots: int, member: Member, dtype: torch.dtype) -> tuple[Tensor, AdapterTables]:
    """Random adapters of one shape on every linear layer, attached or not, in a pool and its tables."""
    shapes = [linear_widths(module) for module in _linears(model)]
    pool, tables = uniform_pool(shapes, slots, member, dtype, model.device)
    # An update of about a tenth of a layer's own output.
    rank = member.rank if member.mixer else 1
    scalings = [0.1 * (d_in / member.split * member.rank / member.split * rank) ** -0.5 for d_in, _ in shapes]
    tables.scaling.copy_(torch.tensor(scalings, device=model.device)[:, None].expand_as(tables.scaling))
    return pool, tables


def _linears(model: PreTrainedModel) -> list[nn.Module]:
    served = [module.base for module in model.modules() if isinstance(module, ServedLinear)]
    return served or list(adaptable_linears(model).values())


def adapt(model: PreTrainedModel, slots: int, dtype: torch.dtype) -> AdapterContext:
    """Attach serving layers to every linear layer, over random adapters of `MEMBER`'s shape."""
    device = model.device
    context = AdapterContext(*adapters_of(model, slots, MEMBER, dtype))
    side_stream = SideStream(device) if device.type == "cuda" else None
    attach_serving(model, context, find_shared_inputs(model), side_stream)
    return context
