"""The update with its own backward pass: gradients, what it keeps for them, and the layers it stands on."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from sera_serve import SeraConfig
from sera_serve.layers import SeraLinear, block_update
from sera_serve.layers.block_update import _NARROW, add_update


@pytest.mark.parametrize(("split", "segment_rank"), [(1, 3), (3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("use_mixer", [True, False])
def test_gradients_are_those_of_finite_differences(split: int, segment_rank: int, use_mixer: bool) -> None:
    torch.manual_seed(0)
    rank, d_in, d_out = split * segment_rank, 3 * split, 2 * split
    shapes: list[tuple[int, ...]] = [(2, 3, d_out), (2, 3, d_in), (d_in, segment_rank), (segment_rank, d_out)]
    h, x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    c = torch.randn(rank, rank, dtype=torch.float64, requires_grad=True) if use_mixer else None

    def update(h: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        # A leaf must not be overwritten.
        return add_update(h.clone(), x, a, c, b, split, 0.7)

    inputs = (h, x, a, b) if c is None else (h, x, a, b, c)
    assert torch.autograd.gradcheck(update, inputs)


@pytest.mark.parametrize("segment_rank", [1, 2])
@pytest.mark.parametrize("width", [_NARROW - 2, _NARROW, _NARROW + 2])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("use_mixer", [True, False])
@pytest.mark.parametrize("is_intel", [True, False])
def test_every_form_has_the_gradients_of_the_dense_update(
    is_intel: bool, segment_rank: int, width: int, whole: bool, use_mixer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow and wide segments, and wide ones in pieces: the last piece is shorter than the others."""
    monkeypatch.setattr(block_update, "_is_intel", lambda: is_intel)
    split, tokens = 3, 7
    if not whole:
        monkeypatch.setattr(block_update, "_WHOLE", 0)
        monkeypatch.setattr(block_update, "_PIECE", -(-3 * split * width // torch.get_num_threads()))
    torch.manual_seed(0)
    rank, d = split * segment_rank, split * width

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    h, x, a, b = leaf(tokens, d), leaf(tokens, d), leaf(d, segment_rank), leaf(segment_rank, d)
    c = leaf(rank, rank) if use_mixer else None
    leaves = [t for t in (h, x, a, b, c) if t is not None]
    upstream = torch.randn(tokens, d, dtype=torch.float64)
    dense_a = torch.block_diag(*a.view(split, width, segment_rank))
    dense_b = torch.block_diag(*b.view(segment_rank, split, width).transpose(0, 1))
    dense = h + 0.7 * (x @ dense_a @ (c if c is not None else torch.eye(rank, dtype=torch.float64)) @ dense_b)
    want = torch.autograd.grad(dense, leaves, upstream)
    found = add_update(h.clone(), x, a, c, b, split, 0.7)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, leaves, upstream)
    torch.testing.assert_close(gradients, want, rtol=1e-12, atol=1e-12)
    # Several processes warn of others.
    assert [gradient.stride() for gradient in gradients] == [leaf.stride() for leaf in leaves]


@pytest.mark.parametrize("factors", [f for f in product((False, True), repeat=3) if any(f)])
def test_frozen_factors_and_inputs_change_no_other_gradient(factors: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(12, 2), torch.randn(8, 8), torch.randn(2, 8)]
    rows, upstream = torch.randn(5, 12), torch.randn(5, 8)

    def gradients(trained: tuple[bool, ...], *, input_too: bool) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(needs) for t, needs in zip(tensors, trained, strict=True)]
        x = rows.clone().requires_grad_(input_too)
        a, c, b = leaves
        add_update(torch.zeros(5, 8), x, a, c, b, 4, 0.5).backward(upstream)
        return [leaf.grad for leaf in leaves] + [x.grad]

    whole = gradients((True, True, True), input_too=True)
    for input_too in (False, True):
        part = gradients(factors, input_too=input_too)
        for needs, mine, full in zip((*factors, input_too), part, whole, strict=True):
            assert (mine is not None) == needs
            if mine is not None and full is not None:
                assert torch.equal(mine, full)


def saved_elements(layer: SeraLinear, x: Tensor) -> int:
    """Elements that a forward pass keeps for its backward pass, without the layer's own parameters."""
    own = {p.data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("split", "use_mixer", "factors", "kept"),
    [
        # Beside the input, x A alone is kept, whatever the method.
        (8, True, ("a", "c", "b"), 40 * 64 + 40 * 8),
        (1, False, ("a", "b"), 40 * 64 + 40 * 8),
        # A frozen A needs no input, and a frozen C and B need no x A.
        (8, True, ("c", "b"), 40 * 8),
        (1, False, ("b",), 40 * 8),
        (8, True, ("a",), 40 * 64),
    ],
)
def test_only_what_a_gradient_needs_is_kept(split: int, use_mixer: bool, factors: Any, kept: int) -> None:
    config = SeraConfig(8, split, 8.0, "all-linear", use_mixer=use_mixer, train_factors=factors)
    layer = SeraLinear(nn.Linear(64, 32), config)
    assert saved_elements(layer, torch.randn(40, 64, requires_grad=True)) == kept


def test_a_bfloat16_base_keeps_its_dtype_and_its_input() -> None:
    torch.manual_seed(2)
    layer = SeraLinear(nn.Linear(64, 32, dtype=torch.bfloat16), SeraConfig(8, 8, 8.0, "all-linear"))
    nn.init.normal_(layer.sera_b)
    x = torch.randn(10, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    want = layer.base(x).float() + x.float() @ layer.delta_weight()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert layer.sera_a.grad is not None and layer.sera_a.grad.dtype == torch.float32


@pytest.mark.parametrize(("split", "segment_rank"), [(1, 8), (1, 16), (8, 1), (4, 2)])
@pytest.mark.parametrize("shape", [(12, 64), (3, 4, 64)])
def test_the_gradients_of_an_input_are_summed_in_place(split: int, segment_rank: int, shape: tuple[int, ...]) -> None:
    layer = SeraLinear(nn.Linear(64, 32), SeraConfig(split * segment_rank, split, 8.0, "all-linear"))
    # The base and the update both have a gradient for the result of the product.
    y = layer(torch.randn(shape, requires_grad=True) * 2)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        y.backward(torch.randn(y.shape))
    called = {event.key for event in watched.key_averages()}
    assert "aten::mm" in called and "aten::add_" in called
    assert "aten::add" not in called, "a sum took new memory"


@pytest.mark.parametrize("width", [32, 96])
def test_a_base_whose_output_is_a_view(width: int) -> None:
    # GPT-2's layer returns a view of its product; the update is written into it.
    torch.manual_seed(3)
    layer = SeraLinear(Conv1D(width, 32), SeraConfig(8, 4, 8.0, "all-linear"))
    nn.init.normal_(layer.sera_b)
    x = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, width)
    got = torch.autograd.grad(layer(x), [x, layer.sera_a, layer.sera_b], upstream)
    dense = layer.base(x) + x @ layer.delta_weight()
    want = torch.autograd.grad(dense, [x, layer.sera_a, layer.sera_b], upstream)
    for mine, full in zip(got, want, strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_layer_has_the_same_gradients() -> None:
    torch.manual_seed(4)
    layer = SeraLinear(nn.Linear(32, 32), SeraConfig(8, 8, 8.0, "all-linear"))
    nn.init.normal_(layer.sera_b)
    x = torch.randn(6, 32, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.sera_a])
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum()
    for mine, other in zip(torch.autograd.grad(again, [x, layer.sera_a]), plain, strict=True):
        assert torch.equal(mine, other)
