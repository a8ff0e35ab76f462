"""How steps are captured as graphs, with a driver that only writes down what it is asked."""

from __future__ import annotations

import warnings
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sera_kernels import ShapeClasses
from sera_kernels.shape_classes import RANK_BUCKETS
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams
from sera_serve.engine.loop import captures, graphs
from sera_serve.engine.loop.captures import NotCaptured, least_covering
from sera_serve.engine.loop.graphs import NotCapturable, StepGraphs, check_capturable, token_buckets
from sera_serve.engine.loop.hugging_face import ServedDecoder
from sera_serve.engine.loop.row_tables import DeviceRows, RowTables
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey
from sera_serve.engine.request import GenerationRequest

MODEL: Any = SimpleNamespace(device=torch.device("cpu"), vocabulary=9, logits_dtype=torch.float32)
CONTEXT: Any = None
POOL: Any = SimpleNamespace(has_paged_decode=True)
DECODER = ServedDecoder(MODEL, CONTEXT, POOL)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch's modes of watching for waits, as they are set."""
    log: list[Any] = []

    def set_mode(mode: Any) -> None:
        if not log:
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet", stacklevel=2)
        log.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return log


def waits() -> None:
    raise RuntimeError("called a synchronizing CUDA operation")


def fails() -> None:
    raise RuntimeError("no memory")


def fails_without_memory() -> Any:
    raise torch.OutOfMemoryError("no memory")


def test_a_base_that_waits_for_the_device_is_named_before_the_capture(modes: list[Any]) -> None:
    with pytest.raises(NotCapturable, match=r"waits \(.*test_graph_capture\.py, line \d+\) waits for the device"):
        check_capturable(waits)
    with pytest.raises(RuntimeError, match="no memory"):
        check_capturable(fails)
    check_capturable(lambda: modes.append("ran"))
    assert modes == ["error", 0, "error", 0, "error", "ran", 0]


class Driver:
    """Stands for torch's graphs: at most one capture at a time in a pool of memory.

    Attributes:
        open: Pools that something is captured to. While there is one, torch gives no memory back.
        released: Pools, once for each capture that failed and cannot be ended.
        log: Waits for the device, and the pools of captures that began.
    """

    def __init__(self) -> None:
        self.pools = 0
        self.open: set[int] = set()
        self.released: list[int] = []
        self.log: list[object] = []
        self.can_end = True

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def CUDAGraph(self) -> Any:
        held: list[int] = []

        def begin(pool: int, capture_error_mode: str) -> None:
            if pool in self.open:
                raise RuntimeError(f"already recording to pool {pool}")
            self.open.add(pool)
            self.log.append(pool)
            held.append(pool)

        def end() -> None:
            if not self.can_end:
                raise RuntimeError("a stream has not come back")
            self.close(0, held[0])

        return SimpleNamespace(capture_begin=begin, capture_end=end)

    def close(self, device: int, pool: int) -> None:
        if pool not in self.open:
            raise RuntimeError(f"not recording to pool {pool}")
        self.open.remove(pool)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", made.new_pool)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: made.log.append("wait"))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.close)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: made.released.append(pool))
    return made


@pytest.mark.parametrize("can_end", [True, False])
def test_a_capture_that_fails_does_not_bar_the_next(
    can_end: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[bool] = []

    def run() -> None:
        runs.append(True)
        # After the warm-up, in the first capture.
        if len(runs) == captures._WARM_UP_RUNS + 1:
            driver.can_end = can_end
            raise torch.OutOfMemoryError("out of memory")

    staged: list[object] = []
    step = SimpleNamespace(stage=lambda batch, tables: staged.append(batch) or 5, upload=staged.append, run=run)
    monkeypatch.setattr(graphs, "StaticStep", lambda *_, **__: step)
    tables = RowTables(4, 8)
    found = StepGraphs(DECODER, tables)
    key = StaticKey(1, 1, ShapeClasses(), sampled=False, truncated=False)
    with pytest.raises(torch.OutOfMemoryError):
        found._captures.captured(key)
    assert not driver.open and driver.released == ([] if can_end else [1])
    driver.can_end = True
    captured = found._captures.captured(key)
    assert captured[0] is step and found._captures.captured(key) is captured  # type: ignore[comparison-overlap]
    assert hasattr(captured[1], "capture_end")
    assert driver.log == ["wait", 1, "wait", 2], "into other memory than that of the capture that failed"
    assert len(runs) == 2 * (captures._WARM_UP_RUNS + 1) and not driver.open
    assert staged == [StaticBatch(), 5] * 2, "captured over padding alone"


def test_every_step_of_the_base_model_has_a_graph_before_the_first_request(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = StepGraphs(DECODER, RowTables(4, 8))
    captured: list[StaticKey] = []
    checked: list[StaticKey] = []
    monkeypatch.setattr(steps._captures, "captured", captured.append)
    monkeypatch.setattr(steps._captures, "warmed_up", lambda key: SimpleNamespace(run=lambda: checked.append(key)))
    monkeypatch.setattr(graphs, "check_capturable", lambda run: run())
    steps.capture_all()
    assert checked == [StaticKey(1, 1, ShapeClasses(), sampled=False, truncated=False)]
    sizes = [key.tokens for key in captured]
    assert sizes == sorted(sizes, reverse=True), "the largest first"
    assert {key.classes for key in captured} == {captures.FIRST_CLASSES, ShapeClasses()}
    for options, is_sampled, is_truncated in [
        ({}, False, False),
        ({"top_k": 5}, False, False),
        ({"temperature": 0.5}, True, False),
        ({"temperature": 0.5, "top_k": 5}, True, True),
    ]:
        plain, odd = (
            GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1] * 5, params=GenerateParams(**fields))
            for fields in ({}, options)
        )
        for decodes, prompts, tokens, rows in [(1, 0, 1, 1), (2, 0, 2, 2), (3, 0, 4, 4), (4, 0, 4, 4), (1, 1, 8, 4)]:
            batch = StaticBatch([odd, plain, plain, plain][:decodes], [plain] * prompts)
            key = steps._key(batch)
            # A step with prompts has one graph for any sampling.
            sampled, truncated = (is_sampled or bool(prompts), is_truncated or bool(prompts))
            assert key == StaticKey(tokens, rows, ShapeClasses(), sampled, truncated)
            assert key in captured


def test_a_step_that_could_not_be_captured_is_refused_for_a_while(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    emptied: list[bool] = []
    monkeypatch.setattr(captures.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    tables = RowTables(4, 8)
    requests = [GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1, 2]) for _ in range(2)]
    for row, request in enumerate(requests):
        request.row, request.pages = row, [5]
        tables.enter(request)
    other = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1])
    placed = SimpleNamespace(adapter=SimpleNamespace(classes=ShapeClasses(whole=16)))
    other.lease = SimpleNamespace(placement=placed)  # type: ignore[assignment]
    steps = StepGraphs(DECODER, tables)
    monkeypatch.setattr(steps._captures, "warmed_up", lambda key: fails_without_memory())
    one, two, lora = StaticBatch(requests[:1]), StaticBatch(requests), StaticBatch([other])
    assert steps.can_run(one)
    for batch in (one, lora):
        with pytest.raises(NotCaptured):
            steps.launch(batch, 0)
    assert [steps.can_run(batch) for batch in (one, two, lora)] == [False, True, False]
    assert emptied == [True, True]
    now[0] += 61
    assert all(steps.can_run(batch) for batch in (one, two, lora))
    # A kind that was never captured covers no other.
    assert least_covering(steps._captured, ShapeClasses(whole=8)) == ShapeClasses(whole=8)


def test_adapters_of_all_shapes_have_graphs_of_few_kinds() -> None:
    buckets = (0, *RANK_BUCKETS)
    kinds = [ShapeClasses(*ranks, vectors=has) for ranks in product(buckets, repeat=3) for has in (False, True)]
    # Each kind is met before the larger ones, which would cover it.
    kinds.sort(key=lambda one: one.single + one.segmented + one.whole)
    captured = [captures.FIRST_CLASSES, ShapeClasses()]
    for wanted in kinds:
        found = least_covering(captured, wanted)
        assert found | wanted == found or not wanted.width
        if found not in captured:
            captured.append(found)
    # What covers all grows by a bucket of one kind of shape at a time, at most.
    assert len(captured) <= captures._MOST_KINDS + 3 * len(RANK_BUCKETS) + 1
    assert [least_covering(captured, one) for one in captured[:8]] == captured[:8]
    assert not least_covering(captured[:1], ShapeClasses()).width, "a step without adapters pays for them"
    assert not least_covering([ShapeClasses(single=64, vectors=True)], ShapeClasses(single=8)).vectors


@pytest.mark.parametrize("least", [0, 512])
@pytest.mark.parametrize("rows", [1, 8, 64, 100, 256, 300, 511, 512, 600, 2000])
def test_sizes_of_steps(rows: int, least: int) -> None:
    most = max(rows, least)
    sizes = token_buckets(rows, most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    # Decodes of all rows are no step with prompts, whose graphs are for any sampling.
    assert rows in sizes
    for tokens in range(1, most + 1):
        padding = next(size for size in sizes if size >= tokens) - tokens
        assert padding < max(tokens, 4) and padding < 64


def test_steps_with_prompts_are_short_where_attention_gathers_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    for has_kernel, rows, most in [(True, 4, 512), (True, 600, 600), (False, 4, 4), (False, 300, 300)]:
        pool: Any = SimpleNamespace(has_paged_decode=has_kernel)
        assert StepGraphs(ServedDecoder(MODEL, CONTEXT, pool), RowTables(rows, 8)).most_tokens == most


def test_a_launch_brings_pages_and_inputs_before_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

    def upload(self: DeviceRows, staged: torch.Tensor) -> None:
        log.append(f"pages {staged.tolist()}")
        if fails:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(DeviceRows, "upload", upload)
    step = SimpleNamespace(
        stage=lambda batch, tables, ahead: log.append("stage") or 1,  # type: ignore[func-returns-value]
        upload=lambda turn: log.append(f"inputs {turn}"),
        download=lambda turn: log.append("tokens down"),
        tokens=lambda turn, count: [7] * count,
    )
    graph = SimpleNamespace(replay=lambda: log.append("graph"))
    tables = RowTables(4, 8)
    request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1, 2])
    request.row, request.pages = 2, [5, 6]
    placed = SimpleNamespace(adapter=SimpleNamespace(classes=ShapeClasses(whole=16)))
    request.lease = SimpleNamespace(placement=placed, slot=0)  # type: ignore[assignment]
    tables.enter(request)
    steps = StepGraphs(DECODER, tables)
    monkeypatch.setattr(steps._captures, "get", lambda key: (step, graph))
    fails = True
    with pytest.raises(torch.OutOfMemoryError):
        steps.launch(StaticBatch([request]), 0)
    fails = False
    launched = steps.launch(StaticBatch([request]), 0)
    pages = "pages [16, 17, 5, 6]"
    order = ["stage", "inputs 1", "graph", "tokens down", "event"]
    assert log == [pages, pages, *order], "what a failed launch may have lost is brought again"
    assert launched.wait() == [7] and log[-1] == "wait"
    steps.launch(StaticBatch([request]), 0)
    assert log[-6:] == ["pages []", *order]
    # Steps of smaller adapters of this kind need no graph of their own.
    assert steps._captured == [captures.FIRST_CLASSES, ShapeClasses(), ShapeClasses(whole=16)]
