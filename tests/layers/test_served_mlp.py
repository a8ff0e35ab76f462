"""MLPs that are computed with updates and activation in one pass, here by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sera_kernels import AdapterBatch, AdapterTables, ShapeClasses, triton_path
from sera_serve.base import FrozenBase
from sera_serve.layers import AdapterContext, adaptable_linears, attach_serving, find_shared_inputs, served_mlp
from sera_serve.layers.served_linear import SideStream
from sera_serve.layers.served_mlp import find_silu_mlp
from support.factories import random_decoder

PATHS = ["mlp.gate_proj", "mlp.up_proj"]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_mlp, "_can_fuse", lambda mlp: True)


def served(side_stream: SideStream | None = None) -> tuple[FrozenBase, AdapterContext]:
    base = random_decoder()
    rows = len(adaptable_linears(base.model))
    tables = AdapterTables.empty(rows, 3)
    torch.manual_seed(1)
    pool = torch.randn(8192) / 8
    for slot, (rank, split) in enumerate([(8, 8), (4, 1), (4, 4)]):
        tables.offset[:, slot], tables.rank[:, slot], tables.split[:, slot] = 64 * slot, rank, split
        tables.scaling[:, slot] = 1.0
    context = AdapterContext(pool, tables)
    attach_serving(base.model, context, find_shared_inputs(base.model), side_stream)
    return base, context


def logits(base: FrozenBase, context: AdapterContext, slots: list[int] | None) -> Tensor:
    tokens = torch.arange(6).view(2, 3)
    batch = None if slots is None else AdapterBatch(torch.tensor(slots, dtype=torch.int32))
    with context.run(batch), torch.no_grad():
        result: Tensor = base.model(tokens).logits
    return result


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_one_pass_computes_what_the_layers_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = served()
    mlp = fused[0].model.get_submodule("model.layers.1.mlp")
    assert "forward" in mlp.__dict__
    monkeypatch.setattr(served_mlp, "_can_fuse", lambda mlp: False)
    plain = served()
    assert "forward" not in plain[0].model.get_submodule("model.layers.1.mlp").__dict__
    for slots in ([0, 1, 2, -1, 1, 0], [-1] * 6, [2] * 6):
        torch.testing.assert_close(logits(*fused, slots), logits(*plain, slots), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(*fused, None), logits(*plain, None), rtol=1e-5, atol=1e-5)
    # The updates of gate and up matter: without them the comparison above would say nothing.
    rows = [
        row
        for row, path in enumerate(adaptable_linears(random_decoder().model))
        if path.endswith(("gate_proj", "up_proj"))
    ]
    before = logits(*fused, [2] * 6)
    fused[1].tables.offset[rows] = -1
    assert (logits(*fused, [2] * 6) - before).abs().max() > 1e-2


class SideByName(SideStream):
    """Writes down what would run on which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def can_fork(self) -> bool:
        return True

    def mark(self) -> Any:
        self.log.append("mark")
        return "marked"

    @contextmanager
    def fork(self, ready: Any) -> Iterator[None]:
        assert ready == "marked"
        self.log.append("fork")
        yield
        self.log.append("back")

    def join(self) -> None:
        self.log.append("join")


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_updates_are_computed_beside_the_base_layers(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_mlp, "_can_fuse", lambda mlp: fused)
    side = SideByName()
    log = side.log

    def logged(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(name)
            return own(*arguments, **options)

        return call

    monkeypatch.setattr(nn.Linear, "forward", logged("base", nn.Linear.forward))
    forked, plain = served(side), served()
    monkeypatch.setattr(triton_path, "updates_of", logged("updates", triton_path.updates_of))
    log.clear()
    slots = [0, 1, 2, -1, 1, 0]
    result = logits(*forked, slots)
    beside = ["fork", "updates", "back"]
    # The last base layer is the output embedding.
    updates_first = [["mark", *beside, *["base"] * layers, "join"] for layers in (3, 1, 2, 1)] * 2
    assert log == [*chain.from_iterable(updates_first), "base"]
    log.clear()
    # The second adapter has one segment of rank 4.
    forked[1].tables.set_classes(ShapeClasses(single=16))
    logits(*forked, [0, 0, 2, -1, 2, 0])
    products_first = [
        ["mark", *["base"] * layers, *beside, "join"] if layers > 1 else ["mark", *beside, "base", "join"]
        for layers in (3, 1, 2, 1)
    ] * 2
    assert log == [*chain.from_iterable(products_first), "base"]
    torch.testing.assert_close(result, logits(*plain, slots), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["base", "updates"])
def test_the_other_stream_comes_back_when_a_layer_fails(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side = SideByName()
    base, context = served(side)
    side.log.clear()

    def fails(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    if where == "base":
        monkeypatch.setattr(nn.Linear, "forward", fails)
    else:
        monkeypatch.setattr(triton_path, "updates_of", fails)
    with pytest.raises(torch.OutOfMemoryError):
        logits(base, context, [0, 1, 2, -1, 1, 0])
    assert side.log[:2] == ["mark", "fork"] and side.log[-1] == "join"


@pytest.mark.parametrize("side", [None, SideByName()], ids=["in place", "beside"])
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_an_input_may_have_any_layout(side: SideStream | None) -> None:
    base, context = served(side)
    mlp = base.model.get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 64, 6).transpose(1, 2)
    with context.run(AdapterBatch(torch.tensor([0, 1, 2, -1, 1, 0], dtype=torch.int32))), torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp(x.contiguous()))


def test_gains_and_offsets_wait_for_the_complete_outputs() -> None:
    (base, context), (plain, other) = served(SideByName()), served()
    for tables in (context.tables, other.tables):
        tables.vectors[:, 2] = 4096
    slots = [0, 2, 2, -1, 1, 0]
    got, want = logits(base, context, slots), logits(plain, other, slots)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    context.tables.vectors[:, 2] = -1
    context.tables.set_classes(replace(context.tables.classes, vectors=False))
    assert (logits(base, context, slots) - want).abs().max() > 1e-2


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module, sign: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn, self.sign = activation, sign

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.sign * self.gate_proj(x)) * self.up_proj(x))
        return result


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_only_mlps_of_the_form_are_found() -> None:
    found = nn.ModuleDict({"mlp": Mlp(nn.SiLU())})
    assert find_silu_mlp(found, PATHS) is found["mlp"]
    assert find_silu_mlp(found, PATHS[::-1]) is None
    assert find_silu_mlp(found, ["mlp.down_proj"]) is None
    assert find_silu_mlp(nn.ModuleDict({"mlp": Mlp(nn.GELU())}), PATHS) is None
    # The parts are those of the form, and the function is not.
    assert find_silu_mlp(nn.ModuleDict({"mlp": Mlp(nn.SiLU(), -1.0)}), PATHS) is None


def test_on_a_cpu_no_mlp_is_found() -> None:
    assert find_silu_mlp(nn.ModuleDict({"mlp": Mlp(nn.SiLU())}), PATHS) is None
