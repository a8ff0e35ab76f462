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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
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
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it; None is all before it.
        softcap: Scores are squashed into (-softcap, softcap), as in Gemma 2.
        s_aux: (heads,) sink logits that take part in the softmax, as in gpt-oss.
        kwargs: The engine's other arguments; `cache.update` reads and adds to them.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    q_ends, k_ends = cu_seq_lens_q.tolist(), kwargs["cu_seq_lens_k"].tolist()
    plain = softcap is None and s_aux is None
    outputs = []
    for i in range(len(q_ends) - 1):
        q = query[:, :, q_ends[i] : q_ends[i + 1]]
        k = key[:, :, k_ends[i] : k_ends[i + 1]]
        v = value[:, :, k_ends[i] : k_ends[i + 1]]
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        if plain:
            grouped = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
        else:
            out = _explicit_attention(q, k, v, mask, scaling or q.shape[-1] ** -0.5, softcap, s_aux)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _mask(new: int, total: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where the last `new` of `total` tokens may look, (new, total); None where they may look everywhere."""
    if new == 1 and (window is None or total <= window):
        return None
    everywhere = torch.ones(new, total, dtype=torch.bool, device=device)
    mask = everywhere.tril(total - new)
    return mask if window is None else mask & everywhere.triu(total - new - window + 1)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """What `scaled_dot_product_attention` has no argument for, step by step, with the softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    return scores.softmax(3)[..., : k.shape[2]].to(q.dtype) @ v


def use_varlen_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by `varlen_attention`; for a model object that continuous batching alone will run."""
    AttentionInterface.register(_NAME, varlen_attention)
    # The property's setter would insist on an installed flash-attention package for this name.
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation_internal = _NAME
