"""Zeros in a zip: of a MB that would expand to a GB nothing is expanded before its header fits the base."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adapters_store import BundleLimits, InvalidBundle, PeftFiles, import_peft, peft_from_bytes
from adapters_store.convert import zip_file
from adapters_store.convert.zip_file import ZipMember
from sera_serve.base import FrozenBase, import_base
from support.factories import random_decoder
from support.peft_checkpoints import CONFIG, WEIGHTS, save_checkpoint

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{LAYER}.lora_A.weight": (4, 64), f"{LAYER}.lora_B.weight": (64, 4)}
MIB = 1 << 20


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


def header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    fields, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        fields[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def zipped(weights: bytes, config: dict[str, Any] | None = None) -> memoryview:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | (config or {})))
        archive.writestr(WEIGHTS, weights)
    return memoryview(buffer.getvalue())


def whole(shapes: dict[str, tuple[int, ...]]) -> bytes:
    return header(shapes) + bytes(4 * sum(map(math.prod, shapes.values())))


def read(data: memoryview) -> PeftFiles:
    found = peft_from_bytes(data, BundleLimits())
    assert found is not None
    return found


BOMBS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "zeros": (bytes(4 * MIB), {}, "not_safetensors"),
    "longer than its header says": (header(GOOD) + bytes(4 * MIB), {}, "invalid_header"),
    "shorter than its header says": (header({"a": (MIB, 2)}) + bytes(4 * MIB), {}, "truncated"),
    "layers that the base lacks": (
        whole({name.replace("layers.0", "layers.9"): (MIB // 4, 4) for name in GOOD}),
        {},
        "unknown_module",
    ),
    "shapes that the base lacks": (whole(dict.fromkeys(GOOD, (MIB // 8, 4))), {}, "wrong_shape"),
    "a rank far above the widths": (
        whole({f"{LAYER}.lora_A.weight": (1 << 13, 64), f"{LAYER}.lora_B.weight": (64, 1 << 13)}),
        {},
        "adapter_too_large",
    ),
    "another tensor": (
        whole(GOOD | {"base_model.model.model.embed_tokens.weight": (MIB // 16, 16)}),
        {},
        "unsupported_adapter",
    ),
    "a head of many labels": (
        whole(GOOD | {"base_model.model.score.weight": ((1 << 16) + 1, 64)}),
        {"task_type": "SEQ_CLS"},
        "unsupported_adapter",
    ),
    "what a bundle cannot hold": (whole(GOOD | {"x": (MIB // 16, 16)}), {"use_qalora": True}, "unsupported_adapter"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header(kind: str, base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config, code = BOMBS[kind]
    data = zipped(weights, config)
    assert len(data) < len(weights) / 100
    _forbid_expanding(monkeypatch)
    with pytest.raises(InvalidBundle) as refusal:
        import_peft(read(data), import_base(base))
    assert refusal.value.code == code


def test_what_is_larger_than_its_caller_takes_is_not_expanded(
    base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooLarge(Exception):
        pass

    def check(elements: int) -> None:
        told.append(elements)
        raise TooLarge

    told: list[int] = []
    head = {"base_model.model.score.weight": (3, 64)}
    _forbid_expanding(monkeypatch)
    for shapes, most in ((GOOD, 512), (GOOD | head, 512 + 192)):
        with pytest.raises(TooLarge):
            import_peft(read(zipped(whole(shapes))), import_base(base), check)
        assert told.pop() == most


def test_an_entry_that_lies_about_its_size_is_expanded_no_further_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(zipped(whole(GOOD) + bytes(4 * MIB)))
    size = len(whole(GOOD))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = size.to_bytes(4, "little")
    files = read(memoryview(data))
    given: list[int] = []
    memory = zip_file.writable_memory
    monkeypatch.setattr(zip_file, "writable_memory", lambda nbytes: given.append(nbytes) or memory(nbytes))
    with pytest.raises(InvalidBundle, match="longer than its entry says"):
        files.weights.data()
    assert given == [size]


def test_the_weights_are_expanded_once(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(base.model, tmp_path / "adapter")
    files = read(zipped((folder / WEIGHTS).read_bytes(), json.loads((folder / CONFIG).read_text())))
    expanded: list[str] = []
    inflate = ZipMember.read
    monkeypatch.setattr(ZipMember, "read", lambda self, most: expanded.append(self.name) or inflate(self, most))
    first, second = import_peft(files, import_base(base)).bundle, import_peft(files, import_base(base)).bundle
    assert expanded == [WEIGHTS]
    assert first.digest == second.digest


def test_damaged_weights_are_refused(base: FrozenBase) -> None:
    data = bytearray(zipped(safetensors.torch.save({name: torch.randn(*shape) for name, shape in GOOD.items()})))
    # The checksum in the directory.
    at = data.rindex(b"PK\x01\x02") + 16
    data[at] ^= 1
    with pytest.raises(InvalidBundle, match="checksum") as refusal:
        import_peft(read(memoryview(data)), import_base(base))
    assert refusal.value.code == "invalid_archive"


def _forbid_expanding(monkeypatch: pytest.MonkeyPatch) -> None:
    read_member = ZipMember.read

    def forbidden(self: ZipMember, most: int) -> memoryview:
        assert self.name != WEIGHTS, f"{self.size} bytes were expanded"
        return read_member(self, most)

    monkeypatch.setattr(ZipMember, "read", forbidden)
