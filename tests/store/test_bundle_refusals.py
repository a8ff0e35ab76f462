"""Each way for a bundle to be wrong is refused with the code and the field that FORMAT.md names."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import re
import resource
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import MODULE, Q, classifier_fields, config_fields, make_bundle, make_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import safetensors_bytes, special_member, split_file, tar_bytes, two_files

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

A, B, C = f"{Q}.sera_a", f"{Q}.sera_b", f"{Q}.sera_c"
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GOOD = make_bundle().to_bytes()
GOOD_CONFIG, GOOD_MODEL = two_files(make_bundle())
Case = tuple[bytes, str, str]


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, data = split_file(GOOD)
    change(header)
    return safetensors_bytes(header, data)


def with_config(text: str | dict[str, Any]) -> bytes:
    text = json.dumps(text) if isinstance(text, dict) else text
    return with_header(lambda header: header["__metadata__"].update(adapter_config=text))


def with_entry(**fields: Any) -> bytes:
    return with_header(lambda header: header[A].update(fields))


def with_tensors(**changes: torch.Tensor | None) -> bytes:
    bundle = make_bundle()
    short = {"a": A, "b": B, "c": C}
    tensors = dict(bundle.tensors)
    for key, tensor in changes.items():
        if tensor is None:
            del tensors[short[key]]
        else:
            tensors[short.get(key, key)] = tensor
    return AdapterBundle(bundle.config, tensors).to_bytes()


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    return buffer.getvalue()


def with_hole(value: float) -> torch.Tensor:
    tensor = torch.zeros(8, 2)
    tensor[7, 1] = value
    return tensor


OUTSIDE: dict[str, Case] = {
    "empty": (b"", "truncated", MODEL),
    "seven bytes": (b"\x00" * 7, "truncated", MODEL),
    "header cut": (GOOD[:200], "truncated", MODEL),
    "data cut": (GOOD[:-1], "truncated", MODEL),
    "text": (b"this is a text file, not a bundle", "not_safetensors", MODEL),
    "zip": (torch_zip(), "not_safetensors", MODEL),
    **{
        f"pickle {protocol}": (pickle.dumps({"w": [1.0] * 9}, protocol=protocol), "not_safetensors", MODEL)
        for protocol in range(6)
    },
    "gzip of a tar": (
        gzip.compress(tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))),
        "not_safetensors",
        MODEL,
    ),
    "no brace": (safetensors_bytes(b" " + json.dumps({}).encode()), "not_safetensors", MODEL),
    "empty header": (safetensors_bytes(b"", b"{" * 8), "not_safetensors", MODEL),
    "1 GB header": (safetensors_bytes("{}", claimed=1 << 30), "header_too_large", MODEL),
    "header over 4 MiB": (safetensors_bytes("{" + " " * (4 << 20) + "}"), "header_too_large", MODEL),
    "header not JSON": (safetensors_bytes('{"a": }'), "invalid_header", MODEL),
    "header not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "invalid_header", MODEL),
    "header too deep": (safetensors_bytes('{"a":' + "[" * 200_000), "invalid_header", MODEL),
    "tensor twice": (safetensors_bytes('{"a": 1, "a": 1}'), "invalid_header", MODEL),
    "field twice": (
        safetensors_bytes('{"a": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', b"1234"),
        "invalid_header",
        MODEL,
    ),
    "rest after the data": (GOOD + b"\x00", "invalid_header", MODEL),
    "metadata no strings": (
        with_header(lambda h: h["__metadata__"].update(adapter_config={})),
        "invalid_header",
        "__metadata__",
    ),
    "metadata no object": (
        with_header(lambda h: h.update(__metadata__=[])),
        "invalid_header",
        "__metadata__",
    ),
    "metadata unknown": (
        with_header(lambda h: h["__metadata__"].update(note="x")),
        "invalid_header",
        "__metadata__",
    ),
    "no configuration": (with_header(lambda h: h.pop("__metadata__")), "missing_file", CONFIG),
}
ENTRIES: dict[str, Case] = {
    "entry no object": (with_header(lambda h: h.update({A: 1})), "invalid_header", A),
    "entry lacks a field": (with_header(lambda h: h[A].pop("shape")), "invalid_header", A),
    "entry has a field": (with_entry(note=1), "invalid_header", A),
    "shape no list": (with_entry(shape="8,2"), "invalid_header", A),
    "shape negative": (with_entry(shape=[-8, -2]), "invalid_header", A),
    "shape boolean": (with_entry(shape=[16, True]), "invalid_header", A),
    "shape float": (with_entry(shape=[8.0, 2]), "invalid_header", A),
    "shape astronomic": (with_entry(shape=[10**300, 2]), "invalid_header", A),
    "shape many": (with_entry(shape=[1] * 99), "invalid_header", A),
    "offsets three": (with_entry(data_offsets=[0, 64, 64]), "invalid_header", A),
    "offsets backwards": (with_entry(data_offsets=[64, 0]), "invalid_header", A),
    "offsets shorter": (with_entry(data_offsets=[0, 60]), "invalid_header", A),
    "overlap": (with_header(lambda h: h[B].update(data_offsets=[0, 96])), "invalid_header", B),
    "gap": (
        safetensors_bytes({A: {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        "invalid_header",
        A,
    ),
    "offset behind the file": (
        safetensors_bytes({A: {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 4 << 20]}}, bytes(16)),
        "truncated",
        MODEL,
    ),
    "no element": (with_entry(shape=[0, 2], data_offsets=[0, 0]), "wrong_shape", A),
    "F64": (with_tensors(a=torch.zeros(8, 2, dtype=torch.float64)), "wrong_dtype", A),
    "I32": (with_tensors(a=torch.zeros(8, 2, dtype=torch.int32)), "wrong_dtype", A),
    "dtype unknown": (with_entry(dtype="F99"), "wrong_dtype", A),
    "dtype no string": (with_entry(dtype=["F32"]), "wrong_dtype", A),
}
TENSORS: dict[str, Case] = {
    "missing a": (with_tensors(a=None), "missing_tensor", A),
    "missing c": (with_tensors(c=None), "missing_tensor", C),
    "missing head": (
        with_config(classifier_fields()),
        "missing_tensor",
        "head.weight",
    ),
    "unexpected": (with_tensors(extra=torch.ones(1)), "unexpected_tensor", "extra"),
    "unexpected c": (
        with_config(config_fields(modules={Q: {**MODULE, "use_mixer": False}})),
        "unexpected_tensor",
        C,
    ),
    "unexpected head": (
        with_tensors(**{"head.weight": torch.ones(2, 6)}),
        "unexpected_tensor",
        "head.weight",
    ),
    "transposed": (with_tensors(a=torch.zeros(2, 8)), "wrong_shape", A),
    "flat": (with_tensors(a=torch.zeros(16)), "wrong_shape", A),
    "b too wide": (with_tensors(b=torch.zeros(2, 13)), "wrong_shape", B),
    "NaN": (with_tensors(a=with_hole(float("nan"))), "not_finite", A),
    "infinity": (with_tensors(a=with_hole(float("-inf"))), "not_finite", A),
    "NaN in half": (with_tensors(a=with_hole(float("nan")).half()), "not_finite", A),
    "NaN in bfloat16": (with_tensors(a=with_hole(float("nan")).bfloat16()), "not_finite", A),
}
P = "adapter_config"
M = f"{P}.modules.{Q}"


def module(**changes: Any) -> dict[str, Any]:
    return config_fields(modules={Q: {**MODULE, **changes}})


CONFIGS: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "not JSON": ("{", "invalid_config", P),
    "no object": ("[1]", "invalid_config", P),
    "too deep": ('{"a":' * 100_000, "invalid_config", P),
    "key twice": ('{"task": "generate", "task": "generate"}', "invalid_config", P),
    "NaN": (json.dumps(config_fields(training={"loss": float("nan")})), "invalid_config", P),
    "infinite scaling": (json.dumps(module(scaling=float("inf"))), "invalid_config", P),
    "scaling overflows": (json.dumps(module()).replace("0.5", "1e999"), "invalid_config", f"{M}.scaling"),
    "scaling astronomic": (json.dumps(module()).replace("0.5", "9" * 400), "invalid_config", f"{M}.scaling"),
    "digits without end": (json.dumps(module()).replace("0.5", "9" * 9000), "invalid_config", P),
    "lone surrogate": (json.dumps(config_fields(training={"a": "\ud800"})), "invalid_config", P),
    "other version": (config_fields(format_version=2), "unsupported_format", f"{P}.format_version"),
    "version true": (config_fields(format_version=True), "invalid_config", f"{P}.format_version"),
    "version 1.0": (config_fields(format_version=1.0), "invalid_config", f"{P}.format_version"),
    "no version": (
        {k: v for k, v in config_fields().items() if k != "format_version"},
        "invalid_config",
        f"{P}.format_version",
    ),
    "no base": ({k: v for k, v in config_fields().items() if k != "base"}, "invalid_config", f"{P}.base"),
    "unknown field": (config_fields(lora_alpha=1), "invalid_config", f"{P}.lora_alpha"),
    "unknown task": (config_fields(task="embed"), "invalid_config", f"{P}.task"),
    "unknown method": (config_fields(method="vera"), "invalid_config", f"{P}.method"),
    "unknown base field": (config_fields(base={"x": 1}), "invalid_config", f"{P}.base.name"),
    "unknown module field": (module(alpha=1), "invalid_config", f"{M}.alpha"),
    "rank a float": (module(rank=4.0), "invalid_config", f"{M}.rank"),
    "rank a string": (module(rank="4"), "invalid_config", f"{M}.rank"),
    "rank true": (module(rank=True), "invalid_config", f"{M}.rank"),
    "rank 0": (module(rank=0), "invalid_config", f"{M}.rank"),
    "rank negative": (module(rank=-4), "invalid_config", f"{M}.rank"),
    "d_in astronomic": (module(d_in=1 << 40), "invalid_config", f"{M}.d_in"),
    "mixer a number": (module(use_mixer=1), "invalid_config", f"{M}.use_mixer"),
    "split and rank": (module(split=4, rank=6), "invalid_config", f"{M}.split"),
    "split and d_in": (module(split=4, d_in=6), "invalid_config", f"{M}.split"),
    "split and d_out": (module(split=4, d_out=6), "invalid_config", f"{M}.split"),
    "path with a slash": (
        config_fields(modules={"../x": MODULE}),
        "invalid_config",
        f"{P}.modules.../x.[key]",
    ),
    "path with a line end": (
        config_fields(modules={"x\n": MODULE}),
        "invalid_config",
        f"{P}.modules.x\n.[key]",
    ),
    "no modules": (config_fields(modules={}), "invalid_config", f"{P}.modules"),
    "head-only with modules": (classifier_fields(method="head-only"), "invalid_config", f"{P}.modules"),
    "head-only generator": (
        config_fields(method="head-only", modules={}),
        "invalid_config",
        f"{P}.method",
    ),
    "generator with labels": (config_fields(labels=["a", "b"]), "invalid_config", f"{P}.labels"),
    "generator with pooling": (config_fields(pooling="cls"), "invalid_config", f"{P}.pooling"),
    "generator with max_length": (config_fields(max_length=9), "invalid_config", f"{P}.max_length"),
    "no labels": (classifier_fields(labels=None), "invalid_config", f"{P}.labels"),
    "one label": (classifier_fields(labels=["a"]), "invalid_config", f"{P}.labels"),
    "same labels": (classifier_fields(labels=["a", "a"]), "invalid_config", f"{P}.labels"),
    "empty label": (classifier_fields(labels=["a", ""]), "invalid_config", f"{P}.labels.1"),
    "no pooling": (classifier_fields(pooling=None), "invalid_config", f"{P}.pooling"),
    "max_length 0": (classifier_fields(max_length=0), "invalid_config", f"{P}.max_length"),
    "training no object": (config_fields(training=[]), "invalid_config", f"{P}.training"),
    "training too deep": (
        config_fields(training={"a": [[[[[[[[1]]]]]]]]}),
        "invalid_config",
        f"{P}.training",
    ),
}
INSIDE = {name: (with_config(text), code, param) for name, (text, code, param) in CONFIGS.items()}
LINK = special_member(MODEL, tarfile.SYMTYPE, "/etc/passwd")
ARCHIVES: dict[str, Case] = {
    "no config": (tar_bytes((MODEL, GOOD_MODEL)), "missing_file", CONFIG),
    "no model": (tar_bytes((CONFIG, GOOD_CONFIG)), "missing_file", MODEL),
    "nothing": (tar_bytes((special_member("x", tarfile.DIRTYPE), b"")), "missing_file", CONFIG),
    "other file": (
        tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL), ("README", b"")),
        "unexpected_file",
        "README",
    ),
    "pickle beside": (tar_bytes((CONFIG, GOOD_CONFIG), ("a.bin", b"")), "unexpected_file", "a.bin"),
    "symbolic link": (tar_bytes((CONFIG, GOOD_CONFIG), (LINK, b"")), "invalid_archive", MODEL),
    "hard link": (
        tar_bytes((CONFIG, GOOD_CONFIG), (special_member(MODEL, tarfile.LNKTYPE, CONFIG), b"")),
        "invalid_archive",
        MODEL,
    ),
    "device": (tar_bytes((special_member(CONFIG, tarfile.CHRTYPE), b"")), "invalid_archive", CONFIG),
    "pipe": (tar_bytes((special_member(CONFIG, tarfile.FIFOTYPE), b"")), "invalid_archive", CONFIG),
    "sparse": (
        tar_bytes((special_member(CONFIG, tarfile.GNUTYPE_SPARSE), b"")),
        "invalid_archive",
        CONFIG,
    ),
    "absolute": (tar_bytes((f"/{CONFIG}", GOOD_CONFIG)), "invalid_archive", f"/{CONFIG}"),
    "parent": (tar_bytes((f"../{CONFIG}", GOOD_CONFIG)), "invalid_archive", f"../{CONFIG}"),
    "parent inside": (tar_bytes((f"a/../{CONFIG}", GOOD_CONFIG)), "invalid_archive", f"a/../{CONFIG}"),
    "deep": (tar_bytes((f"a/b/{CONFIG}", GOOD_CONFIG)), "invalid_archive", f"a/b/{CONFIG}"),
    "backslash": (tar_bytes((f"a\\{CONFIG}", GOOD_CONFIG)), "invalid_archive", f"a\\{CONFIG}"),
    "twice": (tar_bytes((CONFIG, GOOD_CONFIG), (CONFIG, GOOD_CONFIG)), "invalid_archive", CONFIG),
    "twice in two directories": (
        tar_bytes((f"a/{CONFIG}", GOOD_CONFIG), (f"b/{CONFIG}", GOOD_CONFIG)),
        "invalid_archive",
        CONFIG,
    ),
    "two directories": (
        tar_bytes((f"a/{CONFIG}", GOOD_CONFIG), (f"b/{MODEL}", GOOD_MODEL)),
        "invalid_archive",
        "bundle",
    ),
    "many members": (
        tar_bytes(*[(special_member(f"d{i}", tarfile.DIRTYPE), b"") for i in range(40)]),
        "invalid_archive",
        "bundle",
    ),
    "damaged": (
        tar_bytes((CONFIG, GOOD_CONFIG)).replace(b"adapter_config", b"Xdapter_config", 1),
        "invalid_archive",
        "bundle",
    ),
    "member cut": (
        tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))[: 1024 + len(GOOD_CONFIG) // 512 * 512 + 600],
        "truncated",
        MODEL,
    ),
    "model cut": (tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL[:-4])), "truncated", MODEL),
    "model a pickle": (
        tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, pickle.dumps({"w": [1.0] * 9}))),
        "not_safetensors",
        MODEL,
    ),
    "second configuration": (
        tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD)),
        "invalid_header",
        "__metadata__",
    ),
    "config huge": (tar_bytes((CONFIG, b" " * (2 << 20)), (MODEL, GOOD_MODEL)), "bundle_too_large", CONFIG),
}
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


def test_size_is_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    tracemalloc.start()
    with pytest.raises(InvalidBundle) as refusal:
        AdapterBundle.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refusal.value.code == "bundle_too_large"
    assert peak < 1 << 20


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


TAR = tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))
PIECES = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [b"{", b"}", b"[", b'"', b"0", b"-1", b"1e9", b"null", b"\xff" * 8, b"ustar", b"\x80\x00\x00\x01", b"9" * 12]
)


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from([GOOD, TAR, tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL), format=tarfile.GNU_FORMAT)]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), PIECES, st.booleans()), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_any_damage_is_refused_by_type(data: bytes, edits: list[tuple[float, bytes, bool]], kept: float) -> None:
    """Whatever the bytes, the answer is a bundle or an `InvalidBundle`."""
    for place, piece, overwrite in edits:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + len(piece) * overwrite :]
    if kept < 0.2:
        data = data[: int(len(data) * kept * 5)]
    with contextlib.suppress(InvalidBundle):
        validate_bundle(AdapterBundle.from_bytes(data))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=600) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_refused_by_type(data: bytes) -> None:
    for attempt in (data, safetensors_bytes(b"{" + data), tar_bytes((CONFIG, data), (MODEL, data)), data + TAR[200:]):
        with pytest.raises(InvalidBundle):
            AdapterBundle.from_bytes(attempt)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(512)), PIECES, st.sampled_from([0, 1024 + len(GOOD_CONFIG) // 512 * 512]))
def test_damaged_tar_header_with_a_right_checksum_is_refused_by_type(at: int, piece: bytes, start: int) -> None:
    data = bytearray(TAR)
    piece = piece[: 512 - at]
    data[start + at : start + at + len(piece)] = piece
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    with contextlib.suppress(InvalidBundle):
        AdapterBundle.from_bytes(data)


def test_refusals_name_a_split_that_fits() -> None:
    with pytest.raises(InvalidBundle, match="a split of 1, 2 would fit"):
        AdapterBundle.from_bytes(INSIDE["split and d_in"][0])


def test_every_documented_code_is_tested_and_every_code_documented() -> None:
    text = (Path(adapters_store.__file__).parent / "FORMAT.md").read_text()
    bundle_part, store_part = text.split("# Store directory")
    documented = set(re.findall(r"^\| `([a-z_]+)` \| ", bundle_part.split("## Refusals")[1], re.MULTILINE))
    assert documented == {case[1] for case in CASES.values()} | {"wrong_base", "unknown_module"}
    in_store = set(re.findall(r"^\| `([a-z_]+)` \| \d", store_part, re.MULTILINE))
    codes = {error.code for error in vars(adapters_store.errors).values() if isinstance(error, type)}
    assert documented | in_store == codes - {"store_error", "invalid_bundle"}
