"""Per-request sampling whose outcome depends on the request alone, never on what else is in the batch.

A token is drawn by the Gumbel-max rule: argmax of scores / temperature + noise, which is a draw from the softmax. The
noise is a hash of (seed, position, token id), so a seeded request gives the same tokens in any batch, and no random
state is shared between tenants. All shapes are static.

Scores that are infinite or not a number choose no token: `next_tokens` gives `NO_TOKEN` for their row.

`choose_tokens` does all of it. On a CUDA device with Triton it launches the kernels of `sera_kernels.sampling`.
Elsewhere it calls the other functions of this file, which define the semantics.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_TOKEN = -1
"""In place of the token of a row whose scores are not finite."""

IN_PROMPT = 1 << 30
"""Added to the count of a token that is in the prompt; see `Penalties`."""

# A temperature below it would make finite logits infinite. At this temperature two logits that differ by 2e-5 are drawn
# in their order already.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class SamplingRows:
    """How each row's token is drawn.

    Attributes:
        temperature: float32 (rows,); below 1e-6 the row is greedy.
        top_k: int32 (rows,), how many tokens to keep; 0 keeps all.
        top_p: float32 (rows,), keep the fewest tokens whose probability reaches it; 1 keeps all.
        keys: int32 (rows,), from `sampling_keys`.
        min_p: float32 (rows,), keep tokens with at least this part of the highest probability; 0 keeps all.
        truncate: Whether any row may limit its tokens. Without, top_k, top_p and min_p are not read.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    keys: Tensor
    min_p: Tensor | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Penalties:
    """What makes tokens less likely that were there before; as in OpenAI's API and in vLLM.

    Attributes:
        counts: int32 (rows, vocabulary), how often the token was put out, plus `IN_PROMPT` if the prompt has it.
        repetition: float32 (rows,), divides positive scores of tokens of the prompt or the output, and multiplies
            negative ones; 1 changes nothing.
        frequency: float32 (rows,), subtracted for each time that the token was put out.
        presence: float32 (rows,), subtracted once if the token was put out.
    """

    counts: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


def choose_tokens(
    logits: Tensor,
    rows: SamplingRows | None = None,
    penalties: Penalties | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each row; the device is not read, and shapes alone decide what runs.

    Args:
        logits: (rows, vocabulary), float32, bfloat16 or float16, contiguous in the last dimension.
        rows: How tokens are drawn. None if all rows are greedy.
        penalties: Applied before the temperature, to greedy rows too.
        bias: float32 (rows, vocabulary), added before the penalties; -inf bars a token.

    Returns:
        int64 (rows,), the token, or `NO_TOKEN` where the scores are not finite.
    """
    if logits.is_cuda and _has_triton():
        # Triton is imported where it runs.
        from sera_kernels.sampling import choose_tokens_triton

        return choose_tokens_triton(
            logits,
            None if rows is None else (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.keys),
            rows is not None and rows.truncate,
            None
            if penalties is None
            else (penalties.counts, penalties.repetition, penalties.frequency, penalties.presence),
            bias,
        )
    return choose_tokens_torch(logits, rows, penalties, bias)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_tokens_torch(
    logits: Tensor,
    rows: SamplingRows | None = None,
    penalties: Penalties | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Do the same as `choose_tokens` with torch's operations, on any device."""
    scores = adjusted_scores(logits.float(), penalties, bias)
    if rows is not None:
        scores = perturbed_scores(scores, rows)
    return next_tokens(scores)


def adjusted_scores(scores: Tensor, penalties: Penalties | None, bias: Tensor | None) -> Tensor:
    """float32 (rows, vocabulary): the scores with bias, then with the penalties for repetition, frequency, presence."""
    if bias is not None:
        scores = scores + bias
    if penalties is None:
        return scores
    repetition = penalties.repetition.unsqueeze(1)
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(penalties.counts != 0, repeated, scores)
    output = penalties.counts & (IN_PROMPT - 1)
    scores = scores - penalties.frequency.unsqueeze(1) * output
    return torch.where(output > 0, scores - penalties.presence.unsqueeze(1), scores)


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


def top_k_top_p_filter(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None) -> Tensor:
    """Set all but the likeliest tokens to -inf.

    top_p applies to the tokens that top_k keeps, and min_p to all of them. Tokens equal to the last kept one are kept.

    Args:
        scores: float32 (rows, vocabulary), already divided by the temperature.
        top_k: int32 (rows,), how many tokens to keep; 0 keeps all.
        top_p: float32 (rows,), keep the fewest tokens whose probability reaches it; 1 keeps all.
        min_p: float32 (rows,), keep tokens with at least this part of the highest probability; 0 keeps all.

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
    # At 1 the rounding of the sum does not matter.
    kept = ((before < top_p.unsqueeze(1)) | (top_p >= 1).unsqueeze(1)) & (ordered > -torch.inf)
    kept[:, 0] = True
    threshold = ordered.gather(1, kept.sum(dim=1, keepdim=True) - 1)
    if min_p is not None:
        highest = ordered[:, :1]
        threshold = torch.maximum(threshold, torch.minimum(highest, highest + min_p.unsqueeze(1).log()))
    return scores.masked_fill(scores < threshold, -torch.inf)


def perturbed_scores(scores: Tensor, rows: SamplingRows) -> Tensor:
    """Scores whose argmax is each row's next token: greedy where the temperature is 0, a draw elsewhere.

    Args:
        scores: float32 (rows, vocabulary), the model's logits.
        rows: How tokens are drawn; without `truncate`, the sort is spared.
    """
    greedy = (rows.temperature < _GREEDY_BELOW).unsqueeze(1)
    scaled = scores / torch.where(greedy, 1.0, rows.temperature.unsqueeze(1))
    kept = top_k_top_p_filter(scaled, rows.top_k, rows.top_p, rows.min_p) if rows.truncate else scaled
    noise = gumbel_noise(rows.keys, scores.shape[1])
    return torch.where(greedy, scores, kept + noise)


def next_tokens(scores: Tensor) -> Tensor:
    """int64 (rows,): the token of the highest score, or `NO_TOKEN` where that score is not finite.

    Where any score is not a number, so is the highest. The device is not read.

    Args:
        scores: float32 (rows, vocabulary), logits or perturbed scores.
    """
    highest, tokens = scores.max(1)
    return torch.where(highest.abs() < torch.inf, tokens, NO_TOKEN)
