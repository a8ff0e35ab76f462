"""Llama-shaped bases with random weights."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sera_serve.base import FrozenBase, freeze_base

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
