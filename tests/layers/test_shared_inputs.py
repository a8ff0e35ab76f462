"""Layers that share an input are found and computed together. Results are right for other orders of calls too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sera_kernels import AdapterBatch, AdapterTables
from sera_serve.base import FrozenBase
from sera_serve.layers import (
    AdapterContext,
    ServedLinear,
    adaptable_linears,
    attach_serving,
    find_shared_inputs,
    served_linear,
)
from support.factories import random_decoder, random_encoder


def names(groups: list[list[str]]) -> list[list[str]]:
    return [[path.rpartition(".")[2] for path in group] for group in groups]


def test_groups_of_real_architectures() -> None:
    llama = find_shared_inputs(random_decoder().model)
    assert names(llama) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    bert = find_shared_inputs(random_encoder().model)
    assert names(bert)[:2] == [["query", "key", "value"], ["dense"]]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    assert names(find_shared_inputs(gpt2)) == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]


@pytest.fixture
def served_decoder() -> tuple[FrozenBase, AdapterContext]:
    base = random_decoder()
    rows = len(adaptable_linears(base.model))
    tables = AdapterTables.empty(rows, 2)
    pool = torch.randn(4096) / 8
    tables.offset[:, 1], tables.rank[:, 1], tables.split[:, 1], tables.scaling[:, 1] = 0, 4, 4, 1.0
    context = AdapterContext(pool, tables)
    attach_serving(base.model, context, find_shared_inputs(base.model))
    return base, context


def test_batches_without_adapters_are_bit_identical(served_decoder: tuple[FrozenBase, AdapterContext]) -> None:
    base, context = served_decoder
    tokens = torch.randint(256, (2, 7))
    want = random_decoder().model(tokens).logits
    assert torch.equal(base.model(tokens).logits, want)
    with context.run(None):
        assert torch.equal(base.model(tokens).logits, want)
    # With a batch in which no token has an adapter, the outputs are not changed either.
    with context.run(AdapterBatch(torch.full((14,), -1, dtype=torch.int32))):
        assert torch.equal(base.model(tokens).logits, want)


def test_one_grouped_call_for_each_shared_input(
    served_decoder: tuple[FrozenBase, AdapterContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, context = served_decoder
    calls: list[int] = []
    grouped = served_linear.add_updates

    def counted(x: object, outputs: list[object], *rest: object) -> None:
        calls.append(len(outputs))
        grouped(x, outputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(served_linear, "add_updates", counted)
    with context.run(AdapterBatch(torch.ones(7, dtype=torch.int32))):
        base.model(torch.randint(256, (1, 7)))
    assert calls == [3, 1, 2, 1] * 2


def test_other_orders_of_calls_are_right(served_decoder: tuple[FrozenBase, AdapterContext]) -> None:
    base, context = served_decoder
    attention = base.model.get_submodule("model.layers.0.self_attn")
    q, k = attention.q_proj, attention.k_proj
    assert isinstance(q, ServedLinear) and isinstance(k, ServedLinear)
    first, second = torch.randn(5, 64), torch.randn(5, 64)
    with context.run(AdapterBatch(torch.ones(5, dtype=torch.int32))):
        alone = [layer(x.clone()) for x in (first, second) for layer in (q, k)]
        # Interleaved inputs, a repeated call, and an output that is never fetched.
        assert torch.equal(q(first), alone[0])
        assert torch.equal(k(second), alone[3])
        assert torch.equal(k(first), alone[1])
        assert torch.equal(k(first), alone[1])
        assert torch.equal(q(second), alone[2])
    base_only = nn.functional.linear(first, q.base.weight)
    assert not torch.allclose(alone[0], base_only), "the adapter does nothing: the test would see no mix-up"


def test_passes_must_not_overlap(served_decoder: tuple[FrozenBase, AdapterContext]) -> None:
    _, context = served_decoder
    batch = AdapterBatch(torch.ones(1, dtype=torch.int32))
    # A pass of the base model alone counts too.
    for outer in (batch, None):
        with context.run(outer):
            with pytest.raises(RuntimeError, match="already running"), context.run(batch):
                pass
            assert context.batch is outer
        assert context.batch is None


def test_an_output_of_one_batch_is_never_returned_to_another(served_decoder: tuple[FrozenBase, AdapterContext]) -> None:
    base, context = served_decoder
    attention = base.model.get_submodule("model.layers.0.self_attn")
    x = torch.randn(5, 64)
    with context.run(AdapterBatch(torch.zeros(5, dtype=torch.int32))):
        want = attention.k_proj(x.clone())
    # The output of k_proj in this pass is not fetched. The next pass uses the same tensor as input.
    with context.run(AdapterBatch(torch.ones(5, dtype=torch.int32))):
        other = attention.k_proj(x.clone())
        attention.q_proj(x)
    assert not torch.equal(want, other)
    with context.run(AdapterBatch(torch.zeros(5, dtype=torch.int32))):
        assert torch.equal(attention.k_proj(x), want)
