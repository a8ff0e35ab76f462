"""Images of many adapters in one batch give what each adapter gives alone, merged into transformers' own model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters_store import AdapterBundle, AdapterStore, WrongTask
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, ImageInput
from sera_serve.engine import BASE_PRINCIPAL, ClassifyResult, EmbedResult, GenerateParams, Principal, ServingEngine
from sera_serve.engine.image_rows import PixelMemory
from sera_serve.engine.tenant_memory import Reservation
from sera_serve.errors import (
    ImageTooLarge,
    InvalidImage,
    InvalidRequest,
    SeraServeError,
    TenantOverloaded,
    UnsupportedTask,
)
from support.engine import acting_for, classify, generate, settled
from support.factories import merged, random_adapter, random_encoder
from support.vision import (
    image_classifier,
    image_file,
    picture,
    pixels_of,
    random_clip,
    random_deit,
    random_vit,
    retriever,
    spec_of,
)

Start = Callable[..., ServingEngine]
FILES = [image_file(seed, file_format) for seed, file_format in enumerate(["PNG", "JPEG", "WEBP", "PNG"])]
FILES.append(image_file(picture(9, 30, 70)))
IMAGES = [ImageInput(data, f"inputs[{index}].image") for index, data in enumerate(FILES)]
SHAPES = [
    SeraConfig(16, 16, 8.0, "all-linear"),
    SeraConfig(8, 2, 8.0, ("q_proj", "v_proj"), use_mixer=False),
    SeraConfig(4, 1, 8.0, "all-linear"),
]


def publish(base: FrozenBase, store: AdapterStore) -> dict[str, AdapterBundle]:
    bundles = {}
    for i in range(6):
        spec: dict[str, Any] = {"mean": [0.1 * i] * 3, "resize": ["exact", "shortest_edge"][i % 2]}
        labels = [f"label{j}" for j in range(2 + i)]
        bundles[f"acme/c{i}"] = image_classifier(base, SHAPES[i % 3], i, labels, ["cls", "mean"][i % 2], **spec)
        store.publish(bundles[f"acme/c{i}"], f"acme/c{i}")
    return bundles


def expected(base: FrozenBase, bundle: AdapterBundle) -> torch.Tensor:
    """Of each file: transformers' own model with the update merged densely, its own last norm, and the head."""
    model: Any = merged(base, bundle).model
    assert bundle.config.image is not None
    pixels = torch.cat([pixels_of(data, bundle.config.image) for data in FILES])
    if base.kind == "dual":
        states = model.vision_model.post_layernorm(model.vision_model(pixel_values=pixels).last_hidden_state)
        prefix = 1
    else:
        states = model(pixel_values=pixels).last_hidden_state
        prefix = 2 if "deit" in base.name else 1
    pooled = states[:, 0] if bundle.config.pooling == "cls" else states[:, prefix:].mean(1)
    logits = pooled @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
    return logits.softmax(1)


@pytest.mark.parametrize("make", [random_vit, random_deit, random_clip])
def test_many_classifiers_in_one_batch_are_each_alone_and_merged(
    make: Callable[[], FrozenBase], store: AdapterStore, start_engine: Start
) -> None:
    base = make()
    bundles = publish(base, store)
    engine = start_engine(base, store, max_resident=4)

    async def together() -> list[ClassifyResult]:
        return await asyncio.gather(*(classify(engine, name, IMAGES) for name in [*bundles, *bundles]))

    distinct = set()
    wanted = {name: expected(base, bundle) for name, bundle in bundles.items()}
    for name, result in zip([*bundles, *bundles], asyncio.run(together()), strict=True):
        tower = base.image_tower
        assert tower is not None
        assert result.prompt_tokens == len(FILES) * tower.tokens
        for want, scores in zip(wanted[name], result.results, strict=True):
            got = torch.tensor(list(scores.probabilities.values()))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            distinct.add(round(float(got[0]), 4))
    # The adapters and the images matter.
    assert len(distinct) > 20


def test_one_request_names_several_adapters(store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    bundles = publish(base, store)
    engine = start_engine(base, store)
    names = list(bundles)
    results = asyncio.run(engine.classify_each(names, IMAGES, acting_for(names[0])))
    for name, result in zip(names, results, strict=True):
        for want, scores in zip(expected(base, bundles[name]), result.results, strict=True):
            torch.testing.assert_close(torch.tensor(list(scores.probabilities.values())), want, rtol=1e-4, atol=1e-5)


TEXTS = ["a cat", "a dog on the road", "x", "a longer text that the tokenizer of this base cuts"]


def clip_vectors(base: FrozenBase, data: bytes | None, text: str | None, max_length: int = 40) -> NDArray[np.float32]:
    """transformers' own features of an image or a text, scaled to length 1."""
    model: Any = base.model
    if data is not None:
        found = model.get_image_features(pixel_values=pixels_of(data, spec_of(base))).pooler_output
    else:
        encoded = base.tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        found = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    vector: NDArray[np.float32] = torch.nn.functional.normalize(found, dim=-1)[0].numpy()
    return vector


def test_both_towers_of_clip_with_many_adapters_are_transformers_own(store: AdapterStore, start_engine: Start) -> None:
    base = random_clip()
    bundles: dict[str | None, AdapterBundle | None] = {None: None}
    for i in range(3):
        bundles[f"acme/r{i}"] = bundle = retriever(base, SHAPES[i], i)
        store.publish(bundle, f"acme/r{i}")
    engine = start_engine(base, store)
    short = TEXTS[:3]
    mixed: list[Any] = [short[0], IMAGES[0], IMAGES[1], short[1], short[2], IMAGES[4]]

    async def together() -> list[EmbedResult]:
        return await asyncio.gather(*(engine.embed(name, mixed, acting_for(name)) for name in [*bundles, *bundles]))

    for name, result in zip([*bundles, *bundles], asyncio.run(together()), strict=True):
        bundle = bundles[name]
        own = base if bundle is None else merged(base, bundle)
        for value, vector in zip(mixed, result.vectors, strict=True):
            image = isinstance(value, ImageInput)
            want = clip_vectors(own, value.data if image else None, None if image else value)
            np.testing.assert_allclose(vector, want, rtol=1e-4, atol=1e-5)
            assert vector.shape == (32,)
        assert [tokens == 17 for tokens in result.prompt_tokens] == [isinstance(value, ImageInput) for value in mixed]


def test_texts_for_retrieval_are_cut_as_in_training(store: AdapterStore, start_engine: Start) -> None:
    base = random_clip()
    bundle = retriever(base, SHAPES[0], 0, max_length=24)
    store.publish(bundle, "acme/r")
    engine = start_engine(base, store)
    result = asyncio.run(engine.embed("acme/r", TEXTS, acting_for("acme/r")))
    for text, vector in zip(TEXTS, result.vectors, strict=True):
        want = clip_vectors(merged(base, bundle), None, text, max_length=24)
        np.testing.assert_allclose(vector, want, rtol=1e-4, atol=1e-5)
    assert result.prompt_tokens[-1] == 24
    # Of the base alone, no input is cut.
    with pytest.raises(SeraServeError, match="shorten the input"):
        asyncio.run(engine.embed(None, TEXTS, BASE_PRINCIPAL))


@pytest.mark.parametrize("pooling", [None, "cls", "mean"])
def test_vectors_of_a_vision_base(pooling: Any, store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    engine = start_engine(base, store)
    result = asyncio.run(engine.embed(None, IMAGES, BASE_PRINCIPAL, pooling=pooling, normalize=False))
    for data, vector in zip(FILES, result.vectors, strict=True):
        states = base.model(pixel_values=pixels_of(data, spec_of(base))).last_hidden_state[0]
        want = states[1:].mean(0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(vector, want.numpy(), rtol=1e-4, atol=1e-5)


def test_a_pass_has_as_many_image_tokens_as_it_may(store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store, max_batch_tokens=40)
    sizes: list[int] = []
    runner: Any = engine.runners["classify"]
    own = runner._classify

    def watched(rows: list[Any]) -> Any:
        sizes.append(len(rows))
        return own(rows)

    runner._classify = watched
    asyncio.run(classify(engine, "acme/c0", IMAGES))
    # Two images have 34 tokens, three 51.
    assert max(sizes) == 2
    assert sum(sizes) == len(IMAGES)


def test_what_a_vision_base_refuses(store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store)
    with pytest.raises(UnsupportedTask, match="send images to /v1/classify"):
        asyncio.run(generate(engine, GenerateParams(prompt="hello")))
    with pytest.raises(UnsupportedTask, match="image-classify on a base for images") as refusal:
        asyncio.run(classify(engine, "acme/c0", ["a text"]))
    assert refusal.value.param == "inputs"
    with pytest.raises(UnsupportedTask, match="images and no text"):
        asyncio.run(engine.embed(None, ["a text"], BASE_PRINCIPAL))
    with pytest.raises(InvalidRequest, match="1 images and 1 texts"):
        asyncio.run(classify(engine, "acme/c0", [IMAGES[0], "a text"]))
    with pytest.raises(InvalidRequest, match="cls or mean"):
        asyncio.run(engine.embed(None, IMAGES, BASE_PRINCIPAL, pooling="last_token"))


def test_what_other_bases_refuse(encoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    store.publish(random_adapter(encoder, SHAPES[2], 0, labels=["a", "b"]), "acme/text")
    engine = start_engine(encoder, store)
    with pytest.raises(UnsupportedTask, match="texts and no images") as refusal:
        asyncio.run(classify(engine, "acme/text", IMAGES))
    assert refusal.value.param == "inputs[0].image"
    clip = start_engine(random_clip(), store)
    with pytest.raises(InvalidRequest, match="leave pooling out"):
        asyncio.run(clip.embed(None, ["x"], BASE_PRINCIPAL, pooling="mean"))
    with pytest.raises(InvalidRequest, match="no end token") as no_end:
        asyncio.run(clip.embed(None, [[1, 2, 3]], BASE_PRINCIPAL))
    assert no_end.value.param == "input[0]"


def held_pixels(engine: ServingEngine) -> int:
    """Bytes of pixels that are counted."""
    return sum(reservation.nbytes for reservation in engine._images._memory._reservations)


def test_limits_of_a_request(store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store, max_images=3, max_image_bytes=8000, max_image_pixels=3000)
    with pytest.raises(ImageTooLarge, match="has 5 images; send at most 3"):
        asyncio.run(classify(engine, "acme/c0", IMAGES))
    big = [IMAGES[0], ImageInput(b"\0" * 8001, "inputs[1].image")]
    with pytest.raises(ImageTooLarge, match="8001 bytes; the limit is 8000") as bytes_refused:
        asyncio.run(classify(engine, "acme/c0", big))
    assert bytes_refused.value.param == "inputs[1].image"
    wide = [ImageInput(image_file(picture(0, 60, 60), "JPEG"), "inputs[0].image")]
    with pytest.raises(ImageTooLarge, match=r"inputs\[0\].image: the image has 60 x 60 pixels"):
        asyncio.run(classify(engine, "acme/c0", wide))
    with pytest.raises(InvalidImage, match=r"inputs\[0\].image: the image is no base64"):
        asyncio.run(classify(engine, "acme/c0", [ImageInput("no base64!", "inputs[0].image")]))
    asyncio.run(settled(engine))
    assert held_pixels(engine) == 0


def test_pixels_are_counted_for_each_preprocessing_that_differs(
    store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store)
    tower = base.image_tower
    assert tower is not None
    counted: list[int] = []
    own = engine._images._decode

    def decode(image: ImageInput, specs: Any) -> Any:
        counted.append(held_pixels(engine))
        return own(image, specs)

    monkeypatch.setattr(engine._images, "_decode", decode)
    names = ["acme/c0", "acme/c0@v1", "acme/c1", "acme/c2"]
    asyncio.run(engine.classify_each(names, IMAGES, acting_for("acme")))
    # Two of the four are one adapter, whose pixels are kept once.
    assert set(counted) == {3 * len(IMAGES) * 3 * tower.height * tower.width * 4}
    asyncio.run(settled(engine))
    assert held_pixels(engine) == 0


def test_pixels_of_one_tenant_leave_room_for_those_of_others(
    store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store)
    tower = base.image_tower
    assert tower is not None
    one = 3 * tower.height * tower.width * 4
    monkeypatch.setattr(PixelMemory, "tenant_bytes", 4 * one)
    memory = engine._images._memory

    async def main() -> None:
        # One call alone may have more.
        assert len((await classify(engine, "acme/c0", IMAGES)).results) == len(IMAGES) > 4
        held = Reservation("acme")
        assert memory.grow(held, one)
        with pytest.raises(TenantOverloaded, match="fewer images at a time") as refusal:
            await classify(engine, "acme/c0", IMAGES[:4])
        assert refusal.value.param == "inputs"
        assert len((await classify(engine, "acme/c0", IMAGES[:3])).results) == 3
        other = Principal("other")
        assert len((await engine.embed(None, IMAGES[:4], other)).vectors) == 4
        with pytest.raises(TenantOverloaded):
            await engine.embed(None, IMAGES, other)
        await settled(engine)
        assert held_pixels(engine) == one

    asyncio.run(main())


def test_images_of_a_client_that_has_gone_are_not_begun(
    store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_vit()
    publish(base, store)
    engine = start_engine(base, store)
    decoded: list[str] = []
    own = engine._images._decode

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = asyncio.Event()

        def slow(image: ImageInput, specs: Any) -> Any:
            decoded.append(image.place)
            loop.call_soon_threadsafe(began.set)
            return own(image, specs)

        monkeypatch.setattr(engine._images, "_decode", slow)
        call = asyncio.create_task(classify(engine, "acme/c0", IMAGES))
        await began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await settled(engine)

    asyncio.run(main())
    assert len(decoded) < len(IMAGES)
    assert held_pixels(engine) == 0


def test_bundles_that_a_base_cannot_serve_are_refused(store: AdapterStore, start_engine: Start) -> None:
    base = random_vit()
    engine = start_engine(base, store)
    with pytest.raises(WrongTask, match="for classify, and base 'random-vit', of kind vision") as refusal:
        engine.check_bundle(random_adapter(base, SHAPES[2], 0, labels=["a", "b"], pooling="cls"))
    assert refusal.value.param == "task"
    with pytest.raises(WrongTask, match="image has 48 x 32 pixels, and the base reads 32 x 32"):
        engine.check_bundle(image_classifier(base, SHAPES[2], 0, ["a", "b"], height=48))
    engine.check_bundle(image_classifier(base, SHAPES[2], 0, ["a", "b"]))
    clip = random_clip()
    start_engine(clip, store).check_bundle(retriever(clip, SHAPES[0], 0))
    text = random_encoder()
    bundle = image_classifier(base, SHAPES[2], 0, ["a", "b"])
    moved = AdapterBundle(bundle.config.model_copy(update={"base": text.info, "modules": {}}), {})
    with pytest.raises(WrongTask, match="tasks of text"):
        start_engine(text, store).check_bundle(moved)
