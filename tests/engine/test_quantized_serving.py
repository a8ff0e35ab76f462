"""An adapter on a quantized base gives what a float64 forward of the dequantized weights gives."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, quantize_base
from sera_serve.engine import ServingEngine
from sera_serve.layers import adaptable_linears
from sera_serve.layers.quantized_linear import KINDS, QuantizedLinear
from sera_serve.quantization import QuantizationKind
from support.engine import SHAPE, acting_for, classify, collect
from support.factories import encoded, greedy, merged, random_adapter, random_decoder, random_encoder

Start = Callable[..., ServingEngine]
TEXTS = ["short", "a longer text, of some words", "x"]
LABELS, WRITER = "acme/labels", "acme/writer"


def reference(quantized: FrozenBase, plain: FrozenBase) -> FrozenBase:
    """The plain base with the dequantized weights, in float64."""
    result = FrozenBase(plain.name, copy.deepcopy(plain.model).double(), plain.tokenizer, plain.info, plain.kind)
    for path, layer in adaptable_linears(quantized.model).items():
        assert isinstance(layer, QuantizedLinear)
        linear = result.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = layer.quantized.dequantize(torch.float32).double()
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [random_decoder, random_encoder])
def test_it_is_a_forward_of_the_dequantized_weights(
    kind: QuantizationKind, make: Callable[[], FrozenBase], store: AdapterStore, start_engine: Start
) -> None:
    plain, base = make(), make()
    quantize_base(base, kind)
    # Made for the base itself: one adapter for both.
    bundle = random_adapter(plain, SHAPE, 2, labels=["no", "yes"], strength=0.5, pooling="mean", max_length=64)
    store.publish(bundle, LABELS)
    engine = start_engine(base, store)

    async def ask() -> tuple[torch.Tensor, torch.Tensor]:
        vectors = await engine.embed(LABELS, TEXTS, acting_for(LABELS), normalize=False)
        scores = await classify(engine, LABELS, TEXTS)
        given = [list(item.probabilities.values()) for item in scores.results]
        return torch.from_numpy(np.stack(vectors.vectors)), torch.tensor(given)

    got, probabilities = asyncio.run(ask())
    exact = merged(reference(base, plain), bundle)
    want = torch.cat([exact.pooled_states(*encoded(exact, [text], 256), "mean") for text in TEXTS])
    head = bundle.tensors["head.weight"].double(), bundle.tensors["head.bias"].double()
    # Quantizing adds nothing to the rounding of a float32 base, which the same tests of such a base allow.
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities.double(), (want @ head[0].T + head[1]).softmax(-1), rtol=1e-4, atol=1e-5)
    other = merged(plain, bundle)
    far = torch.cat([other.pooled_states(*encoded(other, [text], 256), "mean") for text in TEXTS])
    assert (got - far).abs().max() > 1e-2


def test_text_on_a_quantized_base(store: AdapterStore, start_engine: Start) -> None:
    plain, base = random_decoder(), random_decoder()
    quantize_base(base, "nf4")
    bundle = random_adapter(plain, SHAPE, 1, strength=0.5)
    store.publish(bundle, WRITER)
    engine = start_engine(base, store)
    exact = reference(base, plain)
    tokens = plain.preprocessor.prompt("once", None)

    async def ask(adapter: str | None) -> list[int]:
        return (await collect(engine, adapter=adapter, token_ids=tokens, max_new_tokens=12, temperature=0)).token_ids

    assert asyncio.run(ask(WRITER)) == greedy(merged(exact, bundle), tokens, 12)
    assert asyncio.run(ask(None)) == greedy(exact, tokens, 12)
