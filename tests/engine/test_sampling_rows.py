"""`choose_tokens` on a CPU: min-p, penalties, bias and log-probabilities, from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sera_serve.engine import sampling
from sera_serve.engine.sampling import (
    IN_PROMPT,
    NO_TOKEN,
    Penalties,
    SamplingRows,
    adjusted_scores,
    choose_tokens,
    sampling_keys,
    top_k_top_p_filter,
)
from support.sampling import choose


def rows_of(
    many: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingRows:
    return SamplingRows(
        torch.full((many,), temperature),
        torch.full((many,), top_k, dtype=torch.int32),
        torch.full((many,), top_p),
        torch.from_numpy(sampling_keys(np.full(many, 5, np.uint64), np.arange(many, dtype=np.uint64))),
        torch.full((many,), min_p),
    )


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 0.3, "top_k": 2}, [0, 1]),
    ],
)
def test_draws_follow_the_softmax_of_the_kept_tokens(limits: dict[str, float], kept: list[int]) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    many = 20_000
    tokens = choose_tokens(logits.expand(many, -1), rows_of(many, **limits))  # type: ignore[arg-type]
    counts = torch.bincount(tokens, minlength=6)
    assert counts[kept].sum() == many
    want = logits[kept].softmax(0) * many
    # The 0.1% quantiles of chi-square with 1, 2 and 5 degrees of freedom.
    limit = {2: 10.8, 3: 13.8, 6: 20.5}[len(kept)]
    assert ((counts[kept] - want) ** 2 / want).sum().item() < limit


def test_tokens_are_those_of_the_definition_in_float64() -> None:
    logits = torch.randn(40, 300) * 3
    for limits in ({}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.1}, {"top_p": 0.5, "min_p": 0.4}, {"temperature": 0.0}):
        rows = rows_of(40, **limits)  # type: ignore[arg-type]
        want = [
            choose(row, **{"temperature": 1.0} | limits, key=key)
            for row, key in zip(logits, rows.keys.tolist(), strict=True)
        ]  # type: ignore[arg-type]
        assert choose_tokens(logits, rows).tolist() == want


def test_min_p_keeps_tokens_near_the_likeliest() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    none = torch.zeros(1, dtype=torch.int32), torch.ones(1)

    def kept(min_p: float) -> int:
        return int(torch.isfinite(top_k_top_p_filter(scores, *none, torch.tensor([min_p]))).sum())

    assert [kept(p) for p in (0.0, 0.05, 0.15, 0.25, 0.35, 0.9, 1.0, 2.0)] == [5, 5, 4, 3, 2, 1, 1, 1]


def test_top_p_of_one_keeps_every_token_whatever_the_rounding() -> None:
    scores = torch.randn(2, 100_000) * 10
    kept = top_k_top_p_filter(scores, torch.zeros(2, dtype=torch.int32), torch.tensor([1.0, 0.5]))
    assert torch.equal(kept[0], scores[0])
    assert not torch.isfinite(kept[1]).all()


def test_penalties_follow_their_definition() -> None:
    scores = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0, 1.0]])
    # In the prompt: tokens 0, 1, 5. Put out: 2 once, 3 three times, 5 twice.
    counts = torch.tensor([[IN_PROMPT, IN_PROMPT, 1, 3, 0, IN_PROMPT + 2]], dtype=torch.int32)
    penalties = Penalties(counts, torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([0.5]))
    want = [1.0, -4.0, 1.0 - 0.25 - 0.5, -4.0 - 0.75 - 0.5, 1.0, 0.5 - 0.5 - 0.5]
    assert adjusted_scores(scores, penalties, None).tolist() == [want]
    # The bias comes first.
    bias = torch.tensor([[-3.0, 3.0, 0.0, 0.0, -torch.inf, 0.0]])
    assert adjusted_scores(scores, penalties, bias).tolist() == [[-2.0, 0.5, *want[2:4], -torch.inf, want[5]]]
    assert choose_tokens(scores, None, penalties, bias).tolist() == [1]


def test_a_bias_bars_tokens_and_hides_no_overflow() -> None:
    logits = torch.randn(3, 50)
    logits[2, 7] = torch.nan
    bias = torch.full((3, 50), -torch.inf)
    bias[:, 33] = 5.0
    tokens = choose_tokens(logits.bfloat16(), rows_of(3, temperature=0.3), bias=bias)
    assert tokens.tolist() == [33, 33, NO_TOKEN]


def test_a_cpu_and_a_gpu_without_triton_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(sampling, "choose_tokens_torch", lambda *args: called.append("torch"))
    monkeypatch.setattr("sera_kernels.sampling.choose_tokens_triton", lambda *args: called.append("triton"))

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    logits = torch.zeros(1, 2)
    choose_tokens(logits)
    choose_tokens(logits.as_subclass(OnGpu))
    monkeypatch.setattr(sampling, "_has_triton", lambda: False)
    choose_tokens(logits.as_subclass(OnGpu))
    assert called == ["torch", "triton", "torch"]
