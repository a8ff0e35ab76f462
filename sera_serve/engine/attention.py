"""Attention over packed sequences with a paged cache, one sequence at a time: the fast way on a CPU.

The stock `sdpa` path of continuous batching builds one dense mask over all packed tokens, so its cost grows with the
square of the batch. Under a name that contains "flash" the engine passes sequence boundaries and no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

_NAME = "flash_sera_varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: PagedAttentionCache,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values to the paged cache, then attend within each sequence.

    Args:
        module: The attention layer; its `layer_idx` names the cache layer.
        query: (1, heads, tokens, head_dim), the packed tokens of all sequences.
        key: (1, kv_heads, tokens, head_dim).
        value: Like `key`.
        attention_mask: Unused: sequences are causal.
        cache: The engine's cache.
        cu_seq_lens_q: int32 (sequences + 1,), token boundaries of the sequences.
        scaling: Factor of the scores.
        kwargs: The engine's other arguments; `cache.update` reads and adds to them.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    q_ends, k_ends = cu_seq_lens_q.tolist(), kwargs["cu_seq_lens_k"].tolist()
    outputs = []
    for i in range(len(q_ends) - 1):
        q = query[:, :, q_ends[i] : q_ends[i + 1]]
        k = key[:, :, k_ends[i] : k_ends[i + 1]]
        v = value[:, :, k_ends[i] : k_ends[i + 1]]
        new, total = q.shape[2], k.shape[2]
        mask = None
        if 1 < new < total:  # a later chunk of a prompt: its tokens see all of the cache before them
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        causal = new == total > 1
        grouped = q.shape[1] != k.shape[1]
        outputs.append(
            scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def use_varlen_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by `varlen_attention`; for a model object that continuous batching alone will run."""
    AttentionInterface.register(_NAME, varlen_attention)
    # The property's setter would insist on an installed flash-attention package for this name.
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation_internal = _NAME
