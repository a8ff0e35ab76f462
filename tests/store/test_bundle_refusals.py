"""Each way for a bundle to be wrong is refused with the code and the field that FORMAT.md names."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import resource
from pathlib import Path

import pytest
import torch
from bundle_factory import Q, make_bundle, make_classifier
from raw_files import safetensors_bytes, tar_bytes
from wrong_configs import CONFIGS, M, P
from wrong_files import ARCHIVES, CONFIG, ENTRIES, GOOD, GOOD_CONFIG, GOOD_MODEL, MODEL, OUTSIDE, TENSORS, with_config

import adapters_store
from adapters_store import (
    AdapterBundle,
    AdapterConfig,
    BaseInfo,
    BundleLimits,
    InvalidBundle,
    check_base,
    validate_bundle,
)
from adapters_store.format import containers

INSIDE = {name: (with_config(text), code, param) for name, (text, code, param) in CONFIGS.items()}
CASES = {
    **{f"file: {name}": case for name, case in OUTSIDE.items()},
    **{f"entry: {name}": case for name, case in ENTRIES.items()},
    **{f"tensor: {name}": case for name, case in TENSORS.items()},
    **{f"config: {name}": case for name, case in INSIDE.items()},
    **{f"tar: {name}": case for name, case in ARCHIVES.items()},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("route", ["bytes", "buffer", "path"])
def test_wrong_bundle_is_refused_by_code_and_param(name: str, route: str, tmp_path: Path) -> None:
    data, code, param = CASES[name]
    with pytest.raises(InvalidBundle) as refusal:
        if route == "path":
            (tmp_path / "bundle").write_bytes(data)
            AdapterBundle.load(tmp_path / "bundle")
        else:
            AdapterBundle.from_bytes(data if route == "bytes" else bytearray(data))
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert refusal.value.status == (413 if code == "bundle_too_large" else 422)
    assert str(refusal.value)


@pytest.mark.parametrize(
    ("data", "limits", "code", "param"),
    [
        (GOOD, BundleLimits(max_bytes=len(GOOD) - 1), "bundle_too_large", MODEL),
        (
            tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL)),
            BundleLimits(max_bytes=5000),
            "bundle_too_large",
            "bundle",
        ),
        (GOOD, BundleLimits(max_header_bytes=64), "header_too_large", MODEL),
        (GOOD, BundleLimits(max_config_bytes=64), "bundle_too_large", CONFIG),
    ],
)
def test_limits_are_settings(data: bytes, limits: BundleLimits, code: str, param: str) -> None:
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.from_bytes(data, limits)
    assert (refusal.value.code, refusal.value.param) == (code, param)


BEGINNINGS = {
    "gzip": gzip.compress(GOOD),
    "bzip2": bz2.compress(GOOD),
    "xz": lzma.compress(GOOD),
    "zstd": b"\x28\xb5\x2f\xfd",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!\x1a\x07\x01",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_compressed_file_is_to_be_unpacked(kind: str) -> None:
    """Its weights may well be safetensors: nobody is told to save them as such."""
    with pytest.raises(InvalidBundle, match=r"this is compressed, .* unpack it, and send .* a \.tar that") as refusal:
        AdapterBundle.from_bytes(BEGINNINGS[kind] + bytes(32))
    assert (refusal.value.code, refusal.value.param) == ("not_safetensors", MODEL)


def test_a_configuration_is_measured_in_bytes() -> None:
    bundle = make_bundle(1, training={"description": "\u4e00" * 1000})
    size = len(bundle.config.canonical_json().encode())
    assert AdapterBundle.from_bytes(bundle.to_bytes(), BundleLimits(max_config_bytes=size)).digest == bundle.digest
    with pytest.raises(InvalidBundle, match=f"adapter_config exceeds {size - 1} bytes"):
        AdapterBundle.from_bytes(bundle.to_bytes(), BundleLimits(max_config_bytes=size - 1))


def test_size_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    monkeypatch.setattr(containers, "writable_memory", lambda nbytes: pytest.fail(f"{nbytes} bytes were taken"))
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.load(path)
    assert refusal.value.code == "bundle_too_large"


def test_claimed_header_is_not_allocated() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidBundle):
        AdapterBundle.from_bytes(safetensors_bytes("{}", claimed=1 << 30))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    ("files", "code", "param"),
    [
        ({MODEL: GOOD_MODEL}, "missing_file", CONFIG),
        ({CONFIG: GOOD_CONFIG}, "missing_file", MODEL),
        ({CONFIG: GOOD_CONFIG, MODEL: GOOD_MODEL, "optimizer.pt": b""}, "unexpected_file", "optimizer.pt"),
        ({CONFIG: GOOD_CONFIG, MODEL: GOOD}, "invalid_header", "__metadata__"),
        ({CONFIG: b" " * (2 << 20), MODEL: GOOD_MODEL}, "bundle_too_large", CONFIG),
        ({CONFIG: b"\xff", MODEL: GOOD_MODEL}, "invalid_config", P),
    ],
)
def test_wrong_directory_is_refused(files: dict[str, bytes], code: str, param: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.load(tmp_path)
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_absent_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.load(tmp_path / "nothing")
    assert (refusal.value.code, refusal.value.param) == ("missing_file", "nothing")


@pytest.mark.parametrize("field", ["architecture", "config_digest", "weights_digest", "hidden_size"])
def test_bundle_of_another_base_is_refused(field: str) -> None:
    config = make_bundle().config
    other = config.base.model_copy(update={field: 7 if field == "hidden_size" else "other"})
    with pytest.raises(InvalidBundle) as refusal:
        check_base(config, other, {Q: (8, 12)})
    assert (refusal.value.code, refusal.value.param) == ("wrong_base", f"{P}.base.{field}")


@pytest.mark.parametrize(
    ("shapes", "code"), [({}, "unknown_module"), ({Q: (12, 8)}, "wrong_shape"), ({Q: (8, 12)}, None)]
)
def test_layers_are_compared_with_the_base(shapes: dict[str, tuple[int, int]], code: str | None) -> None:
    config = make_bundle().config
    renamed = BaseInfo(**{**config.base.model_dump(), "name": "the same under another name"})
    if code is None:
        check_base(config, renamed, shapes)
        return
    with pytest.raises(InvalidBundle) as refusal:
        check_base(config, renamed, shapes)
    assert (refusal.value.code, refusal.value.param) == (code, M)


def test_bundle_made_in_memory_is_checked_as_one_read() -> None:
    bundle = make_classifier()
    validate_bundle(bundle)
    wrong = AdapterBundle(bundle.config, {**bundle.tensors, "head.bias": torch.ones(3)})
    with pytest.raises(InvalidBundle) as refusal:
        validate_bundle(wrong)
    assert (refusal.value.code, refusal.value.param) == ("wrong_shape", "head.bias")
    unchecked = AdapterConfig.model_construct(**{**dict(bundle.config), "labels": ["one"]})
    with pytest.raises(InvalidBundle) as refusal:
        validate_bundle(AdapterBundle(unchecked, bundle.tensors))
    assert refusal.value.code == "invalid_config"


def test_refusals_name_a_split_that_fits() -> None:
    with pytest.raises(InvalidBundle, match="a split of 1, 2 would fit"):
        AdapterBundle.from_bytes(INSIDE["split and d_in"][0])


def test_every_documented_code_is_tested_and_every_code_documented() -> None:
    text = (Path(adapters_store.__file__).parent / "FORMAT.md").read_text()
    bundle_part, store_part = text.split("# Store directory")
    documented = set(re.findall(r"^\| `([a-z_]+)` \| ", bundle_part.split("## Refusals")[1], re.MULTILINE))
    assert documented == {case[1] for case in CASES.values()} | {"wrong_base", "wrong_task", "unknown_module"}
    in_store = set(re.findall(r"^\| `([a-z_]+)` \| \d", store_part, re.MULTILINE))
    codes = {error.code for error in vars(adapters_store.errors).values() if isinstance(error, type)}
    assert documented | in_store == codes - {"store_error", "invalid_bundle"}
