"""Sampling: the right distribution, the right tokens kept, and independence from the rest of the batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from sera_serve.engine.sampling import SamplingRows, gumbel_noise, perturbed_scores, sampling_keys, top_k_top_p_filter


def keys_of(seeds: Iterable[int], positions: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(sampling_keys(np.array([*seeds], np.uint64), np.array([*positions], np.uint64)))


def draw(logits: torch.Tensor, rows: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    keys = keys_of([7] * rows, range(rows))
    drawn = SamplingRows(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        keys,
    )
    return perturbed_scores(logits.expand(rows, -1), drawn).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    rows = 40_000
    counts = torch.bincount(draw(logits, rows, temperature), minlength=6)
    expected = (logits / temperature).softmax(0) * rows
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5, "0.1% quantile of chi-square with 5 degrees of freedom"


def test_noise_is_gumbel_and_uncorrelated_between_neighbours() -> None:
    keys = keys_of(range(200), [0] * 200)
    noise = gumbel_noise(keys, 1000)
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.05
    centred = noise - noise.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        assert abs((centred * other).mean().item() / noise.var().item()) < 0.01


def test_temperature_zero_is_greedy_whatever_the_rest() -> None:
    logits = torch.randn(50)
    assert set(draw(logits, 100, 0.0, top_k=3, top_p=0.5).tolist()) == {int(logits.argmax())}


def test_top_k_and_top_p_keep_what_they_say() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def kept(top_k: int, top_p: float) -> int:
        out = top_k_top_p_filter(scores, torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]))
        return int(torch.isfinite(out).sum())

    assert [kept(k, 1.0) for k in (0, 1, 2, 5, 99)] == [5, 1, 2, 5, 5]
    assert [kept(0, p) for p in (0.01, 0.5, 0.6, 0.7, 0.86, 1.0)] == [1, 1, 2, 2, 4, 5]
    # After top_k 2 the two tokens have 5/7 and 2/7: top_p applies to those.
    assert kept(2, 0.7) == 1 and kept(2, 0.72) == 2


def test_rows_do_not_disturb_each_other() -> None:
    logits = torch.randn(4, 30)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3])
    top_k = torch.tensor([0, 5, 0, 2], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 0.8, 0.9])
    keys = keys_of(range(4), range(4))
    together = perturbed_scores(logits, SamplingRows(temperature, top_k, top_p, keys))
    for row in range(4):
        one = slice(row, row + 1)
        alone = perturbed_scores(logits[one], SamplingRows(temperature[one], top_k[one], top_p[one], keys[one]))
        assert torch.equal(together[one], alone)
