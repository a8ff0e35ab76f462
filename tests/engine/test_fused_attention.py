"""Attention layers with one kernel for rotation and cache: which layers take it, and that they give the same."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from sera_kernels.rotary import rotate_and_write
from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext
from sera_serve.engine.loop.attention_backend import RowKeys
from sera_serve.engine.loop.fused_attention import FusedAttention, fuse_attention
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.torch_attention import TorchAttention

# The others have fused projections, other tables of angles, or no rotation.
FUSED = ("qwen3", "mistral", "gemma2", "gemma3")
PROMPT = 40


@torch.no_grad()
def logits_of(model: PreTrainedModel, fuse: bool) -> tuple[int, Tensor, Tensor, KeyValuePool]:
    """How many layers are fused; the logits of a prompt, and of a static step of two rows after it; the pool."""
    paged = PagedModel(copy.deepcopy(model))
    count = fuse_attention(paged, TorchAttention(), rotate_and_write) if fuse else 0
    pool = KeyValuePool(paged.shapes, 8, paged.dtype, paged.device, TorchAttention())
    ids = torch.randint(259, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    at = torch.arange(PROMPT)
    prompt = paged.logits(ids, at[None], StepContext(pool, at + PAGE_SIZE, [Part(PROMPT, np.array([PROMPT]))]), 0)
    # The second row is the prompt without its last ten tokens.
    table = torch.tensor([[1, 2], [3, 1]])
    pool.keys[0][3], pool.values[0][3] = pool.keys[0][1], pool.values[0][1]
    pool.keys[1][3], pool.values[1][3] = pool.keys[1][1], pool.values[1][1]
    lengths = torch.tensor([PROMPT, 30])
    places = torch.tensor([2 * PAGE_SIZE + PROMPT % PAGE_SIZE, 3 * PAGE_SIZE + 30])
    step = StepContext(pool, places, rows=RowKeys(table, lengths + 1))
    decoded = paged.logits(torch.tensor([[7, 9]]), lengths[None], step, 0)
    return count, prompt, decoded, pool


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layers_of_the_common_form_give_the_same(architecture: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    _, *want, before = logits_of(model, fuse=False)
    count, *got, after = logits_of(model, fuse=True)
    assert count == (2 if architecture.startswith(FUSED) else 0)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)
    for mine, right in zip((*after.keys, *after.values), (*before.keys, *before.values), strict=True):
        torch.testing.assert_close(mine[1:], right[1:], rtol=1e-3, atol=1e-4)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 259}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.3, **config)).eval()


class ScalesItsKeys(LlamaAttention):
    """Has every part of the common form, and does something else."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return super().forward(1.05 * hidden_states, position_embeddings=position_embeddings, **kwargs)


def test_a_layer_that_computes_something_else_keeps_its_own_form() -> None:
    model = small_llama()
    model.model.layers[1].self_attn.__class__ = ScalesItsKeys
    assert fuse_attention(PagedModel(model), TorchAttention(), rotate_and_write) == 1
    assert isinstance(model.model.layers[0].self_attn.forward, FusedAttention)
    assert not isinstance(model.model.layers[1].self_attn.forward, FusedAttention)


def test_a_kernel_that_gives_something_else_is_not_used() -> None:
    def without_rotation(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        rotate_and_write(q, k, *args)
        return q.contiguous(), k.contiguous()

    assert fuse_attention(PagedModel(small_llama()), TorchAttention(), without_rotation) == 0
