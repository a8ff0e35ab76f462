"""Attention over packed sequences with a paged cache: the fast way on a CPU.

The stock `sdpa` path of continuous batching builds one dense mask over all packed tokens, so its cost grows with the
square of the batch. Under a name that contains "flash" the engine passes sequence boundaries and no mask. Sequences
that decode are attended together, padded to one length; each prefill is attended by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

_NAME = "flash_sera_varlen"

# Neighbouring decodes are padded to one length while padding stays below half of the keys, or this many keys.
_PADDING_OF_NO_ACCOUNT = 256


@dataclass(frozen=True)
class _Part:
    """Neighbouring sequences attended in one call.

    Attributes:
        new: Tokens of each sequence in this step.
        lengths: Keys of each sequence, this step's included.
    """

    new: int
    lengths: list[int]

    @property
    def width(self) -> int:
        """Keys of each sequence with padding."""
        return max(self.lengths)

    def is_plain(self, window: int | None) -> bool:
        """Whether each token looks at all tokens up to itself, and these are all that are there."""
        no_padding = min(self.lengths) == self.width
        return no_padding and self.new in (1, self.width) and (window is None or self.width <= window)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What to add to the scores, (sequences, 1, new, width)."""
        lengths = torch.tensor(self.lengths)[:, None, None, None]
        position = torch.arange(self.width)
        last = lengths - self.new + torch.arange(self.new)[:, None]
        hidden = position > last
        if window is not None:
            hidden |= position <= last - window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class SequencePlan:
    """How the sequences of one step read one part of the cache; made once a step, for all layers that share it.

    Attributes:
        parts: In the order of the tokens.
        read_index: Cache position of each key that `parts` read, padding included; empty where nothing is cached yet.
    """

    parts: list[_Part]
    read_index: Tensor
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, q_ends: list[int], k_ends: list[int], read_index: Tensor) -> SequencePlan:
        """Plan for sequences with these boundaries of new tokens and of keys, both from 0."""
        new = [end - start for start, end in pairwise(q_ends)]
        lengths = [end - start for start, end in pairwise(k_ends)]
        if not read_index.numel():
            return cls([_Part(n, [length]) for n, length in zip(new, lengths, strict=True)], read_index)
        parts: list[_Part] = []
        while sum(len(part.lengths) for part in parts) < len(new):
            start = sum(len(part.lengths) for part in parts)
            parts.append(_Part(new[start], lengths[start : start + _alike(new, lengths, start)]))
        # Padding repeats the sequence's first key: whatever lies in unused memory might be NaN.
        widths = np.repeat([part.width for part in parts], [len(part.lengths) for part in parts])
        key = np.arange(widths.sum()) - np.repeat(widths.cumsum() - widths, widths)
        key[key >= np.repeat(lengths, widths)] = 0
        return cls(parts, read_index[torch.from_numpy(key + np.repeat(k_ends[:-1], widths))])

    def mask(self, part: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`_Part.mask`, made once for all layers."""
        key = (part, window)
        if key not in self._masks:
            self._masks[key] = self.parts[part].mask(window, dtype)
        return self._masks[key]


def _alike(new: list[int], lengths: list[int], start: int) -> int:
    """How many sequences from `start` on are attended in one call."""
    total = longest = count = 0
    for n, length in zip(new[start:], lengths[start:], strict=True):
        # A sequence's first token has no cached key to pad with.
        if n != 1 or length == 1:
            break
        padded = max(longest, length) * (count + 1)
        if padded > 1.5 * (total + length) + _PADDING_OF_NO_ACCOUNT:
            break
        total, longest, count = total + length, max(longest, length), count + 1
    return max(1, count)


def plan_sequences(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments of one forward pass, with `sequence_plans` added and its read indices replaced."""
    q_ends = kwargs["cu_seq_lens_q"].tolist()
    k_ends = {kind: ends.tolist() for kind, ends in kwargs["cu_seq_lens_k"].items()}
    plans = [
        SequencePlan.make(q_ends, k_ends[allocator.layer_type], kwargs["read_index"][allocator.index])
        for allocator in kwargs["cache"].cache_allocators.values()
    ]
    return kwargs | {"sequence_plans": plans, "read_index": [plan.read_index for plan in plans]}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: PagedAttentionCache,
    sequence_plans: list[SequencePlan],
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
        sequence_plans: By cache allocator, from `plan_sequences`.
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it; None is all before it.
        softcap: Scores are squashed into (-softcap, softcap), as in Gemma 2.
        s_aux: (heads,) sink logits that take part in the softmax, as in gpt-oss.
        kwargs: The engine's other arguments; `cache.update` reads and adds to them.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    plan = sequence_plans[cache.layer_to_allocator[module.layer_idx].index]
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    heads, kv_heads = q.shape[1], k.shape[1]
    token = start = 0
    outputs = []
    for index, part in enumerate(plan.parts):
        count, width, new = len(part.lengths), part.width, part.new
        end, q_end = start + count * width, token + count * new
        rows = q[token:q_end].unflatten(0, (count, new))
        # In a decode, the query heads of one key-value head become its rows: no key is copied for them.
        rows = rows.reshape(count, kv_heads, heads // kv_heads, -1) if new == 1 else rows.transpose(1, 2)
        part_k, part_v = (x[start:end].unflatten(0, (count, width)).transpose(1, 2) for x in (k, v))
        if softcap is not None or s_aux is not None:
            mask = plan.mask(index, sliding_window, q.dtype)
            scale = scaling or q.shape[-1] ** -0.5
            out = _explicit_attention(rows, part_k, part_v, mask, scale, softcap, s_aux)
        else:
            plain = part.is_plain(sliding_window)
            out = scaled_dot_product_attention(
                rows,
                part_k,
                part_v,
                attn_mask=None if plain else plan.mask(index, sliding_window, q.dtype),
                is_causal=plain and new > 1,
                scale=scaling,
                enable_gqa=rows.shape[1] != kv_heads,
            )
        outputs.append(out.reshape(count, heads, -1) if new == 1 else out.transpose(1, 2).flatten(0, 1))
        start, token = end, q_end
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None], None


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """What `scaled_dot_product_attention` has no argument for, step by step, with the softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if s_aux is not None:
        # One logit a query head; the heads lie in q's second axis, and in its third where they share a key-value head.
        sinks = s_aux.float().view(1, q.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    return scores.softmax(3)[..., : k.shape[2]].to(q.dtype) @ v


def use_varlen_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by `varlen_attention`; for a model object that continuous batching alone will run."""
    AttentionInterface.register(_NAME, varlen_attention)
    # The property's setter would insist on an installed flash-attention package for this name.
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation_internal = _NAME
