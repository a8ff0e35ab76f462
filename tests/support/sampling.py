"""The choice of one token in float64, from the definition: a sort, sums in order, noise from Python's integers."""

import math

import numpy as np
from torch import Tensor


def noise(key: int, token: int) -> float:
    """Gumbel noise of a token, from the hash that `gumbel_noise` defines."""
    h = key * 0x9E3779B1 + (token + 1) * 0x85EBCA77
    h = (h ^ (h >> 32)) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    h ^= h >> 16
    return -math.log(-math.log(((h >> 9) + 0.5) / 2**23))


def kept(scaled: list[float], top_k: int, top_p: float, min_p: float) -> list[bool]:
    """Which tokens the limits keep."""
    ordered = sorted(scaled, reverse=True)
    likeliest = ordered[: top_k or None]
    masses = [math.exp(x - ordered[0]) for x in likeliest]
    total, before, threshold = math.fsum(masses), 0.0, ordered[0]
    for x, mass in zip(likeliest, masses, strict=True):
        if before >= top_p * total and top_p < 1:
            break
        threshold = x
        before += mass
    floor = ordered[0] + math.log(min_p) if min_p > 0 else -math.inf
    return [x >= threshold and x >= floor for x in scaled]


def choose(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, key: int = 0
) -> int:
    """The token of float32 (vocabulary,) logits, or -1."""
    scores = logits.tolist()
    if any(math.isnan(x) for x in scores) or not math.isfinite(max(scores)):
        return -1
    if temperature >= np.float32(1e-6):
        # Ties after the division by the temperature are part of the definition.
        scaled = (logits.numpy() / np.float32(temperature)).astype(np.float64).tolist()
        keep = kept(scaled, top_k, top_p, min_p)
        scores = [x + noise(key, i) if keep[i] else -math.inf for i, x in enumerate(scaled)]
    return scores.index(max(scores))
