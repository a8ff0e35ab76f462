"""A combination of adapters answers as the base with the float64 sum of its parts' updates merged into it."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from adapters_store import AdapterBundle, AdapterStore, combination_digest, combine, dense_factors, load_combination
from adapters_store.convert.combine import Combination
from adapters_store.errors import AdapterNotFound, CannotCombine
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, ServingEngine, WeightedAdapter
from sera_serve.errors import AdapterTooLarge, InvalidRequest, UnsupportedTask
from sera_serve.residency import pack
from support.engine import GatedStore, acting_for, settled, until
from support.factories import encoded, greedy, random_adapter

Start = Callable[..., ServingEngine]
LABELS = ["no", "maybe", "yes"]
TEXTS = ["short", "a longer text, of some words", "the quick brown fox jumps over the lazy dog"]
PROMPT = [84, 104, 101, 32, 102, 111, 120]
# LoRA and SeRA of different splits, and layers that only some of them adapt.
SHAPES = {
    "acme/lora": SeraConfig(4, 1, 8.0, "all-linear", use_mixer=False),
    "acme/wide": SeraConfig(16, 16, 8.0, "all-linear"),
    "acme/few": SeraConfig(8, 4, 8.0, ("q_proj", "v_proj", "query", "value")),
}
CHOICES = [
    [("acme/wide", 0.5), ("acme/few", -0.75)],
    [("acme/lora", 1.5), ("acme/wide", 0.25)],
    [("acme/lora", 0.3), ("acme/wide", 0.4), ("acme/few", 0.5)],
]


def published(base: FrozenBase, store: AdapterStore, task: str) -> dict[str, AdapterBundle]:
    bundles = {}
    head = torch.randn(len(LABELS), base.hidden_size, generator=torch.Generator().manual_seed(5))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        targets = shape.target_modules
        if not isinstance(targets, str):
            kind = ("q_proj", "v_proj") if base.kind == "decoder" else ("query", "value")
            shape = SeraConfig(shape.rank, shape.split, 8.0, kind)
        labels = LABELS if task == "classify" else None
        bundle = random_adapter(base, shape, seed, labels, strength=0.3)
        if labels:
            bundle.tensors.update({"head.weight": head, "head.bias": torch.zeros(len(LABELS))})
        store.publish(bundle, name)
        bundles[name] = bundle
    return bundles


def choice(parts: Sequence[tuple[str, float]]) -> list[WeightedAdapter]:
    return [WeightedAdapter(name, weight) for name, weight in parts]


def merged_sum(base: FrozenBase, parts: Sequence[tuple[AdapterBundle, float]]) -> FrozenBase:
    """The base with the weighted sum of dense float64 updates in its weights."""
    result = FrozenBase(base.name, copy.deepcopy(base.model), base.tokenizer, base.info, base.kind)
    for path in {path for bundle, _ in parts for path in bundle.config.modules}:
        weight = result.model.get_submodule(path).get_parameter("weight")
        held = [(bundle, factor) for bundle, factor in parts if path in bundle.config.modules]
        delta = torch.stack([factor * dense_factors(bundle, path).delta_weight() for bundle, factor in held]).sum(0)
        weight.data.copy_((weight.double() + delta.T).to(weight.dtype))
    return result


def test_tokens_are_those_of_the_merged_sum_beside_the_parts_alone(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    bundles = published(decoder, store, "generate")
    engine = start_engine(decoder, store)
    chosen = [[(name, 1.0)] for name in bundles] + CHOICES

    async def together() -> list[list[int]]:
        asked = [parts[0][0] if len(parts) == 1 else choice(parts) for parts in chosen]
        params = [GenerateParams(adapter=adapter, token_ids=PROMPT, max_new_tokens=16) for adapter in asked]
        streams = await asyncio.gather(*(engine.generate(one, acting_for("acme/lora")) for one in params))
        assert [(stream.adapter, stream.version) for stream in streams[:3]] == [(name, 1) for name in bundles]
        assert streams[3].adapter == "0.5*acme/wide@v1 + -0.75*acme/few@v1"
        assert streams[3].version is None
        return [(await stream.collect()).token_ids for stream in streams]

    for parts, tokens in zip(chosen, asyncio.run(together()), strict=True):
        want = greedy(merged_sum(decoder, [(bundles[name], weight) for name, weight in parts]), PROMPT, 16)
        assert tokens == want


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_classifications_and_vectors_are_those_of_the_merged_sum(
    kind: str, request: pytest.FixtureRequest, store: AdapterStore, start_engine: Start
) -> None:
    base: FrozenBase = request.getfixturevalue(kind)
    bundles = published(base, store, "classify")
    engine = start_engine(base, store)
    tenant = acting_for("acme/lora")

    async def together() -> None:
        classified = await asyncio.gather(
            *(engine.classify(choice(parts), TEXTS, tenant) for parts in CHOICES),
            *(engine.classify(name, TEXTS, tenant) for name in bundles),
        )
        embedded = await asyncio.gather(*(engine.embed(choice(parts), TEXTS, tenant) for parts in CHOICES))
        parts_alone = [[(name, 1.0)] for name in bundles]
        for parts, result in zip([*CHOICES, *parts_alone], classified, strict=True):
            pooled = pooled_by(base, [(bundles[name], weight) for name, weight in parts])
            head = bundles["acme/lora"].tensors["head.weight"]
            want = (pooled @ head.T).softmax(1)
            got = torch.tensor([list(scores.probabilities.values()) for scores in result.results])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for parts, vectors in zip(CHOICES, embedded, strict=True):
            pooled = pooled_by(base, [(bundles[name], weight) for name, weight in parts])
            got = torch.stack([torch.from_numpy(vector) for vector in vectors.vectors])
            torch.testing.assert_close(got, torch.nn.functional.normalize(pooled), rtol=1e-4, atol=1e-5)

    asyncio.run(together())


def pooled_by(base: FrozenBase, parts: Sequence[tuple[AdapterBundle, float]]) -> torch.Tensor:
    total = merged_sum(base, parts)
    rows = [total.pooled_states(*encoded(base, [text], 64), base.default_pooling) for text in TEXTS]
    return torch.cat(rows).detach()


def test_ranks_of_a_sum_add_up_to_a_bound(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    # Of a narrow layer; that of a wide one depends on its widths.
    assert max(decoder.module_shapes()["model.layers.0.self_attn.k_proj"]) <= 128
    ranks = {"acme/most": 256, "acme/more": 384, "acme/a": 128, "acme/b": 128, "acme/c": 128}
    for seed, (name, rank) in enumerate(ranks.items()):
        shape = SeraConfig(rank, 16, 8.0, ("k_proj",), use_mixer=False)
        # As a command does, which knows no server.
        store.publish(random_adapter(decoder, shape, seed, strength=0.3), name)
    engine = start_engine(decoder, store)

    async def answer(adapter: str | list[WeightedAdapter]) -> int:
        params = GenerateParams(adapter=adapter, token_ids=PROMPT, max_new_tokens=2)
        return len((await (await engine.generate(params, acting_for("acme/x"))).collect()).token_ids)

    assert asyncio.run(answer("acme/most")) == 2
    assert asyncio.run(answer(choice([("acme/a", 0.5), ("acme/b", 0.5)]))) == 2
    for refused in ("acme/more", choice([("acme/a", 0.5), ("acme/b", 0.5), ("acme/c", 0.5)])):
        with pytest.raises(AdapterTooLarge, match=r"rank 384 of .* more than 256"):
            asyncio.run(answer(refused))
    more = store.load(store.resolve("acme/more").digest)
    for check in (lambda: engine.check_bundle(more), lambda: engine.check_config(more.config)):
        with pytest.raises(AdapterTooLarge, match="train or compress the adapter with a smaller rank"):
            check()


def test_a_stored_combination_answers_as_the_list_does(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    bundles = published(decoder, store, "generate")
    store.publish(combine([bundles["acme/wide"], bundles["acme/few"]], [0.5, -0.75]), "acme/both")
    engine = start_engine(decoder, store)

    async def tokens(adapter: str | list[WeightedAdapter]) -> list[int]:
        params = GenerateParams(adapter=adapter, token_ids=PROMPT, max_new_tokens=16)
        return (await (await engine.generate(params, acting_for("acme/x"))).collect()).token_ids

    assert asyncio.run(tokens("acme/both")) == asyncio.run(tokens(choice(CHOICES[0])))


def test_one_part_of_weight_one_is_the_adapter(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    published(decoder, store, "generate")
    resolved = start_engine(decoder, store)._references.resolve(
        choice([("acme/wide", 0.25), ("acme/wide@v1", 0.75)]), "generate"
    )
    assert resolved == store.resolve("acme/wide")


def test_refusals_name_the_part(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    published(decoder, store, "generate")
    for name, changes in {
        "acme/a": {},
        "acme/other": {},
        "acme/short": {"max_length": 8},
        "acme/mean": {"pooling": "mean"},
        "acme/labels": {"labels": ["x", "y"]},
    }.items():
        fields = {"labels": LABELS, "seed": len(name), **changes}
        store.publish(random_adapter(decoder, SHAPES["acme/wide"], **fields), name)
    engine = start_engine(decoder, store)

    async def ask(parts: list[tuple[str, float]], task: str = "classify") -> None:
        adapter, tenant = choice(parts), acting_for("acme/x")
        if task == "classify":
            await engine.classify(adapter, ["text"], tenant)
        else:
            await engine.generate(GenerateParams(adapter=adapter, prompt="x"), tenant)

    for parts, task, error, param in [
        ([("acme/wide", 1), ("acme/none", 1)], "generate", AdapterNotFound, "adapter[1].adapter"),
        ([("acme/wide", 1), ("acme/a", 1)], "generate", UnsupportedTask, "adapter[1].adapter"),
        ([("acme/wide", 1), ("acme/few", float("inf"))], "generate", InvalidRequest, "adapter[1].weight"),
        ([("acme/wide", 1), ("acme/few", 1e300)], "generate", CannotCombine, "adapter"),
        ([], "generate", InvalidRequest, "adapter"),
        ([("acme/wide", 1)] * 9, "generate", InvalidRequest, "adapter"),
        ([("acme/a", 1), ("acme/short", 1)], "classify", InvalidRequest, "adapter[1].adapter"),
        ([("acme/a", 1), ("acme/labels", 1)], "classify", InvalidRequest, "adapter[1].adapter"),
        ([("acme/a", 1), ("acme/mean", 1)], "classify", CannotCombine, "adapter"),
        # Equal in all but the values of their heads.
        ([("acme/a", 1), ("acme/other", 1)], "classify", CannotCombine, "adapter"),
    ]:
        with pytest.raises(error) as refusal:
            asyncio.run(ask(list(parts), task))
        assert refusal.value.param == param, parts
    with pytest.raises(
        InvalidRequest, match="acme/labels and acme/a differ in labels; combine adapters that agree in it"
    ):
        asyncio.run(ask([("acme/a", 1), ("acme/labels", 1)], "classify"))


def test_a_sum_that_is_larger_than_the_pool_is_refused_before_it_is_made(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    published(decoder, store, "generate")
    engine = start_engine(decoder, store, pool_mib=1)
    # In split 1 the wide ones have 32 times as many numbers.
    for seed in (8, 9):
        store.publish(random_adapter(decoder, SeraConfig(64, 32, 8.0, "all-linear"), seed), f"acme/wide{seed}")
    params = GenerateParams(adapter=choice([("acme/lora", 1), ("acme/wide8", 1), ("acme/wide9", 1)]), prompt="x")
    with pytest.raises(CannotCombine, match="greater common divisor"):
        asyncio.run(engine.generate(params, acting_for("acme/x")))


def test_a_sum_that_is_many_times_as_large_as_its_parts_is_refused(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, store, pool_mib=64)
    narrow = SeraConfig(32, 32, 8.0, "all-linear", use_mixer=False)
    shapes = {"one": SeraConfig(1, 1, 8.0, "all-linear", use_mixer=False), "narrow": narrow, "like": narrow}
    for seed, (name, shape) in enumerate(shapes.items()):
        store.publish(random_adapter(decoder, shape, seed, strength=0.3), f"acme/{name}")

    async def ask(*names: str) -> None:
        adapter = choice([(f"acme/{name}", 0.5) for name in names])
        stream = await engine.generate(
            GenerateParams(adapter=adapter, prompt="x", max_new_tokens=2), acting_for("acme/x")
        )
        await stream.collect()

    # In split 1, 33 ranks in place of 2.
    with pytest.raises(CannotCombine, match="more than 16 times those of its parts together"):
        asyncio.run(ask("one", "narrow"))
    # The pool has room for it.
    digests = [(store.resolve(f"acme/{name}").digest, 0.5) for name in ("one", "narrow")]
    assert load_combination(store, digests).config.parameters < engine._pool.capacity
    asyncio.run(ask("narrow", "like"))


def test_the_memory_of_a_load_is_known_before_any_is_taken(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = published(decoder, store, "generate")
    engine = start_engine(decoder, store)
    parts = [(store.resolve(name).digest, weight) for name, weight in CHOICES[2]]
    total = load_combination(store, parts)
    monkeypatch.setattr(Combination, "add", None)
    largest = max(bundle.file_bytes for bundle in bundles.values())
    assert engine._references.load_size(combination_digest(parts)).nbytes == total.nbytes + largest
    assert engine._references.load_size(parts[0][0]).nbytes == bundles["acme/lora"].file_bytes
    packed = pack(total, engine._module_index, engine._pool.data.dtype)
    loader = engine.residency._loader
    assert loader.load_bytes(combination_digest(parts)) >= total.nbytes + largest + packed.nbytes
    with pytest.raises(AdapterNotFound):
        loader.load_bytes("0" * 64)


def test_a_part_that_is_deleted_ends_the_combination_after_the_requests_under_way(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    published(decoder, store, "generate")
    engine = start_engine(decoder, store)
    params = GenerateParams(adapter=choice(CHOICES[0]), token_ids=PROMPT, max_new_tokens=80)
    digest = combination_digest([(store.resolve(name).digest, weight) for name, weight in CHOICES[0]])

    async def main() -> None:
        alone = await (await engine.generate(params, acting_for("acme/x"))).collect()
        stream = await engine.generate(params, acting_for("acme/x"))
        assert digest in engine.residency.resident_digests()
        for freed in store.delete("acme/few").digests:
            engine.mark_deleted(freed)
        with pytest.raises(AdapterNotFound):
            await engine.generate(params, acting_for("acme/x"))
        assert (await stream.collect()).token_ids == alone.token_ids
        await settled(engine)
        assert digest not in engine.residency.digests()

    asyncio.run(main())


def test_a_part_that_is_deleted_while_the_sum_loads_leaves_nothing(
    decoder: FrozenBase, gated: GatedStore, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated)
    gate = gated.gate = threading.Event()
    parts = [("a/writer", 0.5), ("b/writer", 0.5)]

    async def main() -> None:
        params = GenerateParams(adapter=choice(parts), prompt="hello", max_new_tokens=4)
        request = asyncio.ensure_future(engine.generate(params, acting_for("a/x")))
        await until(lambda: bool(engine.residency.digests()))
        for freed in gated.delete("b/writer").digests:
            engine.mark_deleted(freed)
        gate.set()
        # The bundle is gone: the sum cannot be made.
        with pytest.raises(AdapterNotFound):
            await request
        await settled(engine)
        assert not engine.residency.digests()

    asyncio.run(main())
