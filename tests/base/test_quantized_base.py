"""A quantized base is the base with dequantized weights, in less memory, with the same fingerprint."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapters_store import NotMergeable
from benchmarks.quantized_base import weight_bytes
from sera_serve import SeraConfig
from sera_serve.base import (
    FrozenBase,
    freeze_base,
    import_base,
    merge_adapter,
    planned_bytes,
    quantize_base,
)
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import adaptable_linears, attach_adapter
from sera_serve.layers.quantized_linear import KINDS, QuantizedLinear
from sera_serve.quantization import QuantizationKind
from support.factories import byte_tokenizer, random_adapter, random_decoder, random_encoder

# Of the weight's norm, of a matrix with normal entries. Measured: 0.092, 0.007 and 0.084.
ERROR: dict[QuantizationKind, float] = {"nf4": 0.1, "int8": 0.01, "int4": 0.1}
# Bytes of 64 x 64 weights and of what belongs to them, over the 4 of float32.
SHARE: dict[QuantizationKind, float] = {"nf4": 0.45, "int8": 0.3, "int4": 0.2}


def random_gpt2() -> FrozenBase:
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=259, bos_token_id=1, eos_token_id=2)
    return freeze_base(GPT2LMHeadModel(shape), byte_tokenizer(), "random-gpt2")


BASES = {"llama": random_decoder, "bert": random_encoder, "gpt2": random_gpt2}


def states(model: Any) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10) * 11 + 3
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_it_computes_with_the_dequantized_weights(name: str, kind: QuantizationKind) -> None:
    plain, base = BASES[name](), BASES[name]()
    output = base.model.get_output_embeddings()
    quantize_base(base, kind)
    assert base.quantization == kind
    assert base.info == plain.info
    assert base.module_shapes() == plain.module_shapes()
    assert base.model.get_output_embeddings() is output
    originals = adaptable_linears(plain.model)
    for path, layer in adaptable_linears(base.model).items():
        assert isinstance(layer, QuantizedLinear)
        weight = originals[path].get_parameter("weight")
        weight = weight if isinstance(originals[path], nn.Linear) else weight.T
        error = (layer.quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
        assert 1e-3 < error < ERROR[kind]
        assert layer.quantized.nbytes < SHARE[kind] * weight.nbytes
    reference = copy.deepcopy(plain.model)
    for path, layer in adaptable_linears(base.model).items():
        assert isinstance(layer, QuantizedLinear)
        found = layer.quantized.dequantize(torch.float32)
        module = reference.get_submodule(path)
        module.get_parameter("weight").data = found if isinstance(module, nn.Linear) else found.T
    torch.testing.assert_close(states(base.model), states(reference), rtol=1e-5, atol=1e-5)
    assert (states(base.model) - states(plain.model)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradient(kind: QuantizationKind, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(96, 40).to(dtype)
    layer = QuantizedLinear(plain.weight, plain.bias, kind, "here")
    x = torch.randn(3, 5, 96, dtype=dtype, requires_grad=True)
    weight = layer.quantized.dequantize(dtype).double()
    upstream = torch.randn(3, 5, 40, dtype=dtype)
    y = layer(x)
    y.backward(upstream)
    want = x.detach().double() @ weight.T + plain.bias.double()
    # A sum of products of n terms is off by at most n units of float32, in which it is summed, times the sum of the
    # sizes; product and bias are rounded to the dtype once each.
    unit, half = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    sizes = x.detach().double().abs() @ weight.abs().T
    assert ((y.double() - want).abs() <= 96 * unit * sizes + half * (want.abs() + plain.bias.double().abs())).all()
    assert x.grad is not None
    want = upstream.double() @ weight
    sizes = upstream.double().abs() @ weight.abs()
    assert ((x.grad.double() - want).abs() <= 40 * unit * sizes + half * want.abs()).all()
    assert layer.quantized.nbytes < plain.weight.nbytes
    assert "96 -> 40" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_model_objects_share_its_memory(kind: QuantizationKind) -> None:
    base = random_decoder()
    before = weight_bytes(base.model)
    quantize_base(base, kind)
    after = weight_bytes(base.model)
    assert after < 0.7 * before
    assert planned_bytes(random_decoder().model, kind) == pytest.approx(after, rel=0.05)
    assert planned_bytes(random_decoder().model, "none") == pytest.approx(before, rel=0.01)
    shared = base.share_weights()
    both = nn.ModuleList([base.model, shared.model])
    assert weight_bytes(both) == after
    # Nothing but buffers holds tensors of its size.
    for layer in adaptable_linears(shared.model).values():
        assert isinstance(layer, QuantizedLinear)
        for value in vars(getattr(layer.quantized, "_state", layer)).values():
            if isinstance(value, torch.Tensor):
                assert any(value is buffer for buffer in base.model.buffers())
    torch.testing.assert_close(states(shared.model), states(base.model), rtol=0, atol=0)


def test_adapters_attach(kind: QuantizationKind = "nf4") -> None:
    base = random_decoder()
    quantize_base(base, kind)
    before = states(base.model)
    layers = attach_adapter(base.model, SeraConfig(8, 4, 8.0, "all-linear"))
    assert len(layers) == 14
    torch.testing.assert_close(states(base.model), before, rtol=0, atol=0)
    nn.init.normal_(next(iter(layers.values())).sera_b)
    states(base.model).sum().backward()
    assert all(layer.sera_b.grad is not None for layer in layers.values())


def test_what_it_cannot_do() -> None:
    base = random_decoder()
    bundle = random_adapter(base, SeraConfig(4, 4, 8.0, ("q_proj",)), seed=0)
    quantize_base(base, "int8")
    with pytest.raises(NotMergeable, match="quantized to int8, and rounding would change the adapter; load the base"):
        merge_adapter(base, bundle)
    with pytest.raises(InvalidConfiguration, match=r"needs the base's own weights, and those of model.* int8"):
        import_base(base).weight("model.layers.0.self_attn.q_proj")
    with pytest.raises(InvalidConfiguration, match="quantized to int8 already"):
        quantize_base(base, "nf4")
    with pytest.raises(InvalidConfiguration, match="quantize is 'int2'; choose none, nf4, int8, int4"):
        quantize_base(random_decoder(), "int2")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="groups of 32, and layer here is 48 wide; take nf4 or int8"):
        QuantizedLinear(torch.ones(8, 48), None, "int4", "here")


@pytest.mark.parametrize(("kind", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("int4", "torchao")])
def test_a_missing_library(kind: QuantizationKind, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(library):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidConfiguration, match=rf'quantize {kind} needs {library}, .*pip install "sera-serve\[qua'):
        QuantizedLinear(torch.ones(8, 64), None, kind, "here")


def test_a_library_that_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as bnb

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(bnb, "quantize_4bit", fails)
    with pytest.raises(InvalidConfiguration, match=r"bitsandbytes cannot quantize to nf4 on cpu \(no kernel for this"):
        QuantizedLinear(torch.ones(8, 64), None, "nf4", "here")
