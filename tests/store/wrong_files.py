"""Bundles that are wrong before their configuration is read, with the code and the field of the refusal."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from typing import Any

import torch
from bundle_factory import MODULE, Q, classifier_fields, config_fields, make_bundle
from raw_files import safetensors_bytes, special_member, split_file, tar_bytes, two_files

from adapters_store import AdapterBundle

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
    "shape of nine": (with_entry(shape=[8, 2, *[1] * 7]), "invalid_header", A),
    "offsets a number": (with_entry(data_offsets=64), "invalid_header", A),
    "offsets of text": (with_entry(data_offsets=["0", "64"]), "invalid_header", A),
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
