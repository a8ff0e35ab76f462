"""Safetensors and tar files built byte by byte, so that tests can build wrong ones."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

from adapters_store import AdapterBundle

Fields = dict[str, Any]


def safetensors_bytes(header: Fields | str | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A file of `header` and `data`; `claimed` overrides the header's length field."""
    if isinstance(header, dict):
        # As the library writes it.
        header = json.dumps(header, separators=(",", ":"))
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data


def split_file(raw: bytes) -> tuple[Fields, bytes]:
    """Header and data of a valid file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def tar_bytes(*members: tuple[tarfile.TarInfo | str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of regular files (by name) or of members described in full."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if isinstance(member, str):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is not a regular file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def two_files(bundle: AdapterBundle) -> tuple[bytes, bytes]:
    """What the directory form holds: adapter_config.json and adapter_model.safetensors."""
    header, data = split_file(bundle.to_bytes())
    header["__metadata__"] = {"format": "pt"}
    return bundle.config.canonical_json().encode(), safetensors_bytes(header, data)
