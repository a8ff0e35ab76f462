"""Decoder layers with sums and norms in one kernel: which layers take it, and that they give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_fused_attention import small_llama
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sera_kernels import AdapterBatch, AdapterTables
from sera_kernels.norm import add_norm
from sera_kernels.rotary import rotate_and_write
from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext
from sera_serve.engine.loop.attention_backend import RowKeys
from sera_serve.engine.loop.fused_attention import fuse_attention
from sera_serve.engine.loop.fused_layer import FusedLayer, fuse_layers
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.torch_attention import TorchAttention
from sera_serve.layers import (
    AdapterContext,
    SideStream,
    adaptable_linears,
    attach_serving,
    find_shared_inputs,
    served_mlp,
)
from sera_serve.layers.gpu_layers import fuse_norms

# Rank and split of three adapters.
SINGLE, MIXED = [(8, 8), (4, 4), (1, 1)], [(8, 8), (4, 1), (8, 4)]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_mlp, "_can_fuse", lambda mlp: True)


class InPlaceSide(SideStream):
    """Gives updates back instead of adding them, on the one stream that there is."""

    def __init__(self) -> None:
        pass

    def can_fork(self) -> bool:
        return True

    def mark(self) -> Any:
        return None

    @contextmanager
    def fork(self, ready: Any) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass


def served(model: LlamaForCausalLM, shapes: list[tuple[int, int]], side: SideStream | None = None) -> AdapterContext:
    tables = AdapterTables.empty(len(adaptable_linears(model)), 3)
    torch.manual_seed(1)
    pool = torch.randn(1 << 13) / 4
    for slot, (rank, split) in enumerate(shapes):
        # The second adapter's factors are not on a boundary of 16 bytes.
        tables.offset[:, slot], tables.rank[:, slot], tables.split[:, slot] = 67 * slot, rank, split
    tables.scaling.fill_(1.0)
    tables.mixer[:, 0] = 1
    tables.offset[3, 1] = -1
    context = AdapterContext(pool, tables)
    attach_serving(model, context, find_shared_inputs(model), side)
    return context


def fused(model: LlamaForCausalLM, add: Callable[..., tuple[Tensor, Tensor]] = add_norm) -> tuple[PagedModel, int]:
    fuse_norms(model)
    paged = PagedModel(model)
    assert fuse_attention(paged, TorchAttention(), rotate_and_write) == 2
    return paged, fuse_layers(paged, TorchAttention(), add)


@torch.no_grad()
def logits(paged: PagedModel, context: AdapterContext, slots: list[int] | None) -> Tensor:
    """Of a prompt of six tokens, and of a static step of two rows after it."""
    pool = KeyValuePool(paged.shapes, 8, paged.dtype, paged.device, TorchAttention())
    ids, at = torch.arange(6)[None] * 7, torch.arange(6)
    batch = None if slots is None else AdapterBatch(torch.tensor(slots, dtype=torch.int32))
    with context.run(batch):
        prompt = paged.logits(ids, at[None], StepContext(pool, at + PAGE_SIZE, [Part(6, np.array([6]))]), 0)
    table, lengths = torch.tensor([[1], [1]]), torch.tensor([7, 7])
    places = torch.tensor([PAGE_SIZE + 6, PAGE_SIZE + 6])
    two = None if slots is None else AdapterBatch(torch.tensor(slots[:2], dtype=torch.int32))
    with context.run(two):
        step = StepContext(pool, places, rows=RowKeys(table, lengths))
        decoded = paged.logits(torch.tensor([[9, 9]]), torch.tensor([[6, 6]]), step, 0)
    return torch.cat([prompt, decoded])


@pytest.mark.slow
@pytest.mark.parametrize("side", [None, InPlaceSide()], ids=["in place", "beside"])
@pytest.mark.parametrize("shapes", [SINGLE, MIXED], ids=["single", "mixed"])
def test_fused_layers_give_the_same(shapes: list[tuple[int, int]], side: SideStream | None) -> None:
    plain, model = small_llama(), small_llama()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_mlp, "_can_fuse", lambda mlp: False)
        context = served(plain, shapes)
    unfused = PagedModel(plain)
    own = served(model, shapes, side)
    paged, count = fused(model)
    assert count == 2 and all(isinstance(layer.forward, FusedLayer) for layer in model.model.layers)
    base = logits(unfused, context, None)
    for slots in (None, [0, 1, 2, -1, 1, 0]):
        want = logits(unfused, context, slots)
        torch.testing.assert_close(logits(paged, own, slots), want, rtol=1e-4, atol=1e-4)
        assert slots is None or max(slots) < 0 or (want - base).abs().max() > 0.1


class HalvesItsStream(LlamaDecoderLayer):
    """Has every part of the common form, and does something else."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(hidden_states, **kwargs)
        return result - hidden_states / 2


def test_a_layer_that_computes_something_else_keeps_its_own_form() -> None:
    model = small_llama()
    served(model, SINGLE)
    model.model.layers[1].__class__ = HalvesItsStream
    assert fused(model)[1] == 1
    assert isinstance(model.model.layers[0].forward, FusedLayer)
    assert not isinstance(model.model.layers[1].forward, FusedLayer)


def test_a_kernel_that_gives_something_else_is_not_used() -> None:
    def without_update(x: Tensor, y: Tensor, weight: Tensor, eps: float, update: Tensor | None) -> tuple[Tensor, ...]:
        hidden, normed = add_norm(x, y, weight, eps, update)
        return hidden, 1.05 * normed

    model = small_llama()
    served(model, SINGLE)
    assert fused(model, without_update)[1] == 0  # type: ignore[arg-type]
