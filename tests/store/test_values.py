"""Finite tensors pass whatever their sum is; others are named."""

import pytest
import torch

from adapters_store.errors import NotFinite
from adapters_store.format.validation import check_values

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("values", [[LARGEST] * 9, [-LARGEST] * 9, [LARGEST, -LARGEST], []], ids=str)
def test_a_sum_beyond_float32_is_no_reason_to_refuse(values: list[float]) -> None:
    check_values({"a": torch.tensor(values)})


@pytest.mark.parametrize("values", [[LARGEST] * 9 + [torch.inf], [torch.inf, -torch.inf], [0.0, torch.nan]], ids=str)
def test_elements_that_are_not_finite_are_counted(values: list[float]) -> None:
    bad = sum(not -LARGEST <= value <= LARGEST for value in values)
    with pytest.raises(NotFinite, match=f"in {bad} of {len(values)} elements"):
        check_values({"a": torch.tensor(values)})
