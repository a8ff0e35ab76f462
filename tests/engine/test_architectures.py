"""Real decoder architectures, tiny and random: the engine gives what `generate` gives, with and without an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import freeze_base
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine
from support.engine import generate
from support.factories import byte_tokenizer, greedy, merged, random_adapter

TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SHAPE: dict[str, Any] = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
# Untied: Gemma's scaled embeddings would otherwise repeat the last token for ever, whatever the layers do.
GROUPED = SHAPE | {"num_key_value_heads": 2, "tie_word_embeddings": False}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2, transposed layers": lambda: GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **TOKENS
    ),
    "opt": lambda: OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        init_std=0.3,
        **TOKENS,
    ),
    "gpt-neox, parallel residual": lambda: GPTNeoXConfig(**SHAPE),
    "phi3, fused projections": lambda: Phi3Config(**GROUPED),
    "qwen3, query norm": lambda: Qwen3Config(head_dim=16, **GROUPED),
    "mistral, sliding window": lambda: MistralConfig(sliding_window=16, **GROUPED),
    "gemma2, capped scores": lambda: Gemma2Config(
        head_dim=16, attn_logit_softcapping=1.0, final_logit_softcapping=5.0, sliding_window=16, **GROUPED
    ),
    "gemma3": lambda: Gemma3TextConfig(head_dim=16, sliding_window=16, **GROUPED),
    "gpt-oss, sinks and experts": lambda: GptOssConfig(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=16, **GROUPED
    ),
}
PROMPTS = ["hello", "the quick brown fox jumps over the lazy dog" * 2]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_engine_gives_what_generate_gives(
    architecture: str, store: AdapterStore, start_engine: Callable[..., ServingEngine]
) -> None:
    torch.manual_seed(0)
    base = freeze_base(
        AutoModelForCausalLM.from_config(CONFIGS[architecture](), attn_implementation="eager"), byte_tokenizer(), "tiny"
    )
    bundle = random_adapter(base, SeraConfig(4, 4, 4.0, "all-linear"), seed=1, strength=0.5)
    store.publish(bundle, "acme/a")
    # Chunked prefills: windows and masks of later chunks are used too.
    engine = start_engine(base, store, max_batch_tokens=24)

    async def one(adapter: str | None, prompt: str) -> GenerationResult:
        stream = await generate(engine, GenerateParams(adapter=adapter, prompt=prompt, max_new_tokens=16))
        return await stream.collect()

    async def all_at_once() -> list[GenerationResult]:
        return await asyncio.gather(*(one(a, p) for a in (None, "acme/a") for p in PROMPTS))

    got = [result.token_ids for result in asyncio.run(all_at_once())]
    want = [
        greedy(model, base.tokenizer(prompt)["input_ids"], 16)
        for model in (base, merged(base, bundle))
        for prompt in PROMPTS
    ]
    assert got == want
    assert got[:2] != got[2:]
