"""The choice of tokens by the kernel against float64: each token must be the best, or as good but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.setting import Row, Setting
from sera_serve.engine.sampling import (
    IN_PROMPT,
    Penalties,
    SamplingRows,
    adjusted_scores,
    choose_tokens,
    choose_tokens_torch,
    gumbel_noise,
    top_k_top_p_filter,
)

# A token whose score is this much below the best may have been chosen: logarithms are rounded.
SCORE_TOLERANCE = 1e-4
# A token at the edge of top_p may be kept or not where the sum of probabilities before it is this near to top_p.
MASS_TOLERANCE = 1e-5


def vocabulary(setting: Setting) -> int:
    """Llama-3's."""
    return 700 if setting.small else 128256


def model_logits(setting: Setting, rows: int, seed: int = 0) -> Tensor:
    """A few likely tokens and a long tail: sorted scores fall with the logarithm of the rank, as a model's do."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocabulary(setting), generator=draw) * 2.2
    likely = torch.randint(vocabulary(setting), (rows, 60), generator=draw)
    falling = 14 - 2.2 * torch.log1p(torch.arange(60.0))
    return scores.scatter_add(1, likely, falling.expand(rows, -1)).to(setting.device)


def flat_logits(setting: Setting, rows: int, seed: int = 0) -> Tensor:
    """No likely tokens: what limits tokens must look at many of them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary(setting), generator=draw).to(setting.device)


def same_rows(
    setting: Setting, rows: int, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None
) -> SamplingRows:
    """Rows of one temperature with equal limits."""
    device = setting.device
    keys = torch.randint(2**31 - 1, (rows,), generator=torch.Generator().manual_seed(0)).int()
    return SamplingRows(
        torch.full((rows,), 0.8, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.full((rows,), top_p, device=device),
        keys.to(device),
        None if min_p is None else torch.full((rows,), min_p, device=device),
        truncate=top_k > 0 or top_p < 1 or min_p is not None,
    )


def mixed_rows(setting: Setting, rows: int) -> SamplingRows:
    """Greedy and sampled rows with all kinds of limits, in one batch."""
    same = same_rows(setting, rows, top_k=1, min_p=0.0)

    def cycle(*values: float) -> Tensor:
        return torch.tensor(values, device=setting.device)[torch.arange(rows, device=setting.device) % len(values)]

    return replace(
        same,
        temperature=cycle(0.0, 0.7, 1.0, 1.3),
        top_k=cycle(0, 40, 1, 200, 0, 20000).int(),
        top_p=cycle(1.0, 0.9, 0.95, 0.3, 0.999),
        min_p=cycle(0.0, 0.0, 0.05),
    )


Case = tuple[Callable[[Setting, int], Tensor], Callable[[Setting, int], SamplingRows | None]]
CASES: dict[str, Case] = {
    "greedy": (model_logits, lambda setting, rows: None),
    "sampled": (model_logits, same_rows),
    "top_k 50, top_p 0.9": (model_logits, lambda setting, rows: same_rows(setting, rows, 50, 0.9)),
    "top_k 50": (model_logits, lambda setting, rows: same_rows(setting, rows, 50)),
    "top_p 0.95": (model_logits, lambda setting, rows: same_rows(setting, rows, top_p=0.95)),
    "min_p 0.05": (model_logits, lambda setting, rows: same_rows(setting, rows, min_p=0.05)),
    "flat, top_p 0.9": (flat_logits, lambda setting, rows: same_rows(setting, rows, top_p=0.9)),
    "flat, top_k 50, top_p 0.9": (flat_logits, lambda setting, rows: same_rows(setting, rows, 50, 0.9)),
    "mixed": (model_logits, mixed_rows),
}


def check_sampling(setting: Setting) -> Iterator[Row]:
    """One row for each case, with `correct`."""
    count = 4 if setting.small else 64
    for name, (make, limits) in CASES.items():
        logits, rows = make(setting, count), limits(setting, count)
        yield {"case": name} | compared(logits, rows)
        if name in ("sampled", "mixed") and setting.on_gpu:
            yield {"case": f"{name}, bfloat16"} | compared(logits.bfloat16(), rows)
    logits, rows = model_logits(setting, count, 3), mixed_rows(setting, count)
    draw = torch.Generator().manual_seed(5)
    counts = (torch.randint(40, logits.shape, generator=draw) - 37).clamp(min=0).int()
    counts[:, ::97] += IN_PROMPT
    factor = torch.full((count,), 1.2, device=setting.device)
    penalties = Penalties(counts.to(setting.device), factor, factor * 0.25, factor * 0.5)
    bias = flat_logits(setting, count, 9)
    yield {"case": "penalties and bias"} | compared(logits, rows, penalties, bias)
    bad = model_logits(setting, count, 4)
    bad[0, 77], bad[1, 5], bad[2], bad[3, 9] = torch.nan, torch.inf, -torch.inf, -torch.inf
    yield {"case": "not finite"} | compared(bad, rows)
    yield {"case": "not finite, greedy"} | compared(bad, None)


def compared(
    logits: Tensor, rows: SamplingRows | None, penalties: Penalties | None = None, bias: Tensor | None = None
) -> Row:
    """Whether each row's token is right, and whether a second launch gives the same."""
    got = choose_tokens(logits, rows, penalties, bias)
    again = choose_tokens(logits, rows, penalties, bias)
    same = got == choose_tokens_torch(logits, rows, penalties, bias)
    right = same | _as_good(got, adjusted_scores(logits.float(), penalties, bias), rows)
    row = {"rows": len(logits), "differ_from_torch": int((~same).sum()), "repeats": torch.equal(got, again)}
    return row | {"correct": bool(right.all()) and row["repeats"]}


def _as_good(got: Tensor, scores: Tensor, rows: SamplingRows | None) -> Tensor:
    """bool (rows,): whether no token that may be kept is better by more than rounding, in float64."""
    index = got.clamp(min=0).unsqueeze(1)
    exact = scores.double()
    if rows is None:
        return (got >= 0) & (exact.gather(1, index)[:, 0] == exact.max(1).values)
    is_greedy = (rows.temperature < 1e-6).unsqueeze(1)
    scaled = exact / torch.where(is_greedy, 1.0, rows.temperature.double().unsqueeze(1))
    noise = gumbel_noise(rows.keys, scores.shape[1]).double()
    right = torch.zeros_like(got, dtype=torch.bool)
    for shift in (-MASS_TOLERANCE, 0.0, MASS_TOLERANCE):
        top_p = torch.where(rows.top_p < 1, rows.top_p.double() + shift, 1.0)
        kept = top_k_top_p_filter(scaled, rows.top_k, top_p, rows.min_p) if rows.truncate else scaled
        drawn = torch.where(is_greedy, exact, kept + noise)
        right |= drawn.gather(1, index)[:, 0] >= drawn.max(1).values - SCORE_TOLERANCE
    return right & (got >= 0)
