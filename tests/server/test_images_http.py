"""Images over HTTP on real servers: many adapters against transformers' own merged model, and what is refused."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.client import Classified, InvalidRequestError, SeraClient
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.server.deps import RequestContext
from support.answers import refused
from support.factories import merged, random_adapter, random_encoder
from support.live_server import live_server, wait_until
from support.vision import (
    image_classifier,
    image_file,
    picture,
    pixels_of,
    random_clip,
    random_vit,
    retriever,
    spec_of,
)

SHAPES = [SeraConfig(16, 16, 8.0, "all-linear"), SeraConfig(4, 1, 8.0, "all-linear")]
FILES = [image_file(seed, file_format) for seed, file_format in enumerate(["PNG", "JPEG", "WEBP"])]
# Short limits, so that the tests send little.
LIMITS = {"max_image_bytes": 1_600_000, "max_image_pixels": 250_000, "max_images": 8}


@dataclass(frozen=True)
class Live:
    """A server of one base, and its adapters."""

    url: str
    engine: ServingEngine
    bundles: dict[str, AdapterBundle]

    @property
    def base(self) -> FrozenBase:
        return self.engine.base


def serve(
    base: FrozenBase, make: Callable[[FrozenBase, int], AdapterBundle], folder: Any, **settings: Any
) -> Iterator[Live]:
    store = AdapterStore(folder / "store")
    bundles = {}
    for seed in range(4):
        bundles[f"acme/a{seed}"] = make(base, seed)
        store.publish(bundles[f"acme/a{seed}"], f"acme/a{seed}")
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, **{**LIMITS, **settings}))
    with live_server(build_app(engine, store, engine.settings)) as url:
        yield Live(url, engine, bundles)


def classifier(base: FrozenBase, seed: int) -> AdapterBundle:
    pooling = ["cls", "mean"][seed // 2]
    return image_classifier(base, SHAPES[seed % 2], seed, ["crack", "road", "sky"][: 2 + seed % 2], pooling)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serve(random_vit(), classifier, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    def make(base: FrozenBase, seed: int) -> AdapterBundle:
        return retriever(base, SHAPES[seed % 2], seed) if seed % 2 == 0 else classifier(base, seed)

    yield from serve(random_clip(), make, tmp_path_factory.mktemp("clip"))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(data: bytes) -> dict[str, str]:
    return {"image": encoded(data)}


def post(live: Live, body: Any, path: str = "/v1/classify") -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=30)


def expected(live: Live, name: str, files: list[bytes]) -> torch.Tensor:
    bundle = live.bundles[name]
    assert bundle.config.image is not None
    pixels = torch.cat([pixels_of(data, bundle.config.image) for data in files])
    model: Any = merged(live.base, bundle).model
    if live.base.kind == "dual":
        states = model.vision_model.post_layernorm(model.vision_model(pixel_values=pixels).last_hidden_state)
    else:
        states = model(pixel_values=pixels).last_hidden_state
    pooled = states[:, 0] if bundle.config.pooling == "cls" else states[:, 1:].mean(1)
    logits: torch.Tensor = pooled @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
    return logits.softmax(1)


def scores(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([list(result["probabilities"].values()) for result in answer["results"]])


def test_many_adapters_at_once_are_transformers_own_merged_model(vision: Live) -> None:
    names = [*vision.bundles] * 3
    bodies = [{"adapter": name, "inputs": [image(data) for data in FILES]} for name in names]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: post(vision, body), bodies))
    wanted = {name: expected(vision, name, FILES) for name in vision.bundles}
    for name, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200, answer.text
        torch.testing.assert_close(scores(answer.json()), wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["classify", "classify_each", "form", "embed"])
def test_a_call_is_in_flight_until_its_answer_is_written(
    way: str, vision: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    written = RequestContext.written

    async def noted(context: RequestContext, pieces: Iterable[str]) -> bytes:
        counts.append(vision.engine.in_flight("acme"))
        content = await written(context, pieces)
        counts.append(vision.engine.in_flight("acme"))
        return content

    monkeypatch.setattr(RequestContext, "written", noted)
    for times in (1, 2):
        if way == "form":
            files = [("image", ("0.bin", FILES[0]))]
            answer = httpx.post(f"{vision.url}/v1/classify", data={"adapter": "acme/a1"}, files=files)
        elif way == "embed":
            answer = post(vision, {"model": "acme/a1", "input": [image(FILES[0])]}, "/v1/embeddings")
        else:
            named = {"adapter": "acme/a1"} if way == "classify" else {"adapters": ["acme/a1", "acme/a2"]}
            answer = post(vision, {**named, "inputs": [image(FILES[0])]})
        assert answer.status_code == 200, answer.text
        # The next request of a tenant that may have one in flight is not refused.
        assert vision.engine.in_flight("acme") == 0
        assert counts == [1, 1] * times


def test_the_ways_to_send_an_image_are_one(vision: Live) -> None:
    name = "acme/a1"
    types = ["image/png", "image/jpg", "image/webp"]
    as_urls = [f"data:{kind};base64,{encoded(data)}" for kind, data in zip(types, FILES, strict=True)]
    by_json = post(vision, {"adapter": name, "inputs": [image(data) for data in FILES]}).json()
    by_url = post(vision, {"adapter": name, "inputs": [{"image": url} for url in as_urls]}).json()
    files = [("image", (f"{index}.bin", data)) for index, data in enumerate(FILES)]
    by_form = httpx.post(f"{vision.url}/v1/classify", data={"adapter": name}, files=files)
    assert by_form.status_code == 200, by_form.text
    several = post(vision, {"adapters": ["acme/a0", name], "inputs": [image(data) for data in FILES]}).json()
    assert by_json == by_url == by_form.json() == several["adapters"][1]
    assert [result["label"] in ("crack", "road", "sky") for result in by_json["results"]] == [True] * 3


def test_both_towers_of_clip_are_transformers_own(clip: Live) -> None:
    inputs: list[Any] = ["a cat", image(FILES[0]), "a dog", image(FILES[1])]
    for model in ("random-clip", "acme/a0", "acme/a2"):
        answer = post(clip, {"model": model, "input": inputs}, "/v1/embeddings")
        assert answer.status_code == 200, answer.text
        own: Any = (clip.base if model == "random-clip" else merged(clip.base, clip.bundles[model])).model
        rows = []
        for text, data in (("a cat", FILES[0]), ("a dog", FILES[1])):
            ids = clip.base.tokenizer(text, return_tensors="pt")
            mask = ids["attention_mask"]
            rows.append(own.get_text_features(input_ids=ids["input_ids"], attention_mask=mask).pooler_output)
            rows.append(own.get_image_features(pixel_values=pixels_of(data, spec_of(clip.base))).pooler_output)
        want = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
        got = torch.tensor([item["embedding"] for item in answer.json()["data"]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        # <bos>, five bytes, <eos>; and the 17 tokens of an image.
        assert answer.json()["usage"]["prompt_tokens"] == 7 + 17 + 7 + 17
    wrong = post(clip, {"model": "random-clip", "input": inputs, "dimensions": 64}, "/v1/embeddings")
    assert "have 32 numbers" in refused(wrong, 400, "invalid_request")["message"]


@pytest.mark.parametrize(
    ("inputs", "param", "named"),
    [
        ([image(FILES[0]), "ok", "a" * 60], "input[2]", "input 2 has more than 40 tokens"),
        ([image(FILES[0]), "ok", "a" * 6000], "input[2]", "input 2 has 6000 characters"),
        (["ok", "a" * 60, image(FILES[0])], "input[1]", "input 1 has more than 40 tokens"),
        # An input that is in no list has no place. The parser's errors name both so too.
        ("a" * 60, "input", "input has more than 40 tokens"),
        (["a" * 60], "input[0]", "input 0 has more than 40 tokens"),
        (["a" * 6000], "input[0]", "input 0 has 6000 characters"),
        ([1, 2, 3], "input", "input has no end token"),
        ([[1, 2, 3]], "input[0]", "input[0] has no end token"),
        ([[1, 257], [1, 2]], "input[1]", "input[1] has no end token"),
    ],
)
def test_an_error_of_an_embedding_names_the_input_at_fault(clip: Live, inputs: Any, param: str, named: str) -> None:
    answer = post(clip, {"model": "random-clip", "input": inputs}, "/v1/embeddings")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"].startswith(named)) == (400, param, True), error


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ("a", "input"),
        ([1, 2], "input"),
        (["a"], "input[0]"),
        (["a", "b"], "input[0]"),
        ([image(FILES[0]), "a"], "input[1]"),
    ],
)
def test_a_text_for_a_base_of_images_is_named(vision: Live, inputs: Any, param: str) -> None:
    answer = post(vision, {"model": "random-vit", "input": inputs}, "/v1/embeddings")
    error = refused(answer, 400, "unsupported_task")
    assert error["param"] == param
    assert error["message"].startswith(f"{param} is no image, and base 'random-vit' takes images and no text")


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 71])
def test_a_form_without_a_boundary_is_told_the_fields_of_this_route(vision: Live, boundary: str) -> None:
    headers = {"Content-Type": f"multipart/form-data{boundary}"}
    answer = httpx.post(f"{vision.url}/v1/classify", content=b"x", headers=headers)
    error = refused(answer, 400, "invalid_multipart")
    assert error["param"] == "Content-Type"
    assert error["message"].endswith("curl -F adapter=tenant/name -F image=@photo.jpg")


def test_a_text_for_retrieval_is_cut_however_long_it_is(clip: Live) -> None:
    vectors = []
    for text in ("ab" * 12, "ab" * 5000, "ab" * 500_000):
        answer = post(clip, {"model": "acme/a0", "input": ["x", text]}, "/v1/embeddings")
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == 3 + 24
        vectors.append(answer.json()["data"][1]["embedding"])
    np.testing.assert_allclose(vectors, vectors[:1] * 3, rtol=1e-5)


def test_a_classifier_of_clips_image_tower(clip: Live) -> None:
    answer = post(clip, {"adapter": "acme/a1", "inputs": [image(data) for data in FILES]})
    torch.testing.assert_close(scores(answer.json()), expected(clip, "acme/a1", FILES), rtol=1e-4, atol=1e-5)
    no_head = post(clip, {"adapter": "acme/a0", "inputs": [image(FILES[0])]})
    assert "/v1/embeddings" in refused(no_head, 422, "unsupported_task")["message"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
BOMB = b"\x89PNG\r\n\x1a\n" + HEADER + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")
HOSTILE = {
    "a bomb": (image(BOMB), "image_too_large", "inputs[0].image"),
    "too many pixels": (image(image_file(picture(0, 600, 500))), "image_too_large", "inputs[0].image"),
    "too many bytes": ({"image": "A" * 2_140_000}, "image_too_large", "inputs[0].image"),
    "truncated": (image(FILES[1][:200]), "invalid_image", "inputs[0].image"),
    "a GIF": (image(image_file(0, "GIF")), "invalid_image", "inputs[0].image"),
    "animated": (
        image(image_file(picture(0), "WEBP", save_all=True, append_images=[picture(1)])),
        "invalid_image",
        "inputs[0].image",
    ),
    "no image": (image(b"hello, world"), "invalid_image", "inputs[0].image"),
    "no base64": ({"image": "%%%"}, "invalid_image", "inputs[0].image"),
    "line breaks": ({"image": "aGVs\nbG8="}, "invalid_image", "inputs[0].image"),
    "cut base64": ({"image": encoded(FILES[0])[:-3]}, "invalid_image", "inputs[0].image"),
    "a URL": ({"image": "https://example.com/cat.png"}, "invalid_value", "inputs[0].image"),
    "a file URL": ({"image": "file:///etc/passwd"}, "invalid_value", "inputs[0].image"),
    "a data URL of text": ({"image": "data:text/html;base64,aGVsbG8="}, "invalid_value", "inputs[0].image"),
    "a data URL without base64": ({"image": "data:image/png,abc"}, "invalid_value", "inputs[0].image"),
    "an empty data URL": ({"image": "data:image/png;base64,"}, "invalid_image", "inputs[0].image"),
    "empty": ({"image": ""}, "invalid_value", "inputs[0].image"),
    "no text": ({"image": 5}, "invalid_value", "inputs[0].image"),
    "another field": ({"image": "aGVsbG8=", "detail": "low"}, "invalid_value", "inputs[0]"),
    "an empty object": ({}, "invalid_value", "inputs[0]"),
    "half a pair": ({"text": "a"}, "invalid_value", "inputs[0]"),
    "a text": ("a text", "unsupported_task", "inputs"),
    "a pair": ({"text": "a", "text_pair": "b"}, "unsupported_task", "inputs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_get_typed_errors(name: str, vision: Live) -> None:
    item, code, param = HOSTILE[name]
    error = refused(post(vision, {"adapter": "acme/a0", "inputs": [item]}), 422, code)
    assert error["param"] == param
    if "URL" in name and code == "invalid_value":
        assert "the types are image/jpeg, image/jpg, image/png, image/webp" in error["message"]
    wait_until(lambda: vision.engine.in_flight() == 0)


def test_one_wrong_image_is_named(vision: Live) -> None:
    inputs = [image(FILES[0]), image(FILES[1][:100]), image(FILES[2])]
    error = refused(post(vision, {"adapter": "acme/a0", "inputs": inputs}), 422, "invalid_image")
    assert error["param"] == "inputs[1].image"
    many = [image(FILES[0])] * 9
    error = refused(post(vision, {"adapter": "acme/a0", "inputs": many}), 422, "image_too_large")
    assert (error["param"], "at most 8" in error["message"]) == ("inputs", True)
    files = [("image", ("a.png", FILES[0])), ("image", ("b.png", b"nothing"))]
    form = httpx.post(f"{vision.url}/v1/classify", data={"adapter": "acme/a0"}, files=files)
    assert refused(form, 422, "invalid_image")["param"] == "image[1]"


@pytest.mark.parametrize(
    ("data", "files", "code", "param"),
    [
        ({}, [("image", ("a", FILES[0]))], "missing_field", "adapter"),
        ({"adapter": "acme/a0"}, [], "unsupported_media_type", None),
        ({"adapter": "acme/a0"}, [("picture", ("a", FILES[0]))], "unknown_field", "picture"),
        ({"adapter": "acme/a0", "priority": "high"}, [("image", ("a", FILES[0]))], "unknown_field", "priority"),
        ({"adapter": "acme/a0"}, [("adapter", ("a", b"x"))], "unknown_field", "adapter"),
        ({"adapter": ["acme/a0", "acme/a1"]}, [("image", ("a", FILES[0]))], "unknown_field", "adapter"),
        ({"adapter": ""}, [("image", ("a", FILES[0]))], "invalid_request", "adapter"),
        ({}, [("adapter", ("a", b"acme/a0")), ("image", ("a", FILES[0]))], "invalid_request", "adapter"),
        ({"adapter": "acme/a0"}, [("image", ("a", FILES[0]))] * 9, "image_too_large", "image"),
        ({"adapter": "acme/a0"}, [("image", ("a", FILES[0]))] * 12, "image_too_large", "image"),
        ({"adapter": "acme/a0"}, [("image", ("a", b"x"))] * 600, "image_too_large", "image"),
        ({"adapter": "acme/a0"}, [("picture", ("a", FILES[0]))] * 12, "invalid_multipart", None),
        ({"adapter": "acme/a0"}, [("image", ("a", b"\r\n--limit--x" * 99))], "invalid_multipart", None),
        ({"adapter": "acme/a0", "image": "text"}, [("image", ("a", FILES[0]))], "invalid_request", "image"),
        ({"adapter": "nobody"}, [("image", ("a", FILES[0]))], "invalid_adapter_name", None),
    ],
)
def test_wrong_forms(vision: Live, data: Any, files: Any, code: str, param: str | None) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=limit"} if b"--limit" in str(files).encode() else {}
    response = httpx.post(f"{vision.url}/v1/classify", data=data, files=files, headers=headers)
    status = {"invalid_multipart": 400, "unsupported_media_type": 415}.get(code, 422)
    error = refused(response, status, code)
    assert param is None or error["param"] == param


def test_a_bare_file_is_told_of_the_form(vision: Live) -> None:
    """As `curl --data-binary @photo.jpg` sends it. Where no form is read, none is spoken of."""
    for route, speaks in (("/v1/classify", True), ("/v1/embeddings", False)):
        answer = httpx.post(f"{vision.url}{route}", content=FILES[0], headers={"Content-Type": "image/png"})
        error = refused(answer, 415, "unsupported_media_type")
        assert error["message"].startswith(
            "the body must be JSON in UTF-8; send the header Content-Type: application/json"
        )
        assert error["message"].endswith("or files as a form (multipart/form-data)") is speaks


def test_a_vision_base_refuses_texts_and_says_what_it_takes(vision: Live) -> None:
    assert httpx.get(f"{vision.url}/readyz").status_code == 200
    models = httpx.get(f"{vision.url}/v1/models").json()["data"]
    assert models[0]["task"] == "image-classify"
    me = httpx.get(f"{vision.url}/v1/me").json()
    assert me["base"] == {"name": "random-vit", "kind": "vision"}
    error = refused(post(vision, {"prompt": "hello"}, "/v1/generate"), 422, "unsupported_task")
    assert "send images to /v1/classify" in error["message"]
    for path, body in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = post(vision, {"model": "random-vit"} | body, path)
        assert answer.status_code in (400, 422), path
        assert "chat_template" not in answer.json()["error"]["message"], path
        assert answer.json()["error"]["code"] in ("unsupported_task", "chat_template_missing"), (path, answer.text)
    job = post(vision, {"model": "random-vit", "training_file": "file-1"}, "/v1/fine_tuning/jobs")
    error = refused(job, 400, "invalid_request")
    assert (error["param"], "train_adapter" in error["message"]) == ("model", True)
    vectors = post(vision, {"model": "random-vit", "input": image(FILES[0])}, "/v1/embeddings")
    assert len(vectors.json()["data"][0]["embedding"]) == 64


@pytest.mark.parametrize("model", ["random-clip", "acme/a0", "acme/a1"])
@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/completions", {"prompt": "hello"}),
    ],
)
def test_a_base_that_does_not_generate_names_the_routes_that_it_has(
    clip: Live, model: str, path: str, content: dict[str, Any]
) -> None:
    error = refused(post(clip, {"model": model} | content, path), 400, "unsupported_task")
    assert "send images to /v1/classify, or images and texts to /v1/embeddings" in error["message"]
    assert (error["param"], "chat_template" in error["message"]) == ("model", False)


def test_images_to_a_base_of_text_are_refused(tmp_path: Any) -> None:
    base = random_encoder()

    def make(base: FrozenBase, seed: int) -> AdapterBundle:
        return random_adapter(base, SHAPES[1], seed, labels=["a", "b"])

    for live in serve(base, make, tmp_path):
        response = post(live, {"adapter": "acme/a0", "inputs": [image(FILES[0])]})
        assert refused(response, 422, "unsupported_task")["param"] == "inputs[0].image"
        pair = {"text": "a", "text_pair": "b"}
        for value, message in (
            (pair, 'input must be a text that is not empty, or {"image": "<base64>"}; a sentence pair has no vector'),
            ("", 'input must be a text that is not empty, or {"image": "<base64>"}'),
            (["a", [1]], 'input[1] must be a text that is not empty, or {"image": "<base64>"}; the first input is no'),
            ([[]], "input[0] must be a list of tokens and not empty"),
            ([[1], "a"], "input[1] must be a list of tokens, as the first input is, and not empty"),
        ):
            error = refused(post(live, {"model": base.name, "input": value}, "/v1/embeddings"), 400, "invalid_value")
            assert error["message"].startswith(message) and ("first" in message or "first" not in error["message"])
        pairs = post(live, {"adapter": "acme/a0", "inputs": [{"text": "a", "text_pair": "b"}]})
        assert pairs.status_code == 200
        messages = [{"role": "user", "content": "hello"}]
        for path, content in (("/v1/chat/completions", {"messages": messages}), ("/v1/responses", {"input": "hi"})):
            for model in (base.name, "acme/a0"):
                error = refused(post(live, {"model": model} | content, path), 400, "unsupported_task")
                assert "serves classify, not generate; send texts to /v1/classify" in error["message"]
        # The limit of texts holds: no image is to come.
        long = httpx.post(f"{live.url}/v1/classify", content=b" " * 1_200_000)
        assert long.status_code == 413


def test_a_large_image_passes_and_a_long_body_of_anything_else_does_not(vision: Live) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 500, 3), dtype=np.uint8)
    data = image_file(Image.fromarray(noise), "PNG", compress_level=0)
    assert len(data) * 4 / 3 < 1_600_000
    large = json.dumps({"adapter": "acme/a0", "inputs": [image(data)] * 2}).replace("/", "\\/")
    assert len(large) > 1 << 20
    answer = httpx.post(
        f"{vision.url}/v1/classify", content=large, headers={"content-type": "application/json"}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    # Many strings, many escapes, and other characters than ASCII's.
    escapes = "\\u0041" * 230_000
    for inputs in ('"a",' * 350_000, f'"{escapes}",', f'"{"é" * 700_000}",'):
        body = f'{{"adapter":"acme/a0","inputs":[{inputs}"a"]}}'
        response = httpx.post(
            f"{vision.url}/v1/classify", content=body.encode(), headers={"content-type": "application/json"}
        )
        error = refused(response, 400, "invalid_json")
        assert "may only have images" in error["message"]
    over = httpx.post(f"{vision.url}/v1/classify", content=b" " * 2_300_000)
    assert "max_image_bytes" in refused(over, 413, "body_too_large")["message"]


def test_accounts_charge_the_tokens_of_images(vision: Live) -> None:
    def tokens() -> float:
        text = httpx.get(f"{vision.url}/metrics").text
        wanted = 'sera_tenant_tokens_total{kind="prompt",tenant="acme"}'
        (line,) = [line for line in text.splitlines() if line.startswith(wanted)]
        return float(line.rpartition(" ")[2])

    post(vision, {"adapter": "acme/a0", "inputs": [image(FILES[0])]})
    before = tokens()
    post(vision, {"adapter": "acme/a0", "inputs": [image(data) for data in FILES]})
    assert tokens() - before == 3 * 17


def test_the_clients_send_images_from_bytes_and_paths(vision: Live, clip: Live, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(FILES[1])
    want = scores(post(vision, {"adapter": "acme/a0", "inputs": [image(FILES[0]), image(FILES[1])]}).json())

    def of(found: Classified) -> torch.Tensor:
        return scores(found.model_dump())

    with SeraClient(vision.url) as client:
        torch.testing.assert_close(of(client.classify([FILES[0], path], adapter="acme/a0")), want)
        torch.testing.assert_close(of(client.classify(path, adapter="acme/a0")), want[1:])
        (each,) = client.classify_each([FILES[0]], adapters=["acme/a0"])
        torch.testing.assert_close(of(each), want[:1])
        with pytest.raises(InvalidRequestError, match="no JPEG, PNG or WebP"):
            client.classify(b"nothing", adapter="acme/a0")
    with SeraClient(clip.url) as client:
        vectors = client.embed(["a cat", path, FILES[0]], model="acme/a0").vectors
        assert [len(vector) for vector in vectors] == [32] * 3


def test_several_labels_an_image(vision: Live) -> None:
    bundle = image_classifier(vision.base, SHAPES[1], 9, ["crack", "wet", "leaves"])
    several = AdapterBundle(bundle.config.model_copy(update={"multi_label": True}), bundle.tensors)
    vision.engine.check_bundle(several)
    vision.engine.store.publish(several, "acme/several")
    answer = post(vision, {"adapter": "acme/several", "inputs": [image(data) for data in FILES]}).json()
    for result in answer["results"]:
        chosen = [label for label, probability in result["probabilities"].items() if probability >= 0.5]
        assert result["labels"] == chosen
