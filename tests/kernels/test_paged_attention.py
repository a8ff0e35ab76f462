"""Paged attention and the write of keys and values, against float64. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sera_kernels.attention_overflow import spread_overflow
from sera_kernels.paged_attention import LEAST_SPLIT_KEYS, SPLIT_KEYS, choose_splits, paged_decode, write_kv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
PAGE = 32
# float32 sums in float32; the other dtypes round their weights too.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# What infinite scores make numpy say, which is the interpreter.
NUMPY = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    width: int = 64
    value_width: int | None = None
    kv_heads: int = 2
    groups: int = 2
    lengths: tuple[int, ...] = (1, 33, 97, 150)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int | None = None
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.int64


@dataclass
class Operands:
    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    sinks: Tensor | None


def operands(case: Case) -> Operands:
    """Make random keys within the lengths. All else of the pool is NaN, and every row's last page a page of NaN."""
    rows, heads = len(case.lengths), case.kv_heads * case.groups
    pages = -(-max(case.lengths) // PAGE) + 1
    widths = (case.width, case.value_width or case.width)
    keys, values = (torch.full((rows * pages + 1, PAGE, case.kv_heads, width), NAN) for width in widths)
    table = torch.randperm(rows * pages).view(rows, pages) + 1
    for row, length in enumerate(case.lengths):
        at = torch.arange(length)
        for pool, width in zip((keys, values), widths, strict=True):
            pool[table[row, at // PAGE], at % PAGE] = torch.randn(length, case.kv_heads, width)
    # A view of more heads, as of fused projections.
    q = torch.randn(rows, heads + 1, case.width)[:, 1:]
    return Operands(
        q.to(DEVICE, case.dtype),
        keys.to(DEVICE, case.dtype),
        values.to(DEVICE, case.dtype),
        table.to(DEVICE, case.table_dtype),
        torch.tensor(case.lengths, dtype=case.table_dtype, device=DEVICE),
        torch.randn(heads).to(DEVICE, case.dtype) if case.sinks else None,
    )


def reference(case: Case, given: Operands) -> Tensor:
    """Attend row by row in float64."""
    outputs = []
    for row, length in enumerate(case.lengths):
        at = torch.arange(length, device=DEVICE)
        page = given.table[row, at // PAGE].long()
        k, v = (pool[page, at % PAGE].double().repeat_interleave(case.groups, 1) for pool in (given.keys, given.values))
        scores = torch.einsum("hd,thd->ht", given.q[row].double(), k) * case.width**-0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if case.window is not None:
            scores = scores.masked_fill(at < length - case.window, -torch.inf)
        if given.sinks is not None:
            scores = torch.cat([scores, given.sinks.double()[:, None]], 1)
        weights = scores.softmax(1)[:, :length] if scores.shape[1] else scores
        outputs.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(outputs)


def attend(case: Case, given: Operands, out: Tensor | None = None) -> Tensor:
    return paged_decode(
        given.q,
        given.keys,
        given.values,
        given.table,
        given.lengths,
        scale=case.width**-0.5,
        window=case.window,
        softcap=case.softcap,
        sinks=given.sinks,
        out=out,
        splits=case.splits,
    )


def check(case: Case) -> None:
    given = operands(case)
    want = reference(case, given)
    got = attend(case, given)
    assert got.shape == want.shape and got.dtype == case.dtype
    bound = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)
    assert torch.equal(got, attend(case, given, out=torch.full_like(got, NAN))), "equal inputs give equal bits"


@pytest.mark.parametrize("width", [64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_widths_of_heads(width: int) -> None:
    check(Case(width, lengths=(1, 45)))
    check(Case(width, lengths=(70,), dtype=torch.bfloat16, splits=2))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8, 12, 16, 17])
def test_heads_of_one_key_value_head(groups: int) -> None:
    check(Case(kv_heads=1, groups=groups, lengths=(33, 140)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("splits", [1, 2, 3, 20])
def test_dtypes_and_splits(dtype: torch.dtype, splits: int) -> None:
    # Some rows have fewer keys than splits demand, and some splits have none.
    check(Case(lengths=(1, 32, 129, 257, 511), kv_heads=1, splits=splits, dtype=dtype))


def test_more_splits_than_are_combined_in_one_round() -> None:
    check(Case(kv_heads=1, lengths=(20 * LEAST_SPLIT_KEYS - 5, 40), splits=20))


@pytest.mark.parametrize("splits", [1, 3])
def test_tokens_of_one_sequence_share_its_row_of_the_table(splits: int) -> None:
    given = operands(Case(lengths=(150, 97, 33), table_dtype=torch.int32))
    owners = torch.tensor([2, 0, 0, 1, 0, 2], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([33, 149, 150, 97, 1, 32], device=DEVICE)
    q = torch.randn(6, 4, 64, device=DEVICE)
    for window in (None, 40):
        options = {"scale": 0.125, "splits": splits, "window": window}
        apart = paged_decode(q, given.keys, given.values, given.table[owners.long()], lengths, **options)
        shared = paged_decode(q, given.keys, given.values, given.table, lengths, owners=owners, **options)
        assert torch.equal(shared, apart) and shared.isfinite().all()


@pytest.mark.parametrize("window", [1, 7, 32, 100, 150, 151])
def test_windows(window: int) -> None:
    check(Case(window=window))
    check(Case(window=window, lengths=(400, 3), splits=3, table_dtype=torch.int32))


@pytest.mark.parametrize("splits", [1, 3])
def test_softcap_sinks_and_widths_that_differ(splits: int) -> None:
    check(Case(softcap=0.5, splits=splits))
    check(Case(sinks=True, splits=splits, lengths=(1, 5, 300)))
    check(Case(96, 64, softcap=2.0, sinks=True, window=50, splits=splits, dtype=torch.float16))
    check(Case(64, 128, groups=1, kv_heads=3, splits=splits))


def test_rows_of_no_keys_and_padding_rows() -> None:
    case = Case(lengths=(0, 3, 1), splits=2)
    given = operands(case)
    # A padding row: the scratch page, of zeros, and one key.
    given.keys[0], given.values[0], given.table[2] = 0, 0, 0
    got = attend(case, given)
    assert torch.equal(got[[0, 2]], torch.zeros_like(got[[0, 2]]))
    torch.testing.assert_close(got.double(), reference(case, given), atol=5e-6, rtol=5e-6)
    given.sinks = torch.randn(4, device=DEVICE)
    assert torch.equal(attend(case, given)[0], torch.zeros_like(got[0]))
    none = replace(given, q=given.q[:0], table=given.table[:0], lengths=given.lengths[:0])
    assert attend(case, none).shape == (0, 4, 64)


@NUMPY
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), NAN])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": True}, {"window": 30}, {"splits": 3}], ids=str)
def test_scores_that_are_not_finite_show_where_they_belong(value: float, options: dict[str, float]) -> None:
    case = replace(Case(lengths=(20, 300, 20)), **options)
    given = operands(case)
    given.q[..., 3] = given.q[..., 3].abs() + 0.1
    given.keys[given.table[1, 290 // PAGE], 290 % PAGE, 1, 3] = value
    got = attend(case, given).isfinite().all(2)
    assert got.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]


@NUMPY
def test_a_score_that_overflows_is_not_a_key_of_no_weight() -> None:
    case = Case(lengths=(20,))
    given = operands(case)
    given.q[0, 0], given.keys[given.table[0, 0], 4, 0] = 1e20, -1e20
    assert not attend(case, given)[0, 0].isfinite().any()


def test_values_that_are_not_finite_show() -> None:
    case = Case(lengths=(20, 20))
    given = operands(case)
    given.values[given.table[0, 0], 4, 0, 7] = NAN
    got = attend(case, given)
    assert got[0, :2, 7].isnan().all() and got[0, :, :7].isfinite().all() and got[1].isfinite().all()


def test_operands_that_do_not_fit_are_refused() -> None:
    given = operands(Case())
    for change, message in [
        ({"q": given.q[..., :60]}, "do not fit together"),
        ({"table": given.table[:3]}, "4 rows of q, 3 of the table"),
        ({"keys": given.keys.half()}, "keys torch.float16"),
        ({"q": given.q.transpose(0, 2).contiguous().transpose(0, 2)}, "must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(Case(), replace(given, **change))
    operand = (given.q, given.keys, given.values, given.table, given.lengths)
    owners = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    for wrong, message in [(owners[:3], "4 rows of q, 3 owners"), (owners[::2], "owners must be contiguous")]:
        with pytest.raises(ValueError, match=message):
            paged_decode(*operand, scale=1, owners=wrong)


def test_splits_follow_from_shapes() -> None:
    # An H200 has 132 multiprocessors. 64 rows of 8 heads fill it; one row needs all the splits that are worth it.
    assert choose_splits(64, 512, 8, 132) == 1
    assert choose_splits(64, 4096, 8, 132) == 4096 // SPLIT_KEYS
    assert choose_splits(1, 8192, 8, 132) == 64
    assert choose_splits(1, 256, 8, 132) == 256 // LEAST_SPLIT_KEYS
    assert choose_splits(1, 32, 1, 132) == 1
    # A table of 131,072 keys: the splits of all rows are bounded.
    assert [choose_splits(rows, 1 << 17, 8, 132) for rows in (1, 64, 96, 256, 512)] == [128, 128, 64, 32, 16]


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 48), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_written_to_their_places(width: int, value_width: int, dtype: torch.dtype) -> None:
    tokens, kv_heads = 5, 3
    keys = torch.randn(4, PAGE, kv_heads, width).to(DEVICE, dtype)
    values = torch.randn(4, PAGE, kv_heads, value_width).to(DEVICE, dtype)
    # Heads before tokens, as models hand them on, and a view of a larger tensor.
    k = torch.randn(kv_heads, tokens, width).to(DEVICE, dtype).transpose(0, 1)
    v = torch.randn(tokens, kv_heads + 2, value_width).to(DEVICE, dtype)[:, 1:-1]
    places = torch.tensor([0, 127, 31, 32, 64], device=DEVICE)
    want = [pool.flatten(0, 1).index_copy(0, places, new).view_as(pool) for pool, new in ((keys, k), (values, v))]
    write_kv(keys, values, places, k, v)
    assert torch.equal(keys, want[0]) and torch.equal(values, want[1])
    with pytest.raises(ValueError, match="do not fit the pools"):
        write_kv(keys, values, places, k.double(), v)
    with pytest.raises(ValueError, match="must be contiguous"):
        write_kv(keys[:, ::2], values, places, k, v)


@NUMPY
def test_overflows_of_packed_sequences_spread_within_a_sequence_and_a_head() -> None:
    lengths, heads, kv_heads, width = ((3, 40), (50, 50), (2, 2)), 4, 2, 80
    query_ends, key_ends = (
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        for counts in zip(*lengths, strict=True)
    )
    for value in (float("inf"), float("-inf"), NAN, 1e20):
        q, k = torch.randn(55, heads, width, device=DEVICE), torch.randn(92, kv_heads, width, device=DEVICE)
        out = torch.randn(55, heads, 48, device=DEVICE)
        before, bad = out.clone(), torch.zeros(55, heads, dtype=torch.bool, device=DEVICE)
        spread_overflow(out, q, k, query_ends, key_ends)
        assert torch.equal(out, before)
        # A query of the second sequence; a key of the first one, and one of the second.
        q[20, 3, 7] = k[39, 1, 79] = k[41, 0, 0] = value
        bad[20, 3] = bad[:3, 2:] = bad[3:53, :2] = True
        spread_overflow(out, q, k, query_ends, key_ends)
        assert torch.equal(out.isnan().all(2), bad) and torch.equal(out[~bad], before[~bad])


@pytest.mark.slow
def test_machine_code_has_wide_loads_and_no_spills() -> None:
    cases = [
        {"capability": capability, "dtype": dtype, "width": width, "splits": splits, "extras": extras}
        for capability, dtype, width, splits, extras in [
            (80, "bf16", 128, 1, False),
            (90, "bf16", 128, 1, False),
            (90, "bf16", 64, 4, True),
            (90, "bf16", 256, 4, True),
            (90, "fp16", 80, 1, False),
            (90, "fp32", 128, 4, True),
            (100, "bf16", 128, 1, True),
        ]
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_attention.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    for case, row in zip(cases, rows, strict=True):
        assert row["local_loads"] == row["local_stores"] == row["stack"] == 0, (case, row)
        # Keys and values go to shared memory asynchronously, 16 bytes a thread: none in narrower accesses.
        assert row["wide_copies"] == row["copies"] >= 12, (case, row)
        # Three programs fit a multiprocessor: 65536 registers, 227 KiB of shared memory (two programs and 163 on 8.0).
        assert row["registers"] * row["threads"] * 3 <= 65536, (case, row)
        assert (
            row["shared"] * (2 if case["capability"] == 80 else 3) <= (163 if case["capability"] == 80 else 227) * 1024
        )
        assert (row["products"] > 0) == (case["dtype"] != "fp32"), (case, row)
