"""Format version 2 beside version 1: what is written, what is hashed, and what each calls for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import (
    GAINS,
    HEAD,
    MODULE,
    TEMPLATE,
    Q,
    classifier_fields,
    config_fields,
    fill,
    make_bundle,
    make_classifier,
)

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, HeadSpec, InvalidBundle, expected_shapes

# Written down from the release that knew version 1 alone.
DIGESTS_OF_VERSION_1 = {
    "5dcc75809e3174808ddc3dc2d842899283b7fc711ab47d0ec4e28d9f88f0d607": make_bundle(),
    "e030094205041fec03517dec19103acb0fa989b35f9c10c8389fce366858bcad": make_bundle(
        3, torch.float16, method="lora", modules={Q: {**MODULE, "use_mixer": False, "split": 1}}
    ),
    "9b415ed5790deb6ed3bf09f537a68c25fc86b4755ab273a484e12cba01ca3c85": make_classifier(1),
    "d3dfdd7255978fa745f45c1e6c157f0d846c4cbac23c82ebe21581d1df820966": make_classifier(
        2, method="head-only", modules={}, labels=["é", "ß"], max_length=None
    ),
}
SECOND: dict[str, dict[str, Any]] = {
    "template": config_fields(format_version=2, chat_template=TEMPLATE),
    "gain": config_fields(format_version=2, modules={Q: {**MODULE, "has_gain": True}}),
    "offset": config_fields(format_version=2, modules={Q: {**MODULE, "has_offset": True}}),
    "both": config_fields(format_version=2, modules={Q: MODULE, "other": GAINS}),
    "head": classifier_fields(format_version=2, head=HEAD),
    "head alone": classifier_fields(format_version=2, head=HEAD, method="head-only", modules={}),
}


@pytest.mark.parametrize("digest", DIGESTS_OF_VERSION_1)
def test_bundles_of_version_1_keep_their_digests(digest: str) -> None:
    bundle = DIGESTS_OF_VERSION_1[digest]
    assert bundle.config.format_version == 1
    assert bundle.digest == digest
    assert AdapterBundle.from_bytes(bundle.to_bytes()).digest == digest


@pytest.mark.parametrize("name", SECOND)
def test_version_2_survives_every_container(name: str, tmp_path: Path) -> None:
    bundle = fill(AdapterConfig.from_json(json.dumps(SECOND[name])), seed=4)
    bundle.save(tmp_path / "folder")
    bundle.save_file(tmp_path / "file")
    for read in (AdapterBundle.load(tmp_path / "folder"), AdapterBundle.load(tmp_path / "file")):
        assert read.digest == bundle.digest
        assert read.config == bundle.config
        assert read.config.parameters == sum(tensor.numel() for tensor in read.tensors.values())


@pytest.mark.parametrize("name", SECOND)
def test_the_constructor_finds_the_version(name: str) -> None:
    config = AdapterConfig.from_json(json.dumps(SECOND[name]))
    fields = {key: value for key, value in dict(config).items() if key != "format_version"}
    assert AdapterConfig(**fields) == config
    plain = {**fields, "chat_template": None, "head": None, "modules": {Q: MODULE}, "method": "sera"}
    assert AdapterConfig(**plain).format_version == 1


def test_fields_of_version_2_are_hashed_and_written_where_they_are_used() -> None:
    plain, templated = make_bundle(), make_bundle(format_version=2, chat_template=TEMPLATE)
    other = make_bundle(format_version=2, chat_template=TEMPLATE + " ")
    assert len({plain.digest, templated.digest, other.digest}) == 3
    # What is left at its default is not there, in either form.
    for text in (templated.config.canonical_json(), templated.config.model_dump_json()):
        assert set(json.loads(text)) == {*config_fields(), "labels", "pooling", "max_length", "chat_template"}
        assert set(json.loads(text)["modules"][Q]) == set(MODULE)
    explicit = {**config_fields(format_version=2, chat_template=TEMPLATE), "head": None}
    explicit["modules"] = {Q: {**MODULE, "has_gain": False, "has_offset": False}}
    assert fill(AdapterConfig.from_json(json.dumps(explicit))).digest == templated.digest


def test_version_2_calls_for_its_tensors() -> None:
    gains = expected_shapes(AdapterConfig.from_json(json.dumps(SECOND["both"])))
    assert gains["other.gain"] == gains["other.offset"] == (12,)
    assert f"{Q}.gain" not in gains
    head = expected_shapes(AdapterConfig.from_json(json.dumps(SECOND["head alone"])))
    assert head == {
        "head.dense.weight": (5, 6),
        "head.dense.bias": (5,),
        "head.weight": (2, 5),
        "head.bias": (2,),
    }
    assert AdapterConfig.from_json(json.dumps(SECOND["head"])).head == HeadSpec(activation="tanh", width=5)


@pytest.mark.parametrize(
    ("name", "drop", "add", "code", "param"),
    [
        ("both", "other.gain", {}, "missing_tensor", "other.gain"),
        ("both", "", {f"{Q}.gain": torch.ones(12)}, "unexpected_tensor", f"{Q}.gain"),
        ("gain", "", {f"{Q}.gain": torch.ones(12, 1)}, "wrong_shape", f"{Q}.gain"),
        ("offset", "", {f"{Q}.offset": torch.full((12,), float("inf"))}, "not_finite", f"{Q}.offset"),
        ("head", "head.dense.bias", {}, "missing_tensor", "head.dense.bias"),
        ("head", "", {"head.weight": torch.ones(2, 6)}, "wrong_shape", "head.weight"),
        ("template", "", {"head.dense.bias": torch.ones(5)}, "unexpected_tensor", "head.dense.bias"),
    ],
)
def test_wrong_tensors_of_version_2_are_refused(
    name: str, drop: str, add: dict[str, torch.Tensor], code: str, param: str
) -> None:
    bundle = fill(AdapterConfig.from_json(json.dumps(SECOND[name])))
    tensors = {key: value for key, value in {**bundle.tensors, **add}.items() if key != drop}
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.from_bytes(AdapterBundle(bundle.config, tensors).to_bytes())
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_a_stored_template_is_told_without_opening_the_bundle(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.publish(make_bundle(), "t/plain")
    store.publish(make_bundle(format_version=2, chat_template=TEMPLATE), "t/chat")
    for name, has in (("t/plain", False), ("t/chat", True)):
        resolved = store.resolve(name)
        assert resolved.has_chat_template is has
        assert store.inspect(name).has_chat_template is has
        # An older release reads the records of bundles that it can serve.
        text = (store.root / "adapters" / name / "versions" / "v1.json").read_text()
        assert ("has_chat_template" in text) is has
        assert store.config(resolved.digest).chat_template == (TEMPLATE if has else None)
    assert {page.adapter: page.has_chat_template for page in store.list_page().adapters} == {
        "t/plain": False,
        "t/chat": True,
    }
