"""Llama-shaped bases with random weights, and random SeRA and LoRA adapters for them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters_store import AdapterBundle, AdapterConfig, ModuleSpec
from sera_serve import SeraConfig, attach_adapter
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.layers import adapter_tensors, module_specs

VOCABULARY = 4096


def llama_base(width: int, layers: int) -> FrozenBase:
    """A float32 Llama: heads of 64, half as many key-value heads, MLP 2.75 times as wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.8 / width**0.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    return freeze_base(LlamaForCausalLM(config), tokenizer, f"llama-{width}")


def sera_adapter(base: FrozenBase, rank: int, seed: int) -> AdapterBundle:
    """SeRA with split = rank on all linear layers; its update is a tenth of each layer's weight."""
    torch.manual_seed(seed)
    shared = base.share_weights()
    layers = attach_adapter(shared.model, SeraConfig(rank, rank, 2.0 * rank, "all-linear"))
    with torch.no_grad():
        for layer in layers.values():
            layer.sera_b.normal_()
            weight = layer.base.weight
            assert isinstance(weight, torch.Tensor)
            layer.sera_b *= 0.1 * weight.norm() / layer.delta_weight().norm()
    config = AdapterConfig(
        task="generate",
        method="sera",
        base=base.info,
        modules={path: ModuleSpec(**spec) for path, spec in module_specs(shared.model).items()},
    )
    return AdapterBundle(config, adapter_tensors(shared.model))
