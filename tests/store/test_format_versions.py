"""Format versions 1 to 3 beside each other: what is written, what is hashed, and what each calls for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from bundle_factory import (
    GAINS,
    HEAD,
    IMAGE,
    MODULE,
    TAGS,
    TEMPLATE,
    Q,
    classifier_fields,
    config_fields,
    fill,
    make_bundle,
    make_classifier,
)

from adapters_store import (
    AdapterBundle,
    AdapterConfig,
    AdapterStore,
    HeadSpec,
    InvalidBundle,
    combine,
    expected_shapes,
    export_peft,
)
from adapters_store.errors import CannotCombine

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


# Written down from the release that knew versions 1 and 2.
DIGESTS_OF_VERSION_2 = {
    "template": "eb75513837d2a6012af6a8250897c8005eaf5997ac499fa4d58582a66fd1b5df",
    "gain": "104ecac11d646dc64cd8e2e07073eb0c0ec93f4e3e2951e84d8d184853a5b4ba",
    "offset": "76d7b93ed8b5f4cd487354abb00705d7ea7f59c4a235f796b92283b5f922dd4b",
    "both": "b6562a2f27a9435510559db223cf9888332e9846d6ca2c4bf70e26f53afe4af7",
    "head": "57ab74bb24fd5129b49a8f92587d84f52ad02e79df6905326ea4e2edde88fa82",
    "head alone": "07f3501fd0f6ea0d9cb2d1f6226da235fd93f3579b0d872ce2d3014494fcd1c6",
}
THIRD: dict[str, dict[str, Any]] = {
    "several labels": classifier_fields(format_version=3, multi_label=True),
    "one of several": classifier_fields(format_version=3, multi_label=True, labels=["a"], head=HEAD),
    "regress": classifier_fields(format_version=3, task="regress", labels=None),
    "regress head alone": classifier_fields(
        format_version=3, task="regress", labels=None, method="head-only", modules={}
    ),
    "tokens": classifier_fields(format_version=3, task="token-classify", labels=TAGS, pooling=None),
    "images": config_fields(
        format_version=3, task="image-classify", labels=["a", "b"], pooling="mean", image=IMAGE, multi_label=True
    ),
    "retrieve": config_fields(format_version=3, task="retrieve", image=IMAGE, max_length=7),
}
LATER = SECOND | THIRD


@pytest.mark.parametrize("digest", DIGESTS_OF_VERSION_1)
def test_bundles_of_version_1_keep_their_digests(digest: str) -> None:
    bundle = DIGESTS_OF_VERSION_1[digest]
    assert bundle.config.format_version == 1
    assert bundle.digest == digest
    assert AdapterBundle.from_bytes(bundle.to_bytes()).digest == digest


@pytest.mark.parametrize("name", DIGESTS_OF_VERSION_2)
def test_bundles_of_version_2_keep_their_digests(name: str) -> None:
    bundle = fill(AdapterConfig.from_json(json.dumps(SECOND[name])), seed=4)
    assert bundle.config.format_version == 2
    assert bundle.digest == DIGESTS_OF_VERSION_2[name]


@pytest.mark.parametrize("name", LATER)
def test_later_versions_survive_every_container(name: str, tmp_path: Path) -> None:
    bundle = fill(AdapterConfig.from_json(json.dumps(LATER[name])), seed=4)
    bundle.save(tmp_path / "folder")
    bundle.save_file(tmp_path / "file")
    for read in (AdapterBundle.load(tmp_path / "folder"), AdapterBundle.load(tmp_path / "file")):
        assert read.digest == bundle.digest
        assert read.config == bundle.config
        assert read.config.parameters == sum(tensor.numel() for tensor in read.tensors.values())


@pytest.mark.parametrize("name", LATER)
def test_the_constructor_finds_the_version(name: str) -> None:
    config = AdapterConfig.from_json(json.dumps(LATER[name]))
    fields = {key: value for key, value in dict(config).items() if key != "format_version"}
    assert AdapterConfig(**fields) == config


@pytest.mark.parametrize("name", SECOND)
def test_the_constructor_finds_version_1(name: str) -> None:
    config = AdapterConfig.from_json(json.dumps(SECOND[name]))
    fields = {key: value for key, value in dict(config).items() if key != "format_version"}
    plain = {**fields, "chat_template": None, "head": None, "modules": {Q: MODULE}, "method": "sera"}
    assert AdapterConfig(**plain).format_version == 1


def test_version_3_is_hashed_and_written_where_it_is_used() -> None:
    plain = fill(AdapterConfig.from_json(json.dumps(classifier_fields())))
    several = fill(AdapterConfig.from_json(json.dumps(THIRD["several labels"])))
    assert plain.digest != several.digest
    written = json.loads(several.config.canonical_json())
    assert set(written) == {*classifier_fields(), "multi_label"}
    # A later version may have the fields of an older one with their defaults.
    explicit = {**THIRD["several labels"], "head": None, "image": None, "chat_template": None}
    assert fill(AdapterConfig.from_json(json.dumps(explicit))).digest == several.digest


def test_version_3_calls_for_its_tensors() -> None:
    def heads(name: str) -> dict[str, tuple[int, ...]]:
        config = AdapterConfig.from_json(json.dumps(THIRD[name]))
        assert config.head_parameters == sum(
            math.prod(shape) for key, shape in expected_shapes(config).items() if key.startswith("head.")
        )
        return {key: shape for key, shape in expected_shapes(config).items() if key.startswith("head.")}

    assert heads("regress") == {"head.weight": (1, 6), "head.bias": (1,)}
    assert heads("tokens") == {"head.weight": (3, 6), "head.bias": (3,)}
    assert heads("images") == {"head.weight": (2, 6), "head.bias": (2,)}
    assert heads("retrieve") == {}


def test_records_tell_what_requests_need_of_version_3(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    for number, fields in enumerate(THIRD.values()):
        bundle = fill(AdapterConfig.from_json(json.dumps(fields)))
        store.publish(bundle, f"t/a{number}")
        resolved = store.resolve(f"t/a{number}")
        assert (resolved.task, resolved.multi_label, resolved.image) == (
            bundle.config.task,
            bundle.config.multi_label,
            bundle.config.image,
        )
        text = (store.root / "adapters" / "t" / f"a{number}" / "versions" / "v1.json").read_text()
        assert ("multi_label" in text) is bundle.config.multi_label
        assert ('"image"' in text) is (bundle.config.image is not None)


def test_peft_holds_no_images_and_heads_say_their_task(tmp_path: Path) -> None:
    for name, fields in THIRD.items():
        bundle = fill(AdapterConfig.from_json(json.dumps(fields)))
        folder = tmp_path / name.replace(" ", "_")
        if bundle.config.image is not None or not bundle.config.modules:
            with pytest.raises(InvalidBundle) as refusal:
                export_peft(bundle, folder)
            assert refusal.value.code in ("no_peft_form", "nothing_to_export")
            assert not folder.exists()
            continue
        assert export_peft(bundle, folder) is True
        with safetensors.safe_open(folder / "head.safetensors", "pt") as file:
            assert file.metadata()["task"] == bundle.config.task
            assert ("multi_label" in file.metadata()) is bundle.config.multi_label


@pytest.mark.parametrize("changes", [{"multi_label": True}, {"task": "regress", "labels": None}])
def test_sums_of_different_tasks_are_refused(changes: dict[str, Any]) -> None:
    one, other = make_classifier(), make_classifier(format_version=3, **changes)
    with pytest.raises(CannotCombine):
        combine([one, other], [1.0, 1.0])
    total = combine([other, other], [0.5, 0.5])
    assert (total.config.task, total.config.multi_label) == (other.config.task, other.config.multi_label)


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
