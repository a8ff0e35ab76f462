"""A PEFT checkpoint is the same in a directory, a tar, a zip and one file; hostile archives are refused, bounded."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bundle_factory import make_bundle

from adapters_store import AdapterBundle, BundleLimits, InvalidBundle, peft_from_bytes, peft_from_path
from adapters_store.convert import zip_file
from adapters_store.convert.peft_files import PeftFiles
from adapters_store.convert.zip_file import zip_members

LIMITS = BundleLimits(max_bytes=1 << 20)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
TENSORS = {"base_model.model.a.lora_A.weight": torch.ones(2, 4), "base_model.model.a.lora_B.weight": torch.ones(3, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "my-adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text("# hello")
    (folder / "odd.txt").write_text("?")
    safetensors.torch.save_file(TENSORS, folder / "adapter_model.safetensors")
    return folder


def tar_of(folder: Path, name: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, name or folder.name)
    return buffer.getvalue()


def zip_of(
    folder: Path, name: str = "", method: int = zipfile.ZIP_DEFLATED, extra: bytes = b"", comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.comment = comment
        for path in sorted(folder.rglob("*")):
            entry = zipfile.ZipInfo.from_file(path, "/".join(filter(None, [name, str(path.relative_to(folder))])))
            entry.compress_type, entry.extra = method, extra
            archive.writestr(entry, path.read_bytes() if path.is_file() else b"")
    return buffer.getvalue()


def single_with_metadata(folder: Path) -> bytes:
    return safetensors.torch.save(TENSORS, metadata={"format": "pt", "adapter_config": json.dumps(CONFIG)})


CONTAINERS: dict[str, Callable[[Path], bytes]] = {
    "tar of the folder": tar_of,
    "tar of a folder in a folder": lambda folder: tar_of(folder, f"outer/{folder.name}"),
    "zip, deflated": zip_of,
    "zip, stored": lambda folder: zip_of(folder, method=zipfile.ZIP_STORED),
    # Info-ZIP writes times into extra fields. The comment looks like an end record.
    "zip with extra fields and a comment": lambda folder: zip_of(
        folder, extra=struct.pack("<2HBI", 0x5455, 5, 1, 0), comment=b"PK\5\6" + bytes(40)
    ),
    "zip of a folder in a folder": lambda folder: zip_of(folder, f"outer/{folder.name}"),
    "one file with the configuration in its metadata": single_with_metadata,
}


def check(files: PeftFiles | None) -> PeftFiles:
    assert files is not None
    assert files.config == CONFIG
    assert set(files.header.table.entries) == set(TENSORS)
    assert (
        safetensors.torch.load(bytes(files.weights.data()))["base_model.model.a.lora_A.weight"].tolist()
        == [[1.0] * 4] * 2
    )
    return files


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_content_is_the_same(kind: str, folder: Path) -> None:
    files = check(peft_from_bytes(memoryview(CONTAINERS[kind](folder)), LIMITS))
    assert files.ignored == (() if "metadata" in kind else ("odd.txt",))


def test_from_paths(folder: Path, tmp_path: Path) -> None:
    check(peft_from_path(str(folder), LIMITS))
    check(peft_from_path(str(folder.parent), LIMITS))
    check(peft_from_path(str(folder / "adapter_model.safetensors"), LIMITS))
    (tmp_path / "a.zip").write_bytes(zip_of(folder))
    check(peft_from_path(str(tmp_path / "a.zip"), LIMITS))


def test_one_file_with_its_configuration(folder: Path) -> None:
    data = memoryview((folder / "adapter_model.safetensors").read_bytes())
    check(peft_from_bytes(data, LIMITS, json.dumps(CONFIG).encode()))
    with pytest.raises(InvalidBundle) as refusal:
        peft_from_bytes(data, LIMITS)
    assert refusal.value.code == "missing_file"
    assert '"peft_type": "LORA"' in refusal.value.message
    with pytest.raises(InvalidBundle, match="neither peft_type"):
        peft_from_bytes(data, LIMITS, b"{}")


def test_a_bundle_is_no_peft_checkpoint(tmp_path: Path) -> None:
    bundle = make_bundle()
    bundle.save(tmp_path / "bundle")
    for found in (
        peft_from_path(str(tmp_path / "bundle"), LIMITS),
        peft_from_path(str(tmp_path / "bundle" / "adapter_model.safetensors"), LIMITS),
        peft_from_bytes(memoryview(bundle.to_bytes()), LIMITS),
        peft_from_bytes(memoryview(tar_of(tmp_path / "bundle")), LIMITS),
        peft_from_bytes(memoryview(b"neither" * 100), LIMITS),
    ):
        assert found is None
    assert AdapterBundle.load(tmp_path / "bundle").digest == bundle.digest


def forged(data: bytes, offset: int, layout: str, *values: Any) -> bytes:
    """The archive with other fields in its only directory entry."""
    at = data.rindex(b"PK\x01\x02") + offset
    return data[:at] + struct.pack(layout, *values) + data[at + struct.calcsize(layout) :]


def zip_with(
    name: str = "adapter_config.json",
    content: bytes = b'{"peft_type": "LORA"}',
    times: int = 1,
    method: int = zipfile.ZIP_DEFLATED,
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for index in range(times):
            archive.writestr(name.format(index), content)
    return buffer.getvalue()


def link_zip() -> bytes:
    buffer = io.BytesIO()
    entry = zipfile.ZipInfo("adapter_config.json")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


def misnamed(folder: bytes, utf8: bool) -> bytes:
    """A zip with these bytes as the name of its folder, which its flags call UTF-8 or say nothing of."""
    placeholder = "x" * len(folder)
    data = zip_with(f"{placeholder}/adapter_config.json").replace(placeholder.encode(), folder)
    return forged(data, 8, "<H", 0x800) if utf8 else data


def windows_zip(*names: str, contents: dict[str, bytes] | None = None) -> bytes:
    """A zip as Windows makes it: no Unix attributes. `zipfile` itself would write slashes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            entry = zipfile.ZipInfo("?")
            entry.filename, entry.create_system = name, 0
            archive.writestr(entry, (contents or {}).get(name, b'{"peft_type": "LORA"}'))
    return buffer.getvalue()


def longer_by(nbytes: int) -> bytes:
    """The archive whose only member is so many bytes longer, compressed, than what expands to it."""
    data = zip_with()
    return forged(data, 20, "<I", zipfile.ZipFile(io.BytesIO(data)).infolist()[0].compress_size + nbytes)


def counted(here: int, count: int) -> bytes:
    """An archive of two members whose end record counts others."""
    data = zip_with("{}/x", times=2)
    return data[:-14] + struct.pack("<2H", here, count) + data[-10:]


NO_PATH = "is no path below the archive's top"
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "a bomb": (zip_with(content=bytes(1 << 21)), "bundle_too_large", "expands to 2097152 bytes"),
    "a bomb that lies about its size": (
        forged(zip_with(content=bytes(1 << 21)), 24, "<I", 100),
        "invalid_archive",
        "is longer than its entry says",
    ),
    "shorter than it says": (forged(zip_with(), 24, "<I", 100), "invalid_archive", "has another length"),
    "bytes after what is compressed": (longer_by(5), "invalid_archive", "has another length"),
    "longer than the archive": (longer_by(1 << 20), "invalid_archive", "the archive ends inside"),
    "two lengths": (
        forged(zip_with(method=zipfile.ZIP_STORED), 24, "<I", 7),
        "invalid_archive",
        "'adapter_config.json' has two lengths",
    ),
    "another checksum": (forged(zip_with(), 16, "<I", 7), "invalid_archive", "the checksum of"),
    "encrypted": (forged(zip_with(), 8, "<H", 1), "invalid_archive", "is encrypted"),
    "another method": (forged(zip_with(), 10, "<H", 12), "invalid_archive", "by method 12"),
    "zip64": (forged(zip_with(), 20, "<I", 0xFFFFFFFF), "invalid_archive", "is larger than 4 GiB"),
    "another volume": (forged(zip_with(), 34, "<H", 1), "invalid_archive", "on another volume"),
    "an offset beyond the end": (forged(zip_with(), 42, "<I", 1 << 30), "invalid_archive", "is not where its entry"),
    "an entry of another kind": (forged(zip_with(), 0, "<4s", b"PK\1\3"), "invalid_archive", "directory is damaged"),
    "an entry that ends beyond its directory": (
        forged(zip_with(), 32, "<H", 1),
        "invalid_archive",
        "an entry of its directory is damaged",
    ),
    "an entry that is not counted": (counted(1, 1), "invalid_archive", "directory is longer than its entries"),
    "an entry in another volume": (counted(1, 2), "invalid_archive", "it has several volumes"),
    "a symbolic link": (link_zip(), "invalid_archive", "is a symbolic link"),
    "a directory with data": (zip_with("folder/"), "invalid_archive", "directory 'folder/' has data"),
    "many members": (zip_with("{}/x", times=1000), "invalid_archive", "more than 64 members"),
    "a name that is not the UTF-8 that it claims to be": (
        misnamed(b"m\x81ne", utf8=True),
        "invalid_archive",
        "is marked as UTF-8, and is none",
    ),
    "a zero byte in a name": (misnamed(b"m\0ne", utf8=False), "invalid_archive", "has a zero byte"),
    "dot dot behind back slashes": (windows_zip("a\\..\\..\\adapter_config.json"), "invalid_archive", NO_PATH),
    "no directory": (zip_with()[:-30], "truncated", "ends without its directory"),
    "dot dot": (zip_with("../adapter_config.json"), "invalid_archive", NO_PATH),
    "absolute": (zip_with("/adapter_config.json"), "invalid_archive", NO_PATH),
    "a backslash": (zip_with("a\\adapter_config.json"), "invalid_archive", NO_PATH),
    "no weights": (zip_with(), "missing_file", "has no adapter_model.safetensors"),
    "pickled weights": (zip_with("adapter_model.bin", b"\x80\x04"), "pickled_checkpoint", "it is a pickle"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_zips(kind: str) -> None:
    data, code, words = HOSTILE[kind]
    began = time.monotonic()
    with pytest.raises(InvalidBundle) as refusal:
        peft_from_bytes(memoryview(data), BundleLimits(max_bytes=1 << 20, max_config_bytes=1 << 20))
    assert refusal.value.code == code
    assert words in refusal.value.message
    assert time.monotonic() - began < 1


def test_a_zip_of_windows_is_read(folder: Path) -> None:
    """Windows PowerShell 5 writes back slashes, and the Explorer names in the code page of the machine."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    contents = {f"run\\my-adapter\\{name}": content for name, content in files.items()}
    found = check(peft_from_bytes(memoryview(windows_zip(*contents, contents=contents)), LIMITS))
    assert found.ignored == ("odd.txt",)
    # The name of the folder is that of a file outside, too: in warnings.
    contents |= {"m\\x": b""}
    found = check(peft_from_bytes(memoryview(windows_zip(*contents, contents=contents)), LIMITS))
    assert found.ignored == ("odd.txt", "m/x")


@pytest.mark.parametrize(("raw", "shown"), [("mïne".encode(), "mïne"), ("mïne".encode("cp437"), "mïne")])
def test_a_zip_with_names_that_are_not_marked_as_utf8_is_read(raw: bytes, shown: str, folder: Path) -> None:
    # The name of the outer folder is ASCII of the same length at first.
    placeholder = "x" * len(raw)
    with_outside = io.BytesIO(zip_of(folder, placeholder))
    with zipfile.ZipFile(with_outside, "a") as archive:
        archive.writestr(f"{placeholder}/below/odd.txt", b"")
    data = with_outside.getvalue().replace(f"{placeholder}/".encode(), raw + b"/")
    assert check(peft_from_bytes(memoryview(data), LIMITS)).ignored == ("odd.txt", f"{shown}/below/odd.txt")


def test_the_files_of_macos_beside_a_checkpoint_are_no_weights(folder: Path, tmp_path: Path) -> None:
    """macOS's tar puts `._name` beside a file that has attributes, such as one that a browser has downloaded."""
    mine = shutil.copytree(folder, tmp_path / "mine")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (mine / f"._{name}").write_bytes(b"\0\5\x16\7" + bytes(100))
    expected = ("._adapter_config.json", "._adapter_model.safetensors", "odd.txt")
    for found in (
        peft_from_path(str(mine), LIMITS),
        peft_from_bytes(memoryview(tar_of(mine)), LIMITS),
        peft_from_bytes(memoryview(zip_of(mine, "mine")), LIMITS),
    ):
        assert check(found).ignored == expected
    (mine / "other.safetensors").write_bytes(b"")
    with pytest.raises(InvalidBundle, match=r"other\.safetensors lies beside"):
        peft_from_path(str(mine), LIMITS)


def test_an_archive_of_zip64_is_called_so(folder: Path) -> None:
    """Other writers than Info-ZIP's and Python's make them of small files, too."""
    data = bytearray(zip_of(folder))
    data[-10:-2] = b"\xff" * 8
    with pytest.raises(InvalidBundle, match=r"\(zip64\); make it with: zip -r"):
        peft_from_bytes(memoryview(bytes(data)), LIMITS)


def test_a_zip_without_a_checkpoint_is_told_from_pickled_weights(folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle()
    bundle.save(tmp_path / "bundle")
    for data in (zip_of(tmp_path / "bundle"), zip_of(folder, "a/b/c"), zip_with("notes.txt"), zip_with(times=0)):
        with pytest.raises(InvalidBundle, match="the zip archive has no PEFT checkpoint") as refusal:
            peft_from_bytes(memoryview(data), LIMITS)
        assert (refusal.value.code, refusal.value.param) == ("invalid_archive", "bundle")
        assert "send a bundle as a .safetensors or a .tar" in refusal.value.message


def test_a_bundle_takes_no_configuration_beside_it() -> None:
    data = memoryview(make_bundle().to_bytes())
    assert peft_from_bytes(data, LIMITS) is None
    with pytest.raises(InvalidBundle, match="has its configuration in it") as refusal:
        peft_from_bytes(data, LIMITS, json.dumps(CONFIG).encode())
    assert (refusal.value.code, refusal.value.param) == ("invalid_config", "config")


def test_a_file_takes_no_configuration_beside_its_own_that_says_something_else(folder: Path) -> None:
    own = {"adapter_config": json.dumps(CONFIG, indent=1)}
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    data = memoryview(safetensors.torch.save(tensors, own))
    for same in (None, json.dumps(CONFIG).encode()):
        found = peft_from_bytes(data, LIMITS, same)
        assert found is not None
        assert found.config == CONFIG
    with pytest.raises(InvalidBundle, match="has another configuration in its metadata") as refusal:
        peft_from_bytes(data, LIMITS, json.dumps(CONFIG | {"lora_alpha": 99}).encode())
    assert (refusal.value.code, refusal.value.param) == ("invalid_config", "config")
    for archive in tar_of(folder), zip_of(folder):
        with pytest.raises(InvalidBundle, match="the archive has its own configuration") as refusal:
            peft_from_bytes(memoryview(archive), LIMITS, json.dumps(CONFIG).encode())
        assert refusal.value.param == "config"


def test_a_member_is_expanded_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small steps make many of them: copying the rest of the file at each one would take over half a minute.
    monkeypatch.setattr(zip_file, "_CHUNK", 1 << 12)
    content = os.urandom(1 << 20) * 32
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:
        archive.writestr("x", content)
    (member,) = zip_members(memoryview(buffer.getvalue()))
    began = time.monotonic()
    assert member.read(1 << 26) == content
    assert time.monotonic() - began < 4


def test_every_truncation_and_every_flipped_byte_is_refused_or_harmless(folder: Path) -> None:
    whole = zip_of(folder)
    for end in range(0, len(whole), 7):
        with pytest.raises(InvalidBundle):
            found = peft_from_bytes(memoryview(whole[:end]), LIMITS)
            # The first bytes may begin anything.
            assert found is None
            AdapterBundle.from_bytes(whole[:end], LIMITS)
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        try:
            found = peft_from_bytes(memoryview(bytes(damaged)), LIMITS)
        except InvalidBundle:
            continue
        if found is not None:
            assert found.config == CONFIG
            with suppress(InvalidBundle):
                check(found)


def test_a_tar_that_breaks_off_is_refused(folder: Path) -> None:
    whole = tar_of(folder)
    for end in range(600, len(whole.rstrip(b"\0")), 97):
        with pytest.raises(InvalidBundle) as refusal:
            peft_from_bytes(memoryview(whole[:end]), LIMITS)
        assert refusal.value.code == "truncated"


def test_twice_in_an_archive_and_two_adapters(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO(tar_of(folder))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        archive.add(folder / "adapter_config.json", f"{folder.name}/adapter_config.json")
    with pytest.raises(InvalidBundle, match="twice"):
        peft_from_bytes(memoryview(buffer.getvalue()), LIMITS)
    shutil.copytree(folder, tmp_path / "both" / "one")
    shutil.copytree(folder, tmp_path / "both" / "two")
    with pytest.raises(InvalidBundle, match="several adapters"):
        peft_from_bytes(memoryview(zip_of(tmp_path / "both")), LIMITS)


def test_a_name_that_begins_like_another_is_not_below_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "run" / "checkpoint-1")
    for archive in (zip_of(tmp_path), zip_of(tmp_path, "outer"), zip_of(tmp_path / "run")):
        assert len(check(peft_from_bytes(memoryview(archive), LIMITS)).ignored) == 5
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    shutil.copytree(folder, tmp_path / "run2")
    with pytest.raises(InvalidBundle, match="several adapters: run, run2"):
        peft_from_bytes(memoryview(zip_of(tmp_path)), LIMITS)


def test_nothing_outside_the_allowed_directory_is_read(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "allowed"
    (inside / "linked").mkdir(parents=True)
    (inside / "linked" / "adapter_config.json").symlink_to(folder / "adapter_config.json")
    shutil.copy(folder / "adapter_model.safetensors", inside / "linked")
    assert peft_from_path(str(inside / "linked"), LIMITS) is not None
    with pytest.raises(InvalidBundle, match="outside") as refusal:
        peft_from_path(str(inside / "linked"), LIMITS, inside)
    assert refusal.value.code == "missing_file"
    (inside / "linked" / "adapter_config.json").unlink()
    # A link that stays inside, as in a hub's cache.
    shutil.copy(folder / "adapter_config.json", inside / "blob")
    (inside / "linked" / "adapter_config.json").symlink_to(inside / "blob")
    assert peft_from_path(str(inside / "linked"), LIMITS, inside) is not None
    bundle = make_bundle()
    bundle.save(tmp_path / "bundle")
    (inside / "bundle").symlink_to(tmp_path / "bundle")
    with pytest.raises(InvalidBundle, match="outside"):
        AdapterBundle.load(inside / "bundle", LIMITS, inside)
