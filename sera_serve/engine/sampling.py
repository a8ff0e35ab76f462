"""Per-request sampling whose outcome depends on the request alone, never on what else is in the batch.

A token is drawn by the Gumbel-max rule: argmax of scores / temperature + noise, which is a draw from the softmax. The
noise is a hash of (seed, position, token id), so a seeded request gives the same tokens in any batch, and no random
state is shared between tenants. All shapes are static.

Scores that are infinite or not a number choose no token: `next_tokens` gives `NO_TOKEN` for their row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_TOKEN = -1
"""In place of the token of a row whose scores are not finite."""

# A temperature below it would make finite logits infinite. At this temperature two logits that differ by 2e-5 are drawn
# in their order already.
_GREEDY_BELOW = 1e-6


def sampling_keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.int32]:
    """A 31-bit key for the noise of each request at its position (splitmix64's finalizer); products wrap."""
    z = seeds * np.uint64(0x9E3779B97F4A7C15) + positions * np.uint64(0xD1B54A32D192ED03)
    z = z + np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.int32] = ((z ^ (z >> np.uint64(31))) & np.uint64(0x7FFFFFFF)).astype(np.int32)
    return keys


def gumbel_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, float32 (rows, vocabulary), a pure function of each row's int32 key."""
    tokens = torch.arange(1, vocabulary + 1, device=keys.device, dtype=torch.int64)
    h = keys.to(torch.int64).unsqueeze(1) * 0x9E3779B1 + tokens * 0x85EBCA77
    # Murmur3's 32-bit finalizer, carried out in int64: products of 32-bit numbers wrap, and the low half is exact.
    h = (h ^ (h >> 32)) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    # 23 bits and a half: never 0 or 1 in float32, so both logarithms are finite.
    uniform = ((h >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def top_k_top_p_filter(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the likeliest tokens to -inf.

    Args:
        scores: float32 (rows, vocabulary), already divided by the temperature.
        top_k: int32 (rows,), how many tokens to keep; 0 keeps all.
        top_p: float32 (rows,), keep the fewest tokens whose probability reaches it; 1 keeps all.

    Returns:
        (rows, vocabulary); at least the likeliest token of each row is kept.
    """
    vocabulary = scores.shape[1]
    ordered = scores.sort(dim=1, descending=True).values
    limit = torch.where(top_k > 0, top_k.clamp(max=vocabulary), vocabulary)
    ranks = torch.arange(vocabulary, device=scores.device)
    ordered = ordered.masked_fill(ranks >= limit.unsqueeze(1), -torch.inf)
    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    kept = (before < top_p.unsqueeze(1)) & (ordered > -torch.inf)
    kept[:, 0] = True
    threshold = ordered.gather(1, kept.sum(dim=1, keepdim=True) - 1)
    return scores.masked_fill(scores < threshold, -torch.inf)


def perturbed_scores(
    scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, keys: Tensor, truncate: bool = True
) -> Tensor:
    """Scores whose argmax is each row's next token: greedy where the temperature is 0, a draw elsewhere.

    Args:
        scores: float32 (rows, vocabulary), the model's logits.
        temperature: float32 (rows,); below 1e-6 it is 0.
        top_k: int32 (rows,); see `top_k_top_p_filter`.
        top_p: float32 (rows,); see `top_k_top_p_filter`.
        keys: int32 (rows,), from `sampling_keys`.
        truncate: Whether any row limits its tokens; without, the sort is spared.
    """
    greedy = (temperature < _GREEDY_BELOW).unsqueeze(1)
    scaled = scores / torch.where(greedy, 1.0, temperature.unsqueeze(1))
    kept = top_k_top_p_filter(scaled, top_k, top_p) if truncate else scaled
    noise = gumbel_noise(keys, scores.shape[1])
    return torch.where(greedy, scores, kept + noise)


def next_tokens(scores: Tensor) -> Tensor:
    """int64 (rows,): the token of the highest score, or `NO_TOKEN` where that score is not finite.

    Where any score is not a number, so is the highest. The device is not read.

    Args:
        scores: float32 (rows, vocabulary), logits or perturbed scores.
    """
    highest, tokens = scores.max(1)
    return torch.where(highest.abs() < torch.inf, tokens, NO_TOKEN)
