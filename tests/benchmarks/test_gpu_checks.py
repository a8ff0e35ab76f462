"""The checks of the GPU benchmark see what is broken, and its points are what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu import attention_check, engine_check, eviction_check, kernel_time, sampling_check
from benchmarks.gpu.capacity import measure_residents
from benchmarks.gpu.decode_check import check_decode
from benchmarks.gpu.decode_model import adapt, adapters_of, random_llama
from benchmarks.gpu.engine_step import EngineStep
from benchmarks.gpu.kernel_check import check_kernel
from benchmarks.gpu.kernel_time import Point
from benchmarks.gpu.operands import Member
from benchmarks.gpu.record import Record
from benchmarks.gpu.setting import SectionSkipped, Setting, find_operation
from sera_kernels import (
    ABSENT,
    NO_ADAPTER,
    AdapterBatch,
    AdapterTables,
    ShapeClasses,
    activation,
    grouped_sera,
    numba_path,
)
from sera_serve.engine.overflow import RowGauge
from sera_serve.engine.tasks.pass_graphs import PassKey
from sera_serve.layers import served_linear
from sera_serve.residency import pack


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    now = time.monotonic()
    record = Record(tmp_path / "rows")
    record.add("machine", {"memory_bytes_per_s": 1e9, "empty_launch_us": 1.0})
    operation = ("grouped_sera", grouped_sera)
    return Setting(torch.device("cpu"), True, operation, now + 100, 1, None, now, record)


def one_element_off(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    grouped_sera(x, outputs, *rest)
    outputs[-1][-1, -1] += 0.1 * outputs[-1].abs().max()


def one_element_slightly_off(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    last = outputs[-1][-1]
    before = last.clone()
    grouped_sera(x, outputs, *rest)
    # As much as tf32 would be, and little beside the norm of all elements.
    last[-1] += 4e-4 * (not torch.equal(last, before))


def bare_row_touched(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
    grouped_sera(x, outputs, modules, batch, pool, tables)
    outputs[0][batch.token_slots == NO_ADAPTER] *= 1.000001


def absent_module_touched(
    x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any
) -> None:
    grouped_sera(x, outputs, modules, batch, pool, tables)
    slots = batch.token_slots.long().clamp(min=0)
    outputs[1][tables.offset[modules[1]][slots] == ABSENT] *= 1.000001


def row_too_many(x: Tensor, outputs: list[Tensor], *rest: Any) -> None:
    grouped_sera(x, outputs, *rest)
    y = outputs[0]
    if y._base is not None:
        y._base[len(y)] = 0


def gap_read(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
    grouped_sera(x, outputs, modules, batch, pool, replace(tables, offset=tables.offset - (tables.offset > 0).long()))


def vectors_left_out(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
    grouped_sera(x, outputs, modules, batch, pool, replace(tables, vectors=torch.full_like(tables.vectors, ABSENT)))


BROKEN = [
    one_element_off,
    one_element_slightly_off,
    bare_row_touched,
    absent_module_touched,
    row_too_many,
    gap_read,
    vectors_left_out,
]


@pytest.mark.parametrize("operation", BROKEN, ids=lambda operation: operation.__name__)
def test_correctness_sees_a_broken_kernel(setting: Setting, operation: Callable[..., None]) -> None:
    rows = check_kernel(replace(setting, operation=("broken", operation)), "float32")
    assert not all(row["correct"] for row in rows)


def test_replays_see_a_kernel_that_goes_on_with_the_tables_it_first_read(setting: Setting) -> None:
    seen: dict[int, Any] = {}

    def operation(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, pool: Tensor, tables: Any) -> None:
        copies = AdapterTables(*(table.clone() for table in tables.tensors))
        # The tables are kept with their copy, so that no others get their identity.
        _, first = seen.setdefault(id(tables), (tables, copies))
        grouped_sera(x, outputs, modules, batch, pool, first)

    wrong = [
        row["case"]
        for row in check_kernel(replace(setting, operation=("broken", operation)), "float32")
        if not row["correct"]
    ]
    assert {"replay, adapter removed", "replay, shapes swapped", "replay, contents"} >= set(wrong) > set()


@pytest.mark.slow
def test_the_check_of_an_activation_sees_updates_of_one_layer_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def correct() -> list[bool]:
        return [row["correct"] for row in check_kernel(setting, "llama") if row["case"] == "activation"]

    assert correct() == [True, True]
    right = activation.updated_silu_mul

    def half_updated(x: Tensor, gate: Tensor, up: Tensor, modules: Any, batch: Any, *rest: Any) -> Tensor:
        return right(x, gate, up, [modules[0], modules[0]], batch, *rest)

    monkeypatch.setattr(activation, "updated_silu_mul", half_updated)
    assert correct() == [False, False]


def test_the_decode_check_sees_wrong_serving(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = served_linear.add_updates

    def next_adapter(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, *rest: Any) -> None:
        right(x, outputs, modules, replace(batch, token_slots=(batch.token_slots + 1) % 3), *rest)

    monkeypatch.setattr(served_linear, "add_updates", next_adapter)
    assert not any(row["correct"] for row in check_decode(setting))


def test_a_step_keeps_the_adapters_that_it_was_made_with(setting: Setting) -> None:
    model = random_llama(setting, 1, torch.float32)
    step = EngineStep(model, adapt(model, 2, torch.float32), 2, 8)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    first, logits = step.ready(setting, slots)
    first()
    want = logits.clone()
    step.context.pool, step.context.tables = adapters_of(model, 2, Member(8, 1, False), torch.float32)
    other, others_logits = step.ready(setting, slots)
    other()
    assert not torch.equal(others_logits, want)
    first()
    assert torch.equal(logits, want)


def another_adapter_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where four tokens or more are in a pass, adapters change places: requests alone are right."""
    right = served_linear.add_updates

    def broken(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, *rest: Any) -> None:
        slots = batch.token_slots
        wrong = batch
        if len(slots) >= 4:
            wrong = replace(batch, token_slots=torch.where(slots > 0, slots - 1, slots))
        try:
            right(x, outputs, modules, wrong, *rest)
        except RuntimeError:
            # The other adapter has just left the device.
            right(x, outputs, modules, batch, *rest)

    monkeypatch.setattr(served_linear, "add_updates", broken)


def test_the_engine_check_sees_other_tokens_than_the_cpu_s(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_check.tiny_base

    def other_weights(*arguments: Any) -> Any:
        base = right(*arguments)
        if made:
            embeddings = base.model.get_input_embeddings().weight
            embeddings.data = embeddings.data.roll(1, 0)
        made.append(base)
        return base

    made: list[Any] = []
    monkeypatch.setattr(engine_check, "tiny_base", other_weights)
    # The store's adapters are of the first base; the second is not what they were made for.
    monkeypatch.setattr("sera_serve.engine.references.check_same_base", lambda *infos: None)
    monkeypatch.setattr("sera_serve.engine.references.check_base", lambda *infos: None)
    rows = list(engine_check.check_engine(setting, "float32 graphs"))
    wrong = {row["batch"] for row in rows if not row["correct"]}
    assert wrong == {"base", "adapters", "sampled", "limited", "chosen", "long", "long, adapter", "passes"}


def test_the_engine_check_sees_gains_and_offsets_that_are_left_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine_check.running_engine

    def running_engine(*arguments: Any, **settings: Any) -> Any:
        if "cuda_graphs" in settings:
            # The engine that is checked, not the reference.
            monkeypatch.setattr(numba_path, "_apply_vectors", lambda *arguments: None)
            monkeypatch.setattr(numba_path, "_apply_vectors_parallel", lambda *arguments: None)
        return right(*arguments, **settings)

    monkeypatch.setattr(engine_check, "running_engine", running_engine)
    rows = list(engine_check.check_engine(setting, "float32 graphs"))
    assert {row["batch"] for row in rows if not row["correct"]} == {"adapters", "sampled", "passes"}


@pytest.mark.parametrize(("classes", "correct"), [(ShapeClasses(single=64), True), (ShapeClasses(), False)])
def test_the_engine_check_wants_passes_of_adapters_in_graphs(classes: ShapeClasses, correct: bool) -> None:
    graphs = SimpleNamespace(keys=[PassKey(1, 16, ShapeClasses()), PassKey(2, 16, classes)])
    engine: Any = SimpleNamespace(runners={"classify": SimpleNamespace(graphs=graphs)})
    vectors = [np.ones(2, np.float32)]
    assert engine_check._passes(engine, vectors, vectors, "graphs")["correct"] == correct
    engine.runners["classify"].graphs = None
    assert engine_check._passes(engine, vectors, vectors, "eager")["correct"]


def test_adapters_of_the_passes_that_are_checked_and_timed_cannot_overflow(tmp_path: Path) -> None:
    base = engine_check.tiny_base(torch.device("cpu"), torch.float32, True)
    index = {path: row for row, path in enumerate(base.module_shapes())}
    store = engine_check.tiny_store(base, tmp_path)
    gauge = RowGauge(base.model)
    for name in engine_check.CLASSIFIERS:
        bundle = store.load(store.resolve(name).digest)
        assert not gauge.must_watch([pack(bundle, index, base.dtype).layout.stretch]), name


def test_the_engine_check_sees_a_batch_that_is_not_its_requests(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_adapter_in_large_batches(monkeypatch)
    rows = list(engine_check.check_engine(setting, "bfloat16 graphs"))
    assert not all(row["correct"] for row in rows if row["batch"] == "adapters")


def test_the_eviction_check_sees_a_batch_that_is_not_its_requests(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_adapter_in_large_batches(monkeypatch)
    (row,) = eviction_check.check_eviction(setting)
    assert not row["correct"] and row["wrong"] > 0 and row["wrong classifications"] > 0


# The interpreter computes what is masked out afterwards, too.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_attention_check_sees_a_wrong_scale(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_check.paged_attention.paged_decode
    broken = lambda *arguments, scale, **options: right(*arguments, scale=1.001 * scale, **options)  # noqa: E731
    monkeypatch.setattr(attention_check.paged_attention, "paged_decode", broken)
    rows = list(attention_check.check_attention(setting, "decode"))
    assert [row["correct"] for row in rows if row["case"].startswith("small")] == [False, False]


def test_the_attention_check_sees_one_key_of_many_left_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where a key of 8,192 is less than the rounding of an output over few keys."""
    torch.manual_seed(0)
    shape = replace(attention_check.LLAMA, heads=8, kv_heads=2)

    def decode(left_out: int) -> Any:
        def paged_decode(
            q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, owners: Any = None, **options: Any
        ) -> Tensor:
            keys, values = (pool[table[0]].flatten(0, 1)[: int(lengths[0]) - left_out] for pool in (k, v))
            return attention_check.reference(q, keys, values, shape, None).to(q.dtype)

        monkeypatch.setattr(attention_check.paged_attention, "paged_decode", paged_decode)
        return attention_check.check_decode_case(setting.device, shape, (8192,))["correct"]

    assert decode(0) and not decode(1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_attention_check_sees_infinities_that_are_hidden(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_check.paged_attention.paged_decode
    broken = lambda *arguments, **options: right(*arguments, **options).nan_to_num()  # noqa: E731
    monkeypatch.setattr(attention_check.paged_attention, "paged_decode", broken)
    rows = list(attention_check.check_attention(setting, "decode"))
    assert [row["correct"] for row in rows if row["case"].startswith("a key")] == [False] * 3


@pytest.mark.parametrize("shift", [1, -1])
def test_the_sampling_check_sees_another_token(setting: Setting, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    right = sampling_check.choose_tokens

    def broken(*arguments: Any) -> Tensor:
        tokens = right(*arguments)
        tokens[-1] = (tokens[-1] + shift) % 700
        return tokens

    monkeypatch.setattr(sampling_check, "choose_tokens", broken)
    assert not any(row["correct"] for row in sampling_check.check_sampling(setting))


def test_the_sampling_check_sees_a_token_that_top_p_forbids(setting: Setting) -> None:
    logits = sampling_check.flat_logits(setting, 4)
    all_tokens = sampling_check.same_rows(setting, 4)
    limited = replace(all_tokens, top_p=torch.full((4,), 0.01), truncate=True)
    free = sampling_check.choose_tokens(logits, all_tokens)
    assert not sampling_check._as_good(free, logits, limited).any()


def test_a_resident_that_is_taken_for_its_neighbour_is_told_without_figures(setting: Setting) -> None:
    (right,) = measure_residents(setting)
    assert right["adapters"] > 100 and right["spread_us"] > 0

    def of_the_neighbour(x: Tensor, outputs: list[Tensor], modules: Any, batch: Any, *rest: Any) -> None:
        slots = batch.token_slots.clone()
        slots[-1] -= 1
        grouped_sera(x, outputs, modules, AdapterBatch(slots), *rest)

    (wrong,) = measure_residents(replace(setting, operation=("other slots", of_the_neighbour)))
    assert wrong["correct"] is False and "spread_us" not in wrong


def test_points_that_time_did_not_allow_are_rows(setting: Setting) -> None:
    rows = kernel_time.time_kernel(replace(setting, deadline=setting.started))
    assert [row["missing"] for row in rows] == ["not reached", "not reached"]


def test_a_point_without_memory_is_a_row_and_the_next_is_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel_time.interleaved

    def interleaved(setting: Setting, cases: Any) -> dict[str, float]:
        monkeypatch.setattr(kernel_time, "interleaved", right)
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(kernel_time, "interleaved", interleaved)
    rows = list(kernel_time.time_kernel(setting))
    assert rows[0]["missing"] == "too much"
    assert all(row["us"] > 0 for row in rows[1:]) and len(rows) > 1


def test_bounds_need_the_machine_s_figures(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(SectionSkipped, match="memory_bytes_per_s"):
        list(kernel_time.time_kernel(replace(setting, record=Record(tmp_path / "none"))))


def test_interpreted_the_triton_kernel_is_what_runs() -> None:
    pytest.importorskip("triton")
    cpu = torch.device("cpu")
    assert find_operation(cpu, interpreted=True)[1].__name__ == "grouped_sera_triton"
    assert find_operation(cpu)[1] is grouped_sera


def test_bytes_of_a_launch_by_hand() -> None:
    # 64 tokens: x 4096, y 4096 read and written; 64 adapters: A and B 4096 each, C 64 x 64; two bytes an element.
    assert Point(4096, (4096,), 64, 64).bytes(Member(64, 64)) == 2 * (64 * 3 * 4096 + 64 * 3 * 4096)
    # LoRA of rank 16 on two outputs: A for each.
    assert Point(8, (8, 4), 1, 2).bytes(Member(16, 1, False)) == 2 * (8 + 2 * 12 + 2 * 16 * (16 + 12))
