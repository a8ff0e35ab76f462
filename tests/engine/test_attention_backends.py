"""The implementations of attention, against float64; Triton's kernels run in its interpreter where there is no GPU."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.loop import cuda_attention, torch_attention
from sera_serve.engine.loop.attention import KeyValuePool, LayerShape, Part, StepContext, attend
from sera_serve.engine.loop.attention_backend import AttentionBackend, AttentionOptions, RowKeys, choose_backend
from sera_serve.engine.loop.cuda_attention import ChunkGroup, PagedAttention, TorchVarlen
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.torch_attention import TorchAttention
from sera_serve.errors import InvalidConfiguration
from support.engine import Start, collect
from support.factories import random_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")
NAN = float("nan")


def causal(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """One sequence in float64; the last query sees all keys."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.double(), k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    last = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    at = torch.arange(len(k), device=q.device)
    hidden = at > last if options.window is None else (at > last) | (at <= last - options.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.double()[:, None, None].expand(-1, len(q), 1)], 2)
    return torch.einsum("hqt,thd->qhd", scores.softmax(2)[..., : len(k)], v)


@dataclass
class FloatVarlen:
    """Attention of packed sequences in float64. Notes its calls."""

    calls: list[tuple[ChunkGroup, AttentionOptions]] = field(default_factory=list)

    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        return options.is_plain

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, indices: ChunkGroup, options: AttentionOptions
    ) -> Tensor:
        self.calls.append((indices, options))
        ends = indices.query_ends.tolist(), indices.key_ends.tolist()
        assert indices.max_queries == max(np.diff(ends[0])) and indices.max_keys == max(np.diff(ends[1]))
        assert ends[0][-1] == len(query) and ends[1][-1] == len(key) == len(value)
        outputs = [
            causal(query[a:b], key[c:d], value[c:d], options)
            for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False)
        ]
        return torch.cat(outputs).to(query.dtype)


class Scores(TorchDispatchMode):
    """Notes how many scores are held at the same time by an attention that holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default and result.dim() == 5:
            self.counts.append(result.numel())
        return result


@dataclass(frozen=True)
class Chunk:
    """Sequences of one part: decodes if `new` is 1 and `decodes`; from the cache unless `fresh`."""

    new: int
    lengths: tuple[int, ...]
    decodes: bool = False
    fresh: bool = False


MIXED = [
    Chunk(1, (3, 40, 70), decodes=True),
    Chunk(33, (33, 33), fresh=True),
    Chunk(1, (1,), fresh=True),
    Chunk(20, (84,)),
    Chunk(1, (65,)),
]

LONG = [*MIXED, Chunk(84, (84,)), Chunk(80, (84,))]


@dataclass
class Step:
    """A step over two layers, with what attention needs and what it must give."""

    context: StepContext
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    sequences: list[list[tuple[Tensor, Tensor, Tensor]]]

    def run(self, layer: int, options: AttentionOptions) -> Tensor:
        """Write the layer's keys and values, attend."""
        states = self.queries[layer], self.keys[layer], self.values[layer]
        self.context.pool.write(layer, self.context.places, *states[1:])
        return attend(self.context, layer, *states, options)

    def check(self, layer: int, options: AttentionOptions, tolerance: float = 5e-6) -> None:
        got = self.run(layer, options)
        want = torch.cat([causal(*states, options) for states in self.sequences[layer]])
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def make_step(
    backend: AttentionBackend,
    chunks: list[Chunk],
    width: int = 16,
    value_width: int = 16,
    poison: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Sequences with random keys. With `poison`, all else of the pool is NaN."""
    heads, kv_heads, layers = 4, 2, 2
    count = sum(-(-length // PAGE_SIZE) for chunk in chunks for length in chunk.lengths)
    pool = KeyValuePool([LayerShape(kv_heads, width, value_width)] * layers, count + 2, dtype, DEVICE, backend)
    if poison:
        for tensor in (*pool.keys, *pool.values):
            tensor.fill_(NAN)
    free = iter((torch.randperm(count) + 1).tolist())
    parts, places = [], []
    states: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(layers)]
    for chunk in chunks:
        tables = []
        for length in chunk.lengths:
            own = np.array([next(free) for _ in range(-(-length // PAGE_SIZE))])
            at = np.arange(length)
            place = torch.from_numpy(own[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE).to(DEVICE)
            before = place[: length - chunk.new]
            places.append(place[length - chunk.new :])
            tables.append(own)
            for layer in range(layers):
                q = torch.randn(chunk.new, heads, width).to(DEVICE, dtype)
                k, v = (torch.randn(length, kv_heads, each).to(DEVICE, dtype) for each in (width, value_width))
                pool.flat[layer][0][before], pool.flat[layer][1][before] = k[: len(before)], v[: len(before)]
                states[layer].append((q, k, v))
        table = np.array([np.pad(own, (0, len(tables[-1]) - len(own)), constant_values=own[0]) for own in tables])
        lengths = np.array(chunk.lengths, np.int64)
        parts.append(Part(chunk.new, lengths, None if chunk.fresh else table, compiled=chunk.decodes))
    tensors: list[list[Tensor]] = [[], [], []]
    for layer in states:
        own_states = [[q, k[len(k) - len(q) :], v[len(v) - len(q) :]] for q, k, v in layer]
        for kind, pieces in zip(tensors, zip(*own_states, strict=True), strict=True):
            # Heads before tokens in memory, as models hand them on.
            kind.append(torch.cat(pieces).transpose(0, 1).contiguous().transpose(0, 1))
    return Step(StepContext(pool, torch.cat(places), parts), *tensors, states)


PLAIN = AttentionOptions(0.25)
WINDOW = AttentionOptions(0.3, window=24)


def test_a_step_is_one_call_of_variable_length_for_each_layer() -> None:
    varlen = FloatVarlen()
    step = make_step(PagedAttention(varlen), MIXED)
    step.check(0, PLAIN)
    step.check(1, WINDOW)
    assert [options for _, options in varlen.calls] == [PLAIN, WINDOW]
    assert varlen.calls[0][0] is varlen.calls[1][0], "made once for all layers"
    assert step.context.indices is not None and len(step.context.indices.decodes.lengths) == 3


@pytest.mark.parametrize("chunks", [MIXED[:1], MIXED[1:3], MIXED[3:], MIXED[:2], [Chunk(5, (5,), fresh=True)]])
def test_steps_of_fewer_kinds(chunks: list[Chunk]) -> None:
    varlen = FloatVarlen()
    step = make_step(PagedAttention(varlen), chunks)
    step.check(0, PLAIN)
    assert len(varlen.calls) == any(not chunk.decodes for chunk in chunks)
    indices = step.context.indices
    assert indices is not None
    # Keys are gathered only where some lie in the cache alone.
    are_own = all(chunk.fresh or chunk.decodes for chunk in chunks)
    assert all((group.places is None) == are_own for group in indices.groups)


@pytest.mark.parametrize(
    ("most", "keys"), [(1, [33, 33, 1, 84, 65]), (34, [33, 34, 84, 65]), (70, [67, 84, 65]), (151, [151, 65])]
)
def test_keys_are_gathered_for_a_few_chunks_at_a_time(
    most: int, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, "MOST_GATHERED", most)
    varlen = FloatVarlen()
    step = make_step(PagedAttention(varlen), MIXED)
    step.check(0, PLAIN)
    step.check(1, WINDOW)
    assert [int(group.key_ends[-1]) for group, _ in varlen.calls] == [*keys, *keys]


@pytest.mark.parametrize(
    ("options", "value_width"),
    [
        (AttentionOptions(0.25, softcap=2.0), 16),
        (AttentionOptions(0.25, window=24, softcap=2.0), 24),
        (AttentionOptions(0.25, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], device=DEVICE)), 16),
    ],
)
def test_what_the_call_does_not_take_is_attended_part_by_part(options: AttentionOptions, value_width: int) -> None:
    varlen = FloatVarlen()
    make_step(PagedAttention(varlen), MIXED, value_width=value_width, poison=False).check(0, options)
    assert not varlen.calls


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_scores_are_held_for_a_few_queries_at_a_time(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 84 * 4 * 7
    monkeypatch.setattr(torch_attention, "_MOST_SCORES", most)
    options = {
        "softcap": AttentionOptions(0.25, window, softcap=2.0),
        "sinks": AttentionOptions(0.25, window, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], device=DEVICE)),
    }[kind]
    step = make_step(PagedAttention(FloatVarlen()), LONG, poison=False)
    with Scores() as scores:
        step.check(0, options)
    # Sinks are one score more of each query.
    assert len(scores.counts) > 20 and max(scores.counts) <= most * 85 // 84


@pytest.mark.parametrize("options", [PLAIN, WINDOW])
def test_blocks_of_queries_are_attended_by_torch(options: AttentionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []

    def seven(part: Part, query: Tensor, options: AttentionOptions) -> int:
        blocks.append(-(-part.new // 7))
        return 7

    # As on a GPU, for what its call of variable length does not take.
    monkeypatch.setattr(torch_attention, "_most_queries", seven)
    make_step(TorchAttention(), LONG, poison=False).check(0, options)
    assert max(blocks) == 12


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_overflow_ends_the_sequence_that_has_it_and_no_other() -> None:
    class Hiding(FloatVarlen):
        def __call__(self, *arguments: Any) -> Tensor:
            return super().__call__(*arguments).nan_to_num(0.5)

    step = make_step(PagedAttention(Hiding()), MIXED)
    step.keys[0][3 + 40, 1, 2] = -torch.inf
    step.keys[0][1, 0, 2] = torch.inf
    finite = step.run(0, PLAIN).isfinite().all(2)
    want = torch.ones_like(finite)
    want[3 + 33 : 3 + 66, 2:] = want[1, :2] = False
    assert torch.equal(finite, want)


@pytest.mark.parametrize("options", [PLAIN, WINDOW, AttentionOptions(0.25, softcap=2.0)])
def test_a_static_step_has_a_row_for_each_token(options: AttentionOptions) -> None:
    results = []
    for backend in (PagedAttention(FloatVarlen()), TorchAttention()):
        torch.manual_seed(1)
        step = make_step(backend, [Chunk(1, (3, 40, 70))], poison=False)
        context = step.context
        pages = context.parts[0].table
        assert pages is not None
        # A page that no row needs and no row may read: what is left in a table from earlier requests.
        spare = len(context.pool.keys[0]) - 1
        for store in (*context.pool.keys, *context.pool.values):
            store[spare] = NAN
        table = torch.full((4, 5), spare, dtype=torch.int32, device=DEVICE)
        for owner, own, length in zip((1, 3, 0), pages, (3, 40, 70), strict=True):
            count = -(-length // PAGE_SIZE)
            table[owner, :count] = torch.from_numpy(own[:count])
        table[2, 0] = SCRATCH
        owners = torch.tensor([1, 3, 0, 2], dtype=torch.int32, device=DEVICE)
        context.rows = RowKeys(table, torch.tensor([3, 40, 70, 1], device=DEVICE), owners)
        context.places = torch.cat([context.places, context.places.new_zeros(1)])
        for states in (step.queries, step.keys, step.values):
            states[0] = torch.cat([states[0], states[0][:1]])
        results.append(step.run(0, options))
        want = torch.cat([causal(*states, options) for states in step.sequences[0]])
        torch.testing.assert_close(results[-1][:3].double(), want, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(*results, atol=5e-6, rtol=5e-6)


def test_torch_attends_the_same_step() -> None:
    step = make_step(TorchAttention(), MIXED, poison=False)
    step.check(0, PLAIN)
    step.check(1, WINDOW)


class FlashOperation:
    """The operation with its documented arguments and alignment, in float64."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor]:
        assert (dropout_p, is_causal, return_debug_mask, window_size_right) == (0.0, True, False, 0)
        assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
        assert cum_seq_q.is_contiguous() and cum_seq_k.is_contiguous()
        assert scale is not None and window_size_left is not None
        # The key at the left edge of such a window is seen.
        options = AttentionOptions(scale, window=None if window_size_left < 0 else window_size_left + 1)
        indices = ChunkGroup(0, slice(0, len(query)), cum_seq_q, cum_seq_k, (cum_seq_q, cum_seq_k), max_q, max_k, None)
        return (FloatVarlen()(query, key, value, indices, options),)


class AnywhereVarlen(TorchVarlen):
    def takes(self, query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
        return True


def test_torchs_operation_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = torch.ops.aten._flash_attention_forward
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.aten, "_flash_attention_forward", FlashOperation())
        step = make_step(PagedAttention(AnywhereVarlen()), MIXED)
        step.check(0, PLAIN)
        step.check(1, WINDOW)
    assert torch.ops.aten._flash_attention_forward is operation
    # The operation of this torch accepts them, with fewer key-value heads than heads.
    q, k = (torch.empty(9, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
    ends = torch.zeros(3, dtype=torch.int32, device="meta")
    indices = ChunkGroup(0, slice(0, 9), ends, ends, (ends, ends), 5, 9, None)
    assert TorchVarlen()(q, k, k, indices, WINDOW).shape == (9, 8, 64)


@dataclass
class OnCuda:
    """Of a tensor, what the choice of an implementation looks at."""

    shape: tuple[int, ...] = (9, 8, 128)
    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True
    device: torch.device = CUDA


@pytest.mark.parametrize(
    ("query", "value", "options", "taken"),
    [
        (OnCuda(), OnCuda(), PLAIN, True),
        (OnCuda((9, 8, 80)), OnCuda((9, 8, 80)), WINDOW, True),
        (OnCuda(dtype=torch.float32), OnCuda(), PLAIN, False),
        (OnCuda((9, 8, 192)), OnCuda(), PLAIN, False),
        (OnCuda((9, 8, 100)), OnCuda((9, 8, 100)), PLAIN, False),
        (OnCuda((9, 8, 512)), OnCuda((9, 8, 512)), PLAIN, False),
        (OnCuda(is_cuda=False), OnCuda(), PLAIN, False),
        (OnCuda(), OnCuda(), AttentionOptions(1.0, softcap=3.0), False),
        (OnCuda(), OnCuda(), AttentionOptions(1.0, sinks=torch.zeros(8)), False),
    ],
)
def test_torchs_operation_takes_what_it_can(
    query: Any, value: Any, options: AttentionOptions, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert TorchVarlen().takes(query, value, options) is taken
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not TorchVarlen().takes(query, value, options)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)


def test_flash_attn_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    softcaps = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        softcaps.append(softcap)
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False)
        left, right = window_size
        return FlashOperation()(*packed, scale=softmax_scale, window_size_left=left, window_size_right=right)[0]

    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    backend = choose_backend("flash-attn", CUDA)
    step = make_step(backend, MIXED, 64, 64, dtype=torch.float16)
    step.check(0, PLAIN, 5e-3)
    step.check(1, WINDOW, 5e-3)
    step.run(0, AttentionOptions(0.25, softcap=30.0))
    assert softcaps == [0.0, 0.0, 30.0]
    sinks = AttentionOptions(0.25, sinks=torch.zeros(4, dtype=torch.float16, device=DEVICE))
    make_step(backend, MIXED, 64, 64, poison=False, dtype=torch.float16).check(0, sinks, 5e-3)
    assert len(softcaps) == 3, "sinks are not for this library"


class StandInWrapper:
    """FlashInfer's, as far as it is used: it plans from tensors on the host, and runs torch's operation.

    Attributes:
        plans: The softcap of each plan so far, of all wrappers.
        on_way: Wrappers whose plan the device may not have taken yet.
    """

    plans: list[float | None]
    on_way: set[StandInWrapper]

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        causal: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        assert (num_qo_heads, num_kv_heads, head_dim_qk, q_data_type) == (4, 2, 64, torch.float16)
        for ends in (qo_indptr, kv_indptr):
            assert ends.device.type == "cpu" and ends.dtype == torch.int32 and ends.is_contiguous()
        assert self not in self.on_way, "it writes over a plan that the device has not taken"
        self.on_way.add(self)
        self.plans.append(logits_soft_cap)
        longest = [int(ends.diff().max()) for ends in (qo_indptr, kv_indptr)]
        self._planned = (qo_indptr.to(DEVICE), kv_indptr.to(DEVICE), *longest, 0.0, causal, False)
        self._options = {"scale": sm_scale, "window_size_left": window_left, "window_size_right": 0}

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FlashOperation()(q, k, v, *self._planned, **self._options)[0]


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> PagedAttention:
    monkeypatch.setattr(StandInWrapper, "plans", [], raising=False)
    monkeypatch.setattr(StandInWrapper, "on_way", set(), raising=False)
    monkeypatch.setattr(cuda_attention.FlashInferVarlen, "_WORKSPACE_BYTES", 16)
    monkeypatch.setattr(cuda_attention, "_wait_for", lambda device: StandInWrapper.on_way.clear())
    install(monkeypatch, "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=StandInWrapper)
    backend = choose_backend("flashinfer", CUDA)
    assert isinstance(backend, PagedAttention)
    return backend


@pytest.mark.slow
@pytest.mark.parametrize(("most_gathered", "groups"), [(1 << 16, 1), (150, 4)])
def test_flashinfer_plans_a_group_once_for_each_step_and_kind_of_layer(
    most_gathered: int, groups: int, flashinfer: PagedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, "MOST_GATHERED", most_gathered)
    monkeypatch.setattr(cuda_attention, "_wait_for", lambda device: pytest.fail("the device is waited for"))
    plans = StandInWrapper.plans
    for planned in (2 * groups, 4 * groups):
        step = make_step(flashinfer, LONG, 64, 64, dtype=torch.float16)
        step.check(0, PLAIN, 5e-3)
        step.check(1, WINDOW, 5e-3)
        step.check(1, PLAIN, 5e-3)
        assert len(plans) == planned
        # The step has ended.
        StandInWrapper.on_way.clear()
    step.run(0, AttentionOptions(0.25, softcap=30.0))
    assert plans[-1] == 30.0


def test_flashinfer_writes_over_no_plan_that_the_device_has_not_taken(
    flashinfer: PagedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, "MOST_GATHERED", 150)
    monkeypatch.setattr(cuda_attention.FlashInferVarlen, "_MOST_WRAPPERS", 2)
    for _ in range(2):
        step = make_step(flashinfer, LONG, 64, 64, dtype=torch.float16)
        step.check(0, PLAIN, 5e-3)
        step.check(1, PLAIN, 5e-3)
        StandInWrapper.on_way.clear()
    assert len(StandInWrapper.plans) == 16, "four groups, two layers, two steps"


def test_the_device_decides_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert isinstance(choose_backend("auto", cpu), TorchAttention)
    assert isinstance(choose_backend("auto", CUDA), PagedAttention)
    assert isinstance(choose_backend("triton", CUDA), PagedAttention)
    assert isinstance(choose_backend("torch", CUDA), TorchAttention)
    for name in ("triton", "flash-attn", "flashinfer"):
        with pytest.raises(InvalidConfiguration, match=f"attention {name} needs a CUDA device") as refusal:
            choose_backend(name, cpu)
        assert refusal.value.param == "attention"
    for name, package in (("flash-attn", "flash-attn"), ("flashinfer", "flashinfer-python")):
        with pytest.raises(InvalidConfiguration, match=f"pip install {package}"):
            choose_backend(name, CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(choose_backend("auto", CUDA), TorchAttention)
    with pytest.raises(InvalidConfiguration, match="needs Triton"):
        choose_backend("triton", CUDA)


def test_an_engine_refuses_attention_that_its_device_has_not(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    settings = ServeSettings(store=store.root, pool_mib=1, kv_cache_tokens=64, attention="triton")
    with pytest.raises(InvalidConfiguration, match="needs a CUDA device"):
        ServingEngine(random_decoder(), store, settings)


def test_an_engine_generates_the_same_over_pages(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks with a cached prefix, and prompts that share one.
    prompts = ["a" * 37 + "bc", "a" * 37 + "cd", "xyz"]

    async def ask(engine: ServingEngine) -> list[str]:
        results = await asyncio.gather(*(collect(engine, prompt=prompt, max_new_tokens=4) for prompt in prompts))
        return [result.text for result in results]

    def texts() -> list[str]:
        engine = start_engine(decoder, store, kv_cache_tokens=1024, max_batch_tokens=24)
        return asyncio.run(ask(engine))

    want = texts()
    varlen = FloatVarlen()
    monkeypatch.setattr("sera_serve.engine.tasks.generate.choose_backend", lambda name, device: PagedAttention(varlen))
    assert texts() == want
    assert len(varlen.calls) > 4
