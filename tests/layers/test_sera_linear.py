"""The trainable layer against the dense product x A C B, and attaching the layer to models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sera_serve import SeraConfig, attach_adapter
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import SeraLinear, adapter_tensors, detach_adapter, module_specs


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


def dense_blocks(layer: SeraLinear) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dense A, C and B. A and B are filled by the format's definition, without the layer's own code."""
    split, segment_rank = layer.config.split, layer.config.segment_rank
    a = torch.zeros(layer.d_in, layer.config.rank, dtype=torch.float64)
    b = torch.zeros(layer.config.rank, layer.d_out, dtype=torch.float64)
    for row in range(layer.d_in):
        block = row // (layer.d_in // split)
        for j in range(segment_rank):
            a[row, block * segment_rank + j] = layer.sera_a[row, j]
    for column in range(layer.d_out):
        block = column // (layer.d_out // split)
        for j in range(segment_rank):
            b[block * segment_rank + j, column] = layer.sera_b[j, column]
    return a, layer.sera_c, b


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from([1, 2, 3, 4, 8]),
    segment_rank=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    use_mixer=st.booleans(),
    batch=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    seed=st.integers(0, 2**16),
)
def test_layer_is_the_dense_product(
    split: int, segment_rank: int, widths: tuple[int, int], use_mixer: bool, batch: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    d_in, d_out = split * widths[0], split * widths[1]
    config = SeraConfig(split * segment_rank, split, 3.0, "all-linear", use_mixer=use_mixer)
    layer = SeraLinear(nn.Linear(d_in, d_out), config).double()
    nn.init.normal_(layer.sera_b)
    x = torch.randn(*batch, d_in, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*batch, d_out, dtype=torch.float64)

    a, c, b = dense_blocks(layer)
    delta = 3.0 / config.rank * (a @ b if c is None else a @ c @ b)
    torch.testing.assert_close(layer.delta_weight(), delta)

    got = layer(x)
    torch.testing.assert_close(got, layer.base(x) + x @ delta)
    parameters = [p for p in (x, layer.sera_a, layer.sera_c, layer.sera_b) if p is not None]
    got_gradients = torch.autograd.grad(got, parameters, upstream)
    want_gradients = torch.autograd.grad(layer.base(x) + x @ delta, parameters, upstream)
    for mine, dense in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(mine, dense)


def test_update_is_exactly_zero_at_the_start() -> None:
    model = tiny_llama()
    tokens = torch.randint(64, (2, 9))
    before = model(tokens).logits
    layers = attach_adapter(model, SeraConfig(8, 4, 16.0, "all-linear"))
    assert torch.equal(model(tokens).logits, before)
    for layer in layers.values():
        assert torch.count_nonzero(layer.sera_a) == layer.sera_a.numel()
        assert layer.sera_c is not None and torch.count_nonzero(layer.sera_c) == layer.sera_c.numel()


def assert_fills(drawn: Tensor, bound: float) -> None:
    """Many numbers were drawn uniformly between two bounds."""
    assert -bound <= drawn.min().item() < -0.9 * bound and 0.9 * bound < drawn.max().item() <= bound
    assert abs(drawn.mean().item()) < 0.25 * bound


def test_initialisation_uses_the_fan_in_of_a_block() -> None:
    layer = SeraLinear(nn.Linear(4096, 64), SeraConfig(16, 16, 16.0, "all-linear"))
    assert layer.sera_c is not None
    assert_fills(layer.sera_a, 1 / math.sqrt(4096 / 16))
    assert_fills(layer.sera_c, 1 / math.sqrt(16))


def test_b_is_drawn_if_only_c_trains() -> None:
    layer = SeraLinear(nn.Linear(32, 1024), SeraConfig(8, 8, 16.0, "all-linear", train_factors=("c",)))
    assert_fills(layer.sera_b, 1)
    layer(torch.randn(3, 32)).sum().backward()
    assert layer.sera_c is not None and layer.sera_c.grad is not None
    assert torch.count_nonzero(layer.sera_c.grad) > 0
    assert layer.sera_a.grad is None and layer.sera_b.grad is None


def test_only_the_named_factors_get_gradients() -> None:
    model = tiny_llama()
    attach_adapter(model, SeraConfig(4, 1, 8.0, ("q_proj",), use_mixer=False, train_factors=("b",)))
    model(torch.randint(64, (1, 5))).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"model.layers.{i}.self_attn.q_proj.sera_b" for i in range(2)}


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    layer = SeraLinear(nn.Linear(32, 16), SeraConfig(4, 2, 4.0, "all-linear", dropout=0.5))
    nn.init.normal_(layer.sera_b)
    x = torch.randn(64, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.sera_b)
    layer.train()
    assert torch.equal(layer(x), layer.base(x))


def test_detach_restores_the_model() -> None:
    model = tiny_llama()
    modules = dict(model.named_modules())
    attach_adapter(model, SeraConfig(4, 2, 8.0, ("q_proj", "down_proj")))
    tensors, specs = adapter_tensors(model), module_specs(model)
    assert len(tensors) == 2 * 2 * 3 and len(specs) == 2 * 2
    assert specs["model.layers.1.mlp.down_proj"] == {
        "d_in": 48,
        "d_out": 32,
        "rank": 4,
        "split": 2,
        "use_mixer": True,
        "scaling": 2.0,
    }
    detach_adapter(model)
    assert dict(model.named_modules()) == modules


def test_transposed_layers_of_gpt2_are_adapted() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).eval()
    layers = attach_adapter(model, SeraConfig(4, 2, 4.0, ("c_attn",)))
    (layer,) = layers.values()
    assert (layer.d_in, layer.d_out) == (32, 96)
    nn.init.normal_(layer.sera_b)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta_weight(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "param", "remedy"),
    [
        ({"rank": 0}, "rank", "at least 1"),
        ({"rank": 12, "split": 8}, "split", "[1, 2, 3, 4, 6, 12]"),
        ({"lora_alpha": float("nan")}, "lora_alpha", "positive"),
        ({"dropout": 1.0}, "dropout", "[0, 1)"),
        ({"target_modules": ()}, "target_modules", "all-linear"),
        ({"target_modules": "q_proj"}, "target_modules", "tuple"),
        ({"train_factors": ()}, "train_factors", "at least one"),
        ({"train_factors": ("c",), "use_mixer": False}, "train_factors", "nothing"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], param: str, remedy: str) -> None:
    values: dict[str, object] = {"rank": 8, "split": 8, "lora_alpha": 16.0, "target_modules": "all-linear"}
    with pytest.raises(InvalidConfiguration) as refusal:
        SeraConfig(**(values | changes))  # type: ignore[arg-type]
    assert refusal.value.param == param and remedy in refusal.value.message


def test_a_refusal_names_the_remedy_and_does_not_change_the_model() -> None:
    model = tiny_llama()
    modules = list(model.named_modules())
    with pytest.raises(InvalidConfiguration, match="it has q_proj"):
        attach_adapter(model, SeraConfig(4, 4, 4.0, ("q_porj",)))
    with pytest.raises(InvalidConfiguration, match="a split of 1, 2, 4, 8, 16 fits") as refusal:
        attach_adapter(model, SeraConfig(32, 32, 4.0, "all-linear"))
    assert refusal.value.param == "split"
    assert list(model.named_modules()) == modules
