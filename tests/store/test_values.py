"""Finite tensors pass whatever their sum is; others are named."""

import pytest
import torch

from adapters_store.errors import NotFinite
from adapters_store.format.validation import check_values, is_surely_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("values", [[LARGEST] * 9, [-LARGEST] * 9, [LARGEST, -LARGEST], []], ids=str)
def test_a_sum_beyond_float32_is_no_reason_to_refuse(values: list[float]) -> None:
    check_values({"a": torch.tensor(values)})


@pytest.mark.parametrize("values", [[LARGEST] * 9 + [torch.inf], [torch.inf, -torch.inf], [0.0, torch.nan]], ids=str)
def test_elements_that_are_not_finite_are_counted(values: list[float]) -> None:
    bad = sum(not -LARGEST <= value <= LARGEST for value in values)
    with pytest.raises(NotFinite, match=f"in {bad} of {len(values)} elements"):
        check_values({"a": torch.tensor(values)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 1 << 20, (1 << 20) + 6])
def test_one_value_that_is_not_finite_is_seen_in_every_block(dtype: torch.dtype, value: float, place: int) -> None:
    # Of float32 the sum is looked at, which larger values would take beyond it.
    tensor = torch.full(((1 << 20) + 7,), min(1e30, torch.finfo(dtype).max / 4)).to(dtype)
    tensor[::2] *= -1
    assert is_surely_finite(tensor)
    tensor[place] = value
    assert not is_surely_finite(tensor)


def test_the_largest_halves_are_finite_and_nothing_is_finite_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        largest = torch.tensor(
            [torch.finfo(dtype).max, -torch.finfo(dtype).max, 0.0, torch.finfo(dtype).tiny], dtype=dtype
        )
        assert is_surely_finite(largest) and is_surely_finite(largest[:0]) and is_surely_finite(largest[::2])
