"""One product for layers that share an input, and norms of one kernel: the same numbers, on a CPU here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sera_kernels import AdapterBatch, AdapterTables
from sera_kernels.norm import rms_norm
from sera_serve.layers import AdapterContext, attach_serving, find_shared_inputs, served_linear
from sera_serve.layers.gpu_layers import JoinedProducts, OneKernelNorm, fuse_norms, join_products
from support.factories import random_decoder
from support.graph_recorder import static_add_updates


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_share_one_weight_with_their_modules(bias: bool) -> None:
    layers = [nn.Linear(12, width, bias=bias) for width in (4, 7, 1)]
    x = torch.randn(2, 3, 12)
    want = [layer(x) for layer in layers]
    joined = JoinedProducts(layers)
    for layer, mine, right in zip(layers, joined(x), want, strict=True):
        torch.testing.assert_close(mine, right)
        torch.testing.assert_close(layer(x), right)
    # Written through the module, read by the product: they are the same memory.
    with torch.no_grad():
        layers[1].weight.zero_()
    assert joined(x)[1].abs().max() == (layers[1].bias.abs().max() if bias else 0)
    again = JoinedProducts(layers)
    assert again._weight.data_ptr() == joined._weight.data_ptr(), "the second model object joins nothing anew"


def test_neighbours_in_memory_that_are_not_one_tensor_are_joined_anew() -> None:
    layers = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    memory = torch.randn(7, 4)
    layers[0].weight.data, layers[1].weight.data = memory[:3], memory[4:]
    assert JoinedProducts(layers)._weight.shape == (6, 4)


def test_only_layers_that_are_alike_are_joined() -> None:
    class Scaled(nn.Linear):
        pass

    assert join_products([nn.Linear(4, 4), nn.Linear(4, 4)]) is None, "on a CPU nothing is joined"
    assert join_products([nn.Linear(4, 4)]) is None
    meta = torch.device("meta")
    assert join_products([nn.Linear(4, 4, device=meta), Scaled(4, 4, device=meta)]) is None


def test_a_model_with_joined_products_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_decoder()
    ids = torch.randint(259, (1, 9))
    groups = find_shared_inputs(base.model)
    shapes = base.module_shapes()
    tables = AdapterTables.empty(len(shapes), 2)
    tables.rank.fill_(4)
    tables.split.fill_(4)
    tables.scaling.fill_(0.1)
    end = 0
    for row, (d_in, d_out) in enumerate(shapes.values()):
        tables.offset[row, 1], end = end, end + d_in + d_out
    pool = torch.randn(end)
    monkeypatch.setattr(served_linear, "add_updates", static_add_updates(4))

    def logits(join: Callable[..., JoinedProducts | None], slot: int | None) -> torch.Tensor:
        monkeypatch.setattr(served_linear, "join_products", join)
        model = copy.deepcopy(base.model)
        context = AdapterContext(pool, tables)
        attach_serving(model, context, groups)
        batch = None if slot is None else AdapterBatch(torch.full((9,), slot, dtype=torch.int32))
        with torch.no_grad(), context.run(batch):
            out: torch.Tensor = model(ids).logits
        return out

    joined = []

    def join(layers: list[nn.Linear]) -> JoinedProducts | None:
        if len(layers) < 2:
            return None
        joined.append(len(layers))
        return JoinedProducts(layers)

    for slot in (None, 0, 1):
        torch.testing.assert_close(logits(join, slot), logits(lambda layers: None, slot), rtol=1e-4, atol=1e-4)
    assert sorted(set(joined)) == [2, 3], "gate and up; q, k and v"
    assert not torch.allclose(logits(join, 1), logits(join, None), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, GptOssRMSNorm])
def test_plain_norms_are_replaced(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind(48), kind(48)).to(dtype)
    for norm in model:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x = torch.randn(5, 48, dtype=dtype)
    want = model(x)
    weight = model[0].weight
    fuse_norms(model)
    assert all(type(norm) is OneKernelNorm for norm in model) and model[0].weight is weight
    torch.testing.assert_close(model(x), want, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_norm_uses_its_kernel_where_the_layout_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = OneKernelNorm(nn.Parameter(torch.randn(32)), 1e-5)
    monkeypatch.setattr(norm, "_kernel", rms_norm)
    x = torch.randn(2, 3, 32)
    want = nn.functional.rms_norm(x, (32,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(norm(x.transpose(0, 1)), want.transpose(0, 1))


def test_a_norm_takes_an_offered_result_for_the_very_tensor_and_once() -> None:
    norm = OneKernelNorm(nn.Parameter(torch.randn(8)), 1e-5)
    x, offered = torch.randn(2, 8), torch.zeros(2, 8)
    norm.offer(x, offered)
    assert norm(x) is offered
    assert torch.equal(norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-5))
    norm.offer(x, offered)
    assert norm(x.clone()).any(), "an equal tensor is another input"
    assert norm(x).any(), "what was not asked for is forgotten"


class ScaledRMSNorm(LlamaRMSNorm):
    """Differs where eps counts alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 2 * self.variance_epsilon)
        return self.weight * hidden_states * scale


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, ScaledRMSNorm, nn.LayerNorm])
def test_other_norms_are_left_as_they_are(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(48))
    fuse_norms(model)
    assert type(model[0]) is kind
