"""The three containers of a bundle: a directory, one safetensors file, a tar of the directory.

A reader turns each container into two buffers: the configuration's JSON and a safetensors file. Nothing is ever
extracted to disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adapters_store.errors import (
    BundleTooLarge,
    InvalidArchive,
    InvalidHeader,
    MissingFile,
    Truncated,
    UnexpectedFile,
)
from adapters_store.format.mmap_buffer import writable_memory
from adapters_store.format.safetensors_file import (
    MODEL_FILE,
    BundleLimits,
    Header,
    looks_like_safetensors,
    parse_header,
)
from adapters_store.format.tar_file import TarMember, looks_like_tar, tar_members

CONFIG_FILE = "adapter_config.json"
METADATA_KEY = "adapter_config"
_PEEK = 512


@dataclass(frozen=True)
class RawBundle:
    """A bundle whose header is checked and whose configuration is not parsed yet.

    Attributes:
        config: JSON text of the configuration.
        header: Checked header of the safetensors file.
        data: The bytes of the safetensors file.
    """

    config: str | bytes
    header: Header
    data: memoryview


def read_path(path: str, limits: BundleLimits, within: Path | None) -> RawBundle:
    """Read a bundle from a directory, a .safetensors file or a .tar.

    Args:
        path: What to read.
        limits: Caps.
        within: No file outside this directory is read, wherever a symbolic link leads; None reads any file.

    Raises:
        InvalidBundle: One of the subclasses that FORMAT.md lists.
    """
    if os.path.isdir(path):
        return _read_directory(path, limits, within)
    return read_bytes(read_file(path, limits.max_bytes, within), limits)


def read_bytes(data: memoryview, limits: BundleLimits, *, kept_tables: bool = False) -> RawBundle:
    """Read a bundle from the bytes of a .safetensors file or a .tar; raises as `read_path` does.

    `kept_tables` is that of `parse_header`.
    """
    peek = bytes(data[:_PEEK])
    if not looks_like_safetensors(peek) and looks_like_tar(peek):
        return _read_tar(data, limits)
    header = parse_header(data, len(data), limits, kept_tables=kept_tables)
    return RawBundle(config_of(header, limits), header, data)


def config_of(header: Header, limits: BundleLimits) -> str:
    """The configuration in the metadata of a single-file bundle, as JSON text.

    Raises:
        MissingFile, InvalidHeader, BundleTooLarge: It is absent, not alone, or too long.
    """
    if METADATA_KEY not in header.metadata:
        raise MissingFile(
            f"__metadata__ has no {METADATA_KEY!r}; a single-file bundle carries its configuration there, "
            f"a directory or .tar has {CONFIG_FILE}",
            param=CONFIG_FILE,
        )
    _check_metadata(header, {METADATA_KEY, "format"})
    text = header.metadata[METADATA_KEY]
    if len(text.encode()) > limits.max_config_bytes:
        raise BundleTooLarge(f"adapter_config exceeds {limits.max_config_bytes} bytes", param=CONFIG_FILE)
    return text


def _check_metadata(header: Header, known: set[str]) -> None:
    if unknown := sorted(set(header.metadata) - known):
        raise InvalidHeader(
            f"__metadata__ has {unknown[0]!r}, which nothing reads; put it under training in adapter_config",
            param="__metadata__",
        )


def _read_directory(path: str, limits: BundleLimits, within: Path | None) -> RawBundle:
    _check_names(set(os.listdir(path)))
    config = bytes(read_file(f"{path}/{CONFIG_FILE}", limits.max_config_bytes, within))
    return _with_config(config, read_file(f"{path}/{MODEL_FILE}", limits.max_bytes, within), limits)


def read_file(path: str, max_bytes: int, within: Path | None) -> memoryview:
    """Read one regular file into writable memory.

    Raises:
        MissingFile: It is no regular file, or lies outside `within`.
        BundleTooLarge, Truncated: It is too large, or shrinks meanwhile.
        OSError: It cannot be opened.
    """
    name = os.path.basename(path)
    if not os.path.isfile(path):
        # With a bound the path is the server's own, and a client reads the error.
        raise MissingFile(f"{path if within is None else name} is not a regular file", param=name)
    # Writable memory, so that tensors can share it and a bundle is held once.
    with open(path, "rb") as file:
        if within is not None and not _opened_path(file.fileno(), path).is_relative_to(within.resolve()):
            raise MissingFile(f"{name} lies outside the allowed directory; copy it there", param=name)
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise BundleTooLarge(f"{name} has {size} bytes; the limit is {max_bytes}", param=name)
        data = writable_memory(size)
        count = file.readinto(data)
    if count != size:
        raise Truncated(f"{name} shrank from {size} to {count} bytes while it was read", param=name)
    return data


def _opened_path(descriptor: int, path: str) -> Path:
    """Where an open file lies. Linux tells it of the descriptor, so that no link can be changed in between."""
    link = f"/proc/self/fd/{descriptor}"
    return Path(os.readlink(link)) if os.path.exists(link) else Path(path).resolve()


def _read_tar(data: memoryview, limits: BundleLimits) -> RawBundle:
    if len(data) > limits.max_bytes:
        raise BundleTooLarge(f"the archive has {len(data)} bytes; the limit is {limits.max_bytes}", param="bundle")
    files: dict[str, memoryview] = {}
    folders: set[str] = set()
    # Members are slices of the data; no copy is made.
    for member in tar_members(data):
        folder, name = _member_path(member)
        if member.is_directory:
            continue
        if name in files:
            raise InvalidArchive(f"{name} is in the archive twice", param=name)
        folders.add(folder)
        files[name] = _member_data(member, name, limits)
    _check_names(set(files))
    if len(folders) > 1:
        raise InvalidArchive("the two files are not in one directory of the archive", param="bundle")
    return _with_config(bytes(files[CONFIG_FILE]), files[MODEL_FILE], limits)


def _member_path(member: TarMember) -> tuple[str, str]:
    """(directory, name) of a member. No pathlib: it would intern the names that clients choose."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts or len(parts) > 2 or "\\" in member.name:
        raise InvalidArchive(
            f"member {member.name!r}: a bundle has {CONFIG_FILE} and {MODEL_FILE}, in one directory",
            param=member.name,
        )
    return "/".join(parts[:-1]), "".join(parts[-1:])


def _member_data(member: TarMember, name: str, limits: BundleLimits) -> memoryview:
    if name not in (CONFIG_FILE, MODEL_FILE):
        raise UnexpectedFile(f"nothing reads {member.name!r} in a bundle; leave it out", param=name)
    cap = limits.max_config_bytes if name == CONFIG_FILE else limits.max_bytes
    if member.size > cap:
        raise BundleTooLarge(f"member {name} claims {member.size} bytes; the limit is {cap}", param=name)
    if len(member.data) != member.size:
        raise Truncated(f"the archive ends inside {name}; upload it again, whole", param=name)
    return member.data


def _check_names(names: set[str]) -> None:
    for name in (CONFIG_FILE, MODEL_FILE):
        if name not in names:
            raise MissingFile(f"the bundle has no {name}", param=name)
    if unexpected := sorted(names - {CONFIG_FILE, MODEL_FILE}):
        raise UnexpectedFile(f"nothing reads {unexpected[0]!r} in a bundle; leave it out", param=unexpected[0])


def _with_config(config: bytes, data: memoryview, limits: BundleLimits) -> RawBundle:
    header = parse_header(data, len(data), limits)
    # A second configuration in the metadata could contradict the first.
    _check_metadata(header, {"format"})
    return RawBundle(config, header, data)
