"""The kernels that choose tokens, against float64 and against torch. Without a GPU, Triton's interpreter runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sera_kernels import sampling
from sera_kernels.sampling import choose_tokens_triton
from sera_serve.engine.sampling import (
    IN_PROMPT,
    NO_TOKEN,
    Penalties,
    SamplingRows,
    choose_tokens_torch,
    sampling_keys,
)
from support.sampling import choose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, INF = float("nan"), float("inf")
# temperature, top_k, top_p, min_p
LIMITS = [
    (0.0, 3, 0.5, 0.1),
    (1e-7, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.5, 5, 0.8, 0.0),
    (1.0, 10**6, 0.6, 0.0),
    (2.0, 0, 1e-6, 0.0),
    (0.9, 0, 0.9, 0.2),
    (1.1, 0, 1.0, 0.05),
    (1.0, 40, 0.99, 0.01),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that small vocabularies need several of each kind."""
    monkeypatch.setattr(sampling, "TILE", 64)
    monkeypatch.setattr(sampling, "CHUNK", 4)
    monkeypatch.setattr(sampling, "LISTED_TILE", 8)
    monkeypatch.setattr(sampling, "TRIAL_TILE", 16)


def rows_of(limits: list[tuple[float, int, float, float]], truncate: bool = True, seed: int = 0) -> SamplingRows:
    temperature, top_k, top_p, min_p = (torch.tensor(column, device=DEVICE) for column in zip(*limits, strict=True))
    keys = sampling_keys(np.arange(len(limits), dtype=np.uint64), np.full(len(limits), seed, np.uint64))
    return SamplingRows(
        temperature.float(), top_k.int(), top_p.float(), torch.from_numpy(keys).to(DEVICE), min_p.float(), truncate
    )


def run(
    logits: Tensor,
    rows: SamplingRows | None = None,
    penalties: Penalties | None = None,
    bias: Tensor | None = None,
) -> list[int]:
    limits = None if rows is None else (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.keys)
    given = penalties and (penalties.counts, penalties.repetition, penalties.frequency, penalties.presence)
    truncate = rows is not None and rows.truncate
    tokens = choose_tokens_triton(logits.to(DEVICE), limits, truncate, given, bias)
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def expected(logits: Tensor, rows: SamplingRows) -> list[int]:
    """The tokens in float64."""
    assert rows.min_p is not None
    columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.keys)
    return [
        choose(row, *values) for row, *values in zip(logits.float().cpu(), *(c.tolist() for c in columns), strict=True)
    ]


@pytest.mark.parametrize("vocabulary", [1, 7, 200])
@pytest.mark.usefixtures("small_tiles")
def test_mixed_rows_match_float64(vocabulary: int) -> None:
    logits = torch.randn(len(LIMITS), vocabulary) * 3
    rows = rows_of(LIMITS)
    assert run(logits, rows) == expected(logits, rows)
    assert choose_tokens_torch(logits.to(DEVICE), rows).tolist() == expected(logits, rows)


@pytest.mark.parametrize("vocabulary", [1000, 4097])
def test_the_tiles_of_the_product_match_float64(vocabulary: int) -> None:
    limits = [LIMITS[0], LIMITS[2], LIMITS[4], LIMITS[7]]
    logits = torch.randn(len(limits), vocabulary) * 3
    rows = rows_of(limits)
    assert run(logits, rows) == expected(logits, rows)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("guesses", [0, 1, 8])
def test_a_flat_row_finds_its_threshold_by_trial_and_by_bisection(
    guesses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small top_p, the best token by chance is rarely kept: several are tried."""
    monkeypatch.setattr(sampling, "GUESSES", guesses)
    logits = torch.randn(4, 300) * 0.1
    rows = rows_of([(1.0, 0, p, 0.0) for p in (0.01, 0.05, 0.3)] + [(0.5, 0, 0.2, 0.9)], seed=guesses)
    assert run(logits, rows) == expected(logits, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 300) * 3).to(dtype)[:, :250]
    rows = rows_of(LIMITS[3:7])
    assert run(logits, rows) == expected(logits, rows)


@pytest.mark.usefixtures("small_tiles")
def test_equal_scores_are_kept_together_and_the_first_wins_greedily() -> None:
    limits = [(0.0, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 3, 0.4, 0.0), (3.0, 0, 0.5, 0.0)] * 2
    logits = torch.randint(4, (10, 90)).float()
    logits[:5] = 2.5
    rows = rows_of(limits)
    want = expected(logits, rows)
    assert want[0] == 0
    assert want[1] != 0, "the noise decides among equals"
    assert run(logits, rows) == want


@pytest.mark.usefixtures("small_tiles")
def test_scores_that_division_makes_equal_are_kept_together() -> None:
    """Two float32 next to 1.9 have one third in common: top_k 1 and top_p keep both, in whatever chunk they are."""
    pair = (torch.tensor(1.9).view(torch.int32) + torch.tensor([37, 38], dtype=torch.int32)).view(torch.float32)
    assert pair[0] != pair[1] and pair[0] / 3 == pair[1] / 3
    logits = torch.full((12, 40), -50.0)
    logits[:, 3], logits[:, 30] = pair
    rows = rows_of([(3.0, 1, 1.0, 0.0), (3.0, 0, 0.3, 0.0)] * 6)
    want = expected(logits, rows)
    assert set(want[::2]) == set(want[1::2]) == {3, 30}
    assert run(logits, rows) == want


@pytest.mark.usefixtures("small_tiles")
def test_equal_scores_count_for_top_p_as_far_as_top_k_has_room() -> None:
    """top_k 3 leaves the highest score and two of the equal ones: 0.65 is more than the highest's part of these."""
    logits = torch.tensor([2.0, 3.0] + [2.0] * 8).expand(8, -1).contiguous()
    rows = rows_of([(1.0, 3, 0.65, 0.0), (1.0, 3, 0.55, 0.0)] * 4)
    want = expected(logits, rows)
    assert set(want[1::2]) == {1} != set(want[::2])
    assert run(logits, rows) == want


# The interpreter's numpy warns of infinities whose results the kernel leaves out.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("limits", [(0.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (0.5, 2, 0.9, 0.0), (1.0, 0, 0.5, 0.1)])
def test_hostile_scores(limits: tuple[float, int, float, float]) -> None:
    logits = torch.randn(9, 130)
    logits[0, 100] = NAN
    logits[1] = NAN
    logits[2, 129] = INF
    logits[3] = -INF
    logits[4, :] = -INF
    logits[4, 70] = -3.0
    logits[5, ::3] = -INF
    logits[6, 128] = 3e38
    logits[7, :2] = torch.tensor([NAN, INF])
    logits[8] = -1e30
    rows = rows_of([limits] * 9)
    got = run(logits, rows)
    want = choose_tokens_torch(logits.to(DEVICE), rows).tolist()
    assert got == want
    # Half of the largest score is not finite either.
    huge = NO_TOKEN if 0 < limits[0] < 1 else 128
    assert [got[i] for i in (0, 1, 2, 3, 4, 6, 7)] == [-1, -1, -1, -1, 70, huge, -1]
    if limits[0] == 0:
        assert run(logits) == got, "the launch for greedy rows alone"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("score", [1e38, -1e38])
def test_scores_that_the_temperature_makes_infinite_choose_no_token(score: float) -> None:
    limits = [(1e-5, *limit) for limit in ((0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.1))]
    logits = torch.full((4, 130), score) * (1 + torch.rand(4, 130))
    assert run(logits, rows_of(limits)) == [NO_TOKEN] * 4
    assert run(logits * 1e-33, rows_of(limits)) != [NO_TOKEN] * 4


@triton.jit
def noise_kernel(bits, exact, quick, SIZE: tl.constexpr, LIBDEVICE: tl.constexpr):
    at = tl.arange(0, SIZE)
    hashed = tl.load(bits + at)
    tl.store(exact + at, sampling._noise(hashed, LIBDEVICE))
    tl.store(quick + at, sampling._quick_noise(hashed))


def test_noise_is_exact_and_the_quick_noise_is_close() -> None:
    """The margin of `_best_with_noise` is five times the error allowed here."""
    limit = 2**23
    bits = torch.cat([torch.arange(1500), torch.arange(limit - 1500, limit), torch.randint(limit, (1096,))])
    # Where the series ends.
    bits[3000:3100] = int(limit * 15 / 16) + torch.arange(-50, 50)
    exact, quick = torch.empty(2, 4096, device=DEVICE)
    compiled = isinstance(noise_kernel, triton.JITFunction)
    noise_kernel[(1,)](bits.int().to(DEVICE).view(torch.uint32), exact, quick, 4096, compiled, enable_fp_fusion=False)
    want = -(-((bits.double() + 0.5) / limit).log()).log()
    assert torch.allclose(exact.cpu().double(), want, rtol=3e-7, atol=3e-7)
    assert (quick.cpu().double() - want).abs().max() < 2e-5


@pytest.mark.usefixtures("small_tiles")
def test_penalties_and_bias() -> None:
    rows = rows_of(LIMITS)
    many, vocabulary = len(LIMITS), 150
    logits = torch.randn(many, vocabulary, device=DEVICE) * 3
    counts = torch.randint(-3, 4, logits.shape, dtype=torch.int32, device=DEVICE).clamp(min=0)
    counts += torch.randint(2, logits.shape, dtype=torch.int32, device=DEVICE) * IN_PROMPT
    values = [torch.rand(many, device=DEVICE) + offset for offset in (0.7, -0.5, -0.5)]
    bias = torch.randn_like(logits).masked_fill(torch.rand_like(logits) < 0.2, -INF)
    penalties = Penalties(counts, *values)
    tokens = run(logits, rows, penalties, bias)
    assert tokens == choose_tokens_torch(logits, rows, penalties, bias).tolist()
    assert tokens != run(logits, rows)


def test_no_rows() -> None:
    assert run(torch.empty(0, 5)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 1.5, 0.0, -1.0, 0.5])
    many = 400
    rows = rows_of([(1.0, 0, 1.0, 0.0)] * many, truncate=False, seed=3)
    counts = torch.bincount(torch.tensor(run(logits.expand(many, -1).contiguous(), rows)), minlength=6)
    want = logits.softmax(0) * many
    chi_square = ((counts - want) ** 2 / want).sum().item()
    assert chi_square < 20.5, "0.1% quantile of chi-square with 5 degrees of freedom"


def test_machine_code_has_wide_loads_and_spills_nothing() -> None:
    script = Path(__file__).parents[1] / "support" / "compile_sampling.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    for figures in json.loads(done.stdout):
        assert figures["stack"] == 0, figures
        # A tile of 2048 scores in 256 threads, 16 bytes at a time.
        assert figures["wide_loads"] >= (1 if figures["dtype"] == "bf16" else 2), figures
