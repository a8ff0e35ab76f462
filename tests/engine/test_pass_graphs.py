"""Classification passes on static buffers, recorded once for each key and replayed over other rows, as a graph is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters_store import AdapterBundle, AdapterStore
from sera_kernels import ShapeClasses
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, ImageInput, ModelInputs
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.loop.captures import NotCaptured
from sera_serve.engine.tasks import classify as classify_task
from sera_serve.engine.tasks import pass_graphs
from sera_serve.engine.tasks.pass_graphs import PassBuffers, PassGraphs, PassKey, StaticPass
from sera_serve.engine.tasks.passes import run_pass
from sera_serve.errors import AdapterOverflow
from sera_serve.layers import served_linear
from support.engine import acting_for, classify, settled
from support.factories import random_adapter, random_decoder, random_encoder, with_vectors
from support.graph_recorder import RecordedCaptures, static_add_updates
from support.head_tasks import labeller, regressor, span_finder
from support.vision import image_classifier, image_file, random_clip, random_vit, retriever

pytestmark = pytest.mark.usefixtures("memory_given_back")

Start = Callable[..., ServingEngine]
MAX_RANK = 16
LABELS = ["a", "b", "c"]
LENGTHS = [1, 3, 17, 40, 40, 60, 5, 16]
IMAGES = [ImageInput(image_file(seed), f"inputs[{seed}].image") for seed in range(5)]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have passes recorded where a GPU would capture them."""
    monkeypatch.setattr(pass_graphs, "Captures", RecordedCaptures)
    # No mode sees what numba does.
    monkeypatch.setattr(served_linear, "add_updates", static_add_updates(MAX_RANK))


def graphs_of(engine: ServingEngine, max_rows: int = 32, max_tokens: int = 512) -> PassGraphs:
    """Graphs for the runner of an engine."""
    runner: Any = engine.runners["classify"]
    return PassGraphs(runner._base, runner._context, max_rows, max_tokens)


def texts(lengths: list[int], seed: int, has_types: bool = False) -> list[ModelInputs]:
    draw = random.Random(seed)
    rows = []
    for place, length in enumerate(lengths):
        types = [int(at > length // 2) for at in range(length)] if has_types and place % 2 else None
        rows.append(ModelInputs.of([draw.randrange(250) for _ in range(length)], types))
    return rows


def images(count: int, seed: int, base: FrozenBase) -> list[ModelInputs]:
    tower = base.image_tower
    assert tower is not None
    noise = np.random.default_rng(seed)
    shape = (3, tower.height, tower.width)
    pixels: list[NDArray[np.float32]] = [noise.standard_normal(shape, np.float32) for _ in range(count)]
    return [ModelInputs.of(pixels=own, image_tokens=tower.tokens) for own in pixels]


def assert_replays_are_passes(engine: ServingEngine, batches: list[list[ModelInputs]], embeds: bool) -> None:
    runner: Any = engine.runners["classify"]
    graphs = graphs_of(engine)
    captures: Any = graphs._captures
    leases = [asyncio.run(lease(engine, name)) for name in ("acme/a", "acme/b")]
    slots = [-1, *(each.slot for each in leases)]
    classes = leases[0].placement.adapter.classes | leases[1].placement.adapter.classes
    with torch.inference_mode():
        for turn, rows in enumerate(batches):
            own = [slots[(turn + place) % 3] for place in range(len(rows))]
            got = graphs.run(rows, own, classes, embeds)
            want = run_pass(runner._base, runner._context, rows, own, classes, embeds)
            assert got is not None and got.prefix_tokens == want.prefix_tokens
            assert torch.equal(got.mask, want.mask)
            if want.states.numel():
                real = want.mask.bool()
                torch.testing.assert_close(got.states[real], want.states[real], rtol=1e-4, atol=1e-4)
            assert (got.projected is None) == (want.projected is None)
            if want.projected is not None:
                torch.testing.assert_close(got.projected, want.projected, rtol=1e-4, atol=1e-4)
    assert captures.replays == len(batches) > len(captures)
    # Passes of smaller adapters of this kind need no graphs of their own.
    assert graphs._classes[2:] == [classes]
    captures.check()
    for each in leases:
        each.release()


async def lease(engine: ServingEngine, name: str) -> Any:
    return await asyncio.wrap_future(engine.residency.acquire(engine.store.resolve(name).digest))


def publish_two(base: FrozenBase, store: AdapterStore) -> None:
    names = ("query", "value") if base.kind == "encoder" else ("q_proj", "v_proj")
    make = image_classifier if base.image_tower else random_adapter
    first = make(base, SeraConfig(16, 16, 8.0, "all-linear"), 1, labels=LABELS)
    second = make(base, SeraConfig(8, 2, 8.0, names, use_mixer=False), 2, labels=LABELS)
    store.publish(first, "acme/a")
    store.publish(with_vectors(second, gain=names[:1], offset=names[:1]), "acme/b")


@pytest.mark.slow
@pytest.mark.parametrize("make_base", [random_decoder, random_encoder])
def test_replayed_passes_of_texts_are_those_of_the_eager_runner(
    make_base: Callable[[], FrozenBase], store: AdapterStore, start_engine: Start
) -> None:
    base = make_base()
    publish_two(base, store)
    sizes = [LENGTHS, LENGTHS[::-1], [9], [2], LENGTHS[:3], [40], [16] * 17, [33], [1] * 30, [3] * 31]
    has_types = base.kind == "encoder"
    batches = [texts(lengths, seed, has_types and seed % 3 == 0) for seed, lengths in enumerate(sizes)]
    assert_replays_are_passes(start_engine(base, store), batches, embeds=False)


@pytest.mark.parametrize("embeds", [False, True])
def test_replayed_passes_of_images_are_those_of_the_eager_runner(
    embeds: bool, store: AdapterStore, start_engine: Start
) -> None:
    base = random_clip() if embeds else random_vit()
    publish_two(base, store)
    batches = [images(count, seed, base) for seed, count in enumerate([3, 1, 3, 1, 2])]
    assert_replays_are_passes(start_engine(base, store), batches, embeds)


def test_replayed_texts_of_a_dual_base(store: AdapterStore, start_engine: Start) -> None:
    base = random_clip()
    publish_two(base, store)
    # Not longer than its positions, which are no size of a pass.
    sizes = [[5, 3], [4], [base.max_length], [base.max_length - 1], [2, 7]]
    assert_replays_are_passes(start_engine(base, store), [texts(own, 9) for own in sizes], embeds=True)


def test_rows_of_padding_use_no_adapter_and_see_one_token() -> None:
    base = random_decoder()
    static = StaticPass(base, None, PassBuffers(base, 4, 64), PassKey(4, 16, ShapeClasses()))  # type: ignore[arg-type]
    static.stage(texts([3, 16, 9, 2], 0), [1, 2, 1, 2])
    static.stage(texts([5, 8], 1), [2, 0])
    assert static._device["slots"].tolist() == [2, 0, -1, -1]
    assert static._device["attention_mask"].sum(1).tolist() == [5, 8, 1, 1]


@pytest.fixture
def eager_and_recorded(store: AdapterStore, start_engine: Start) -> Callable[[FrozenBase], tuple[Any, Any]]:
    """Two engines over one base and the store, the second with recorded passes; both keep two adapters at once."""

    def make(base: FrozenBase) -> tuple[ServingEngine, ServingEngine]:
        eager, recorded = (
            start_engine(base, store, max_resident=2, host_cache_mib=0, max_batch_tokens=512) for _ in range(2)
        )
        runner: Any = recorded.runners["classify"]
        runner.graphs = graphs_of(recorded)
        return eager, recorded

    return make


def numbers(results: list[Any]) -> list[float]:
    """All probabilities and scores of some results, in order."""
    found: list[float] = []
    for result in results:
        if hasattr(result, "probabilities"):
            found += result.probabilities.values()
        elif hasattr(result, "score"):
            found.append(result.score)
        else:
            found += [span.start + span.score for span in result.spans]
    return found


def test_an_engine_answers_the_same_with_graphs(
    store: AdapterStore, eager_and_recorded: Callable[[FrozenBase], tuple[Any, Any]]
) -> None:
    base = random_encoder()
    shapes = [SeraConfig(16, 16, 8.0, "all-linear"), SeraConfig(8, 2, 8.0, ("query", "value"), use_mixer=False)]
    for seed in range(4):
        pooling = ("mean", "cls", "last_token")[seed % 3]
        store.publish(random_adapter(base, shapes[seed % 2], seed, LABELS, 0.5, pooling=pooling), f"acme/a{seed}")
    store.publish(regressor(base, 5), "acme/r")
    store.publish(labeller(base, 6, LABELS), "acme/l")
    store.publish(span_finder(base, 7), "acme/s")
    names = [f"acme/{name}" for name in ("a0", "a1", "a2", "a3", "r", "l", "s")]
    inputs = ["x", "some longer text", "a text that is longer than all of the others here"]

    async def ask(engine: ServingEngine) -> tuple[list[float], list[NDArray[np.float32]]]:
        calls = await asyncio.gather(*(classify(engine, name, inputs) for name in names * 2))
        vectors = await asyncio.gather(*(engine.embed(name, ["hello"], acting_for(name)) for name in (None, "acme/a0")))
        # However the calls above shared passes, this one's come again.
        calls += [await classify(engine, "acme/a1", inputs) for _ in range(2)]
        await settled(engine)
        return numbers([result for call in calls for result in call.results]), [each.vectors[0] for each in vectors]

    eager, with_graphs = eager_and_recorded(base)
    want, want_vectors = asyncio.run(ask(eager))
    got, got_vectors = asyncio.run(ask(with_graphs))
    assert len(want) > 50
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got_vectors, want_vectors, rtol=1e-3, atol=1e-4)
    captures = with_graphs.runners["classify"].graphs._captures
    assert captures.replays > len(captures) > 2
    captures.check()


def test_passes_of_a_retriever_run_as_graphs_unless_it_could_overflow(
    store: AdapterStore, eager_and_recorded: Callable[[FrozenBase], tuple[Any, Any]]
) -> None:
    base = random_clip()
    bundle = retriever(base, SeraConfig(8, 8, 8.0, "all-linear"), 1)
    store.publish(bundle, "acme/r")
    wild = {name: 1e12 * tensor for name, tensor in bundle.tensors.items()}
    store.publish(AdapterBundle(bundle.config, wild), "acme/wild")
    eager, with_graphs = eager_and_recorded(base)
    captures = with_graphs.runners["classify"].graphs._captures

    async def ask(engine: ServingEngine, name: str) -> list[NDArray[np.float32]]:
        try:
            return (await engine.embed(name, ["a cat", *IMAGES[:2]], acting_for(name))).vectors  # type: ignore[list-item]
        finally:
            await settled(engine)

    np.testing.assert_allclose(
        asyncio.run(ask(with_graphs, "acme/r")), asyncio.run(ask(eager, "acme/r")), rtol=1e-3, atol=1e-4
    )
    assert captures.replays == len(captures) == 2
    captures.check()
    with pytest.raises(AdapterOverflow):
        asyncio.run(ask(with_graphs, "acme/wild"))
    assert captures.replays == 2


def test_a_watched_pass_and_a_failed_capture_run_operation_by_operation(
    store: AdapterStore, eager_and_recorded: Callable[[FrozenBase], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_decoder()
    shape = SeraConfig(8, 8, 8.0, "all-linear")
    store.publish(random_adapter(base, shape, 1, LABELS), "acme/a")
    store.publish(random_adapter(base, shape, 2, LABELS, strength=1e25), "acme/wild")
    eager, with_graphs = eager_and_recorded(base)
    want = numbers(asyncio.run(classify(eager, "acme/a", ["text"])).results)
    captures = with_graphs.runners["classify"].graphs._captures
    with pytest.raises(AdapterOverflow):
        asyncio.run(classify(with_graphs, "acme/wild", ["text"]))
    assert captures.replays == 0
    assert numbers(asyncio.run(classify(with_graphs, "acme/a", ["text"])).results) == pytest.approx(want, abs=1e-4)
    assert captures.replays == 1

    def fails(key: Any) -> Any:
        raise NotCaptured

    monkeypatch.setattr(captures, "get", fails)
    assert numbers(asyncio.run(classify(with_graphs, "acme/a", ["text"])).results) == want
    monkeypatch.setattr(captures, "can_run", lambda key: False)
    monkeypatch.setattr(captures, "get", lambda key: pytest.fail("it is not to be tried"))
    assert numbers(asyncio.run(classify(with_graphs, "acme/a", ["text"])).results) == want


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(32, 2048), (5, 2048), (32, 512), (1, 8)])
def test_sizes_of_passes(max_rows: int, max_tokens: int) -> None:
    base: Any = SimpleNamespace(**{**vars(_shape_of(random_decoder())), "max_length": 300})
    graphs = PassGraphs(base, None, max_rows, max_tokens)  # type: ignore[arg-type]
    keys = set()
    for longest in [*range(1, 301), 400]:
        row = texts([longest], 0)
        for count in range(1, max_rows + 1):
            key = graphs._key(row * count, ShapeClasses(), embeds=True)
            if key is None:
                continue
            assert key.length is not None and count <= key.rows <= max_rows and longest <= key.length
            assert key.length <= max(300, longest), "the base has no more positions"
            padded = key.rows * key.length
            assert padded <= max_tokens and padded - count * longest <= 512
            keys.add(key)
    assert len(keys) < 100
    assert bool(keys) == (max_tokens >= 16)


@pytest.mark.parametrize(
    ("make_base", "lengths"), [(random_encoder, [16]), (random_vit, [None]), (random_clip, [16, None])]
)
def test_the_smallest_pass_of_each_kind_is_captured_at_once(
    make_base: Callable[[], FrozenBase], lengths: list[int | None]
) -> None:
    base = make_base()
    graphs = PassGraphs(base, None, 4, 2048)  # type: ignore[arg-type]
    captured: list[PassKey] = []
    graphs._captures.captured = captured.append  # type: ignore[method-assign, assignment]
    graphs.capture_first()
    assert captured == [PassKey(1, length, ShapeClasses()) for length in lengths]
    for length in lengths:
        (row,) = texts([9], 0) if length is not None else images(1, 0, base)
        # Of texts a dual base projects in any case.
        for embeds in False, True:
            key = graphs._key([row], ShapeClasses(), embeds)
            assert key == PassKey(1, length, ShapeClasses(), embeds and length is None and base.kind == "dual")
    tower = base.image_tower
    if tower is not None:
        for max_rows, most in (1, 1), (4, 2):
            room = PassBuffers(base, max_rows, 3 * tower.tokens - 1).host["pixel_values"].shape
            assert room == (most * 3 * tower.height * tower.width,)


def _shape_of(base: FrozenBase) -> Any:
    """What buffers are made for."""
    names = ("reads_text", "image_tower", "device", "dtype", "hidden_size", "embedding_size", "kind")
    return SimpleNamespace(**{name: getattr(base, name) for name in names})


def test_there_are_not_more_graphs_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = PassGraphs(random_decoder(), None, 32, 512)  # type: ignore[arg-type]
    captures: Any = graphs._captures
    rows = texts([9], 0)
    key = graphs._key(rows, ShapeClasses(), embeds=False)
    captures._works = dict.fromkeys(range(511), None)
    assert graphs._key(rows, ShapeClasses(), embeds=False) == key
    captures._works[511] = None
    assert graphs._key(rows, ShapeClasses(), embeds=False) is None
    captures._works[key] = None
    assert graphs._key(rows, ShapeClasses(), embeds=False) == key


class Graphs:
    """Stands for `PassGraphs` where a runner makes them."""

    error: Exception | None = None

    def __init__(self, base: FrozenBase, context: Any, max_rows: int, max_tokens: int) -> None:
        self.sizes = (max_rows, max_tokens)

    def capture_first(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception | None], Any]]:
    """Make a runner as on a GPU, whose first captures raise an error."""

    def make(error: Exception | None, **settings: Any) -> Any:
        monkeypatch.setattr(Graphs, "error", error)
        base: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), device=torch.device("cuda"))
        return classify_task.ClassificationRunner(
            base,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            SimpleNamespace(),  # type: ignore[arg-type]
            ServeSettings(device="cuda", **settings),
        )

    monkeypatch.setattr(classify_task, "PassGraphs", Graphs)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield make


def test_a_base_whose_passes_cannot_be_captured_is_served_without(
    on_gpu: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert on_gpu(None, classify_max_batch=9, max_batch_tokens=700).graphs.sizes == (9, 700)
    assert on_gpu(None, cuda_graphs=False).graphs is None
    assert caplog.messages == [] and not emptied
    assert on_gpu(RuntimeError("operation not permitted\nwhen capturing")).graphs is None
    (told,) = caplog.messages
    assert told.endswith("without CUDA graphs, which is slower for short texts: operation not permitted")
    assert on_gpu(torch.OutOfMemoryError("no memory")).graphs is None
    assert emptied == [True]
