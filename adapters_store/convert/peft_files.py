"""First stage of an import: finds the files of a PEFT checkpoint in a directory, an archive or one file.

A checkpoint is told from a bundle by its configuration: PEFT's has `peft_type`. A name from an archive is compared and
shown, and never used as a path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adapters_store.convert.peft_errors import PickledCheckpoint, UnsupportedAdapter
from adapters_store.convert.zip_file import MAX_MEMBERS, ZipMember, looks_like_zip, zip_members
from adapters_store.errors import (
    BundleTooLarge,
    InvalidArchive,
    InvalidConfig,
    MissingFile,
    UnexpectedFile,
)
from adapters_store.format.containers import CONFIG_FILE, METADATA_KEY, read_file
from adapters_store.format.safetensors_file import (
    MODEL_FILE,
    BundleLimits,
    Header,
    header_of,
    looks_like_safetensors,
    parse_header,
)
from adapters_store.format.strict_json import parse_json, parse_json_object
from adapters_store.format.tar_file import looks_like_tar, tar_members

PICKLE_FILE = "adapter_model.bin"
# The first member of the zip archives that torch.save writes; each tensor is another member.
_TORCH_MEMBER = b"/data.pkl"
# Small files beside the two that an import reads too.
ADDED_TOKENS_FILE, MODEL_CONFIG_FILE = "added_tokens.json", "config.json"
TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_READ_BESIDE = (ADDED_TOKENS_FILE, MODEL_CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
# Files that training leaves and that say nothing of what an adapter computes. Others are named in a warning.
_HARMLESS = frozenset(
    {
        *("README.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes", ".gitignore"),
        *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("spiece.model", "sentencepiece.bpe.model", "generation_config.json", "trainer_state.json"),
        *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "latest"),
    }
)
_MAX_BESIDE_BYTES = 1 << 20
# Files in one directory. A training run leaves some twenty.
_MAX_FILES = 256
_CONVERSION = (
    "it is a pickle, which is never read; convert it where it was made: "
    'python -c "import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in '
    "torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')\""
)
_NO_CHECKPOINT = (
    f"the zip archive has no PEFT checkpoint, at its top or up to two folders down: an {CONFIG_FILE} with peft_type, "
    f"and {MODEL_FILE} beside it; put them there, and send a bundle as a .safetensors or a .tar"
)
# macOS puts a file `._name` with the attributes of `name` beside it, in archives and on file systems of others.
_APPLE_DOUBLE = "._"


class _File(NamedTuple):
    """A file of a checkpoint.

    Attributes:
        read: Gives the file's bytes, or refuses more than so many.
        packed: The member of a zip, of which a MB may expand to a GB; None for what has its bytes already.
    """

    read: Callable[[int], memoryview]
    packed: ZipMember | None = None


class Weights:
    """The bytes of a weights' file, read when they are first asked for."""

    def __init__(self, read: Callable[[], memoryview]) -> None:
        """Hold what reads them, and what that holds, until then."""
        self._read: Callable[[], memoryview] | None = read
        self._data = memoryview(b"")

    def data(self) -> memoryview:
        """The bytes; raises as `read` does."""
        if self._read is not None:
            self._data = self._read()
            # It may hold the whole archive.
            self._read = None
        return self._data


@dataclass(frozen=True)
class PeftFiles:
    """A PEFT checkpoint whose configuration is JSON, and whose safetensors header is checked.

    Attributes:
        config: The fields of `adapter_config.json`.
        header: Checked header of the weights.
        weights: The weights' file, as long as the header announces. What is compressed in an archive is expanded when
            its bytes are first asked for, and refused then if it is damaged: compare the header with the base before.
        beside: Contents of small files that lay beside and that an import reads, by name.
        ignored: Names of files that lay beside, that nothing reads, and that training does not usually leave.
        max_bytes: Most bytes of a bundle made of it.
    """

    config: dict[str, Any]
    header: Header
    weights: Weights
    beside: dict[str, bytes]
    ignored: tuple[str, ...]
    max_bytes: int


def peft_from_path(path: str, limits: BundleLimits, within: Path | None = None) -> PeftFiles | None:
    """Read a PEFT checkpoint from a directory, an archive or a `.safetensors` with its configuration beside it.

    Args:
        path: What to read. A directory may have the checkpoint one level down.
        limits: Caps, as for bundles.
        within: No file outside this directory is read, wherever a symbolic link leads; None reads any file.

    Returns:
        The checkpoint; None where `path` is no PEFT checkpoint, and may be a bundle.

    Raises:
        InvalidBundle: It is a PEFT checkpoint that cannot be read: PickledCheckpoint, UnsupportedAdapter, or one of
            the subclasses that FORMAT.md lists for bundles.
        OSError: A file cannot be opened.
    """
    if os.path.isdir(path):
        return _from_directory(path, limits, within)
    if not os.path.isfile(path):
        return None
    if os.path.basename(path) == PICKLE_FILE:
        raise _pickled()
    config_path = os.path.join(os.path.dirname(path), CONFIG_FILE)
    config = None
    if path.endswith(".safetensors") and os.path.isfile(config_path):
        config = bytes(read_file(config_path, limits.max_config_bytes, within))
    if config is not None and _peft_fields(config) is None:
        config = None
    return peft_from_bytes(read_file(path, limits.max_bytes, within), limits, config)


def peft_from_bytes(data: memoryview, limits: BundleLimits, config: bytes | None = None) -> PeftFiles | None:
    """Read a PEFT checkpoint from the bytes of a tar, a zip or a safetensors file.

    Args:
        data: The whole file.
        limits: Caps, as for bundles.
        config: `adapter_config.json`, where it was sent beside a single safetensors file. Without it, the configuration
            must be the metadata's `adapter_config`.

    Returns:
        The checkpoint; None where `data` is no PEFT checkpoint, and may be a bundle.

    Raises:
        InvalidBundle: It is a PEFT checkpoint that cannot be read.
    """
    prefix = bytes(data[:512])
    if _is_of_torch(prefix):
        # Read as the file of a bundle, it is refused as what it is, and not as an archive of too many members.
        return None
    is_zip = looks_like_zip(prefix)
    if not is_zip and (looks_like_safetensors(prefix) or not looks_like_tar(prefix)):
        return _from_single(data, limits, config)
    if config is not None:
        raise InvalidArchive("the archive has its own configuration; send no second one", param="config")
    if not is_zip:
        return _from_archive(_tar_files(data), limits)
    members = ((member.name, _File(member.read, member)) for member in zip_members(data))
    found = _from_archive(members, limits)
    if found is None:
        # No reader of bundles takes a zip.
        raise InvalidArchive(_NO_CHECKPOINT, param="bundle")
    return found


def _peft_fields(text: bytes | str) -> dict[str, Any] | None:
    """The fields of a configuration that is PEFT's: a JSON object with `peft_type`. None for any other."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and "peft_type" in value else None


def _from_directory(path: str, limits: BundleLimits, within: Path | None) -> PeftFiles | None:
    entries = sorted(os.listdir(path))
    if CONFIG_FILE not in entries and PICKLE_FILE not in entries:
        inner = [name for name in entries if os.path.isfile(os.path.join(path, name, CONFIG_FILE))]
        if not inner:
            return None
        if len(inner) > 1:
            raise _several(inner)
        return _from_directory(os.path.join(path, inner[0]), limits, within)
    if CONFIG_FILE not in entries:
        raise _pickled()
    fields = _peft_fields(bytes(read_file(os.path.join(path, CONFIG_FILE), limits.max_config_bytes, within)))
    if fields is None:
        return None
    files = [name for name in entries if os.path.isfile(os.path.join(path, name))]
    if len(files) > _MAX_FILES:
        raise UnexpectedFile(f"the directory has {len(files)} files; the limit is {_MAX_FILES}", param="bundle")

    def file(name: str) -> _File:
        return _File(lambda max_bytes: read_file(os.path.join(path, name), max_bytes, within))

    return _assemble(fields, {name: file(name) for name in files}, limits)


def _tar_files(data: memoryview) -> Iterator[tuple[str, _File]]:
    for member in tar_members(data, MAX_MEMBERS):
        if member.is_directory:
            continue
        name, size, content = member.name, member.size, member.data

        def read(max_bytes: int, name: str = name, size: int = size, content: memoryview = content) -> memoryview:
            if size > max_bytes:
                raise BundleTooLarge(f"member {name} claims {size} bytes; the limit is {max_bytes}", param=name)
            return content

        yield name, _File(read)


def _from_archive(members: Iterator[tuple[str, _File]], limits: BundleLimits) -> PeftFiles | None:
    folders: dict[str, dict[str, _File]] = {}
    for path, file in members:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise InvalidArchive(
                f"member {path!r} is no path below the archive's top; name it with slashes, without .. and without a "
                "first slash",
                param=path,
            )
        folder = folders.setdefault("/".join(parts[:-1]), {})
        if parts[-1] in folder:
            raise InvalidArchive(f"{path} is in the archive twice", param=path)
        folder[parts[-1]] = file
    found = [folder for folder, files in folders.items() if CONFIG_FILE in files or PICKLE_FILE in files]
    # The archive of a folder that has the checkpoint one level down.
    if not found or min(folder.count("/") for folder in found) > 1:
        return None
    if len(found) > 1:
        # A checkpoint at the top, with those of a training run below.
        tops = [folder for folder in found if all(_is_below(other, folder) for other in found)]
        if len(tops) != 1:
            raise _several(found)
        found = tops
    files = folders[found[0]]
    if CONFIG_FILE not in files:
        raise _pickled()
    fields = _peft_fields(bytes(files[CONFIG_FILE].read(limits.max_config_bytes)))
    if fields is None:
        return None
    outside = tuple(f"{folder}/{name}" for folder, held in folders.items() if folder != found[0] for name in held)
    return _assemble(fields, files, limits, outside)


def _is_below(folder: str, top: str) -> bool:
    """Whether a folder of an archive is `top`, or lies in it; the archive's own top is ""."""
    return not top or folder == top or folder.startswith(f"{top}/")


def _from_single(data: memoryview, limits: BundleLimits, config: bytes | None) -> PeftFiles | None:
    if not looks_like_safetensors(bytes(data[:16])):
        return None
    header = parse_header(data, len(data), limits)
    own = header.metadata.get(METADATA_KEY)
    own_fields = None if own is None else _peft_fields(own)
    if config is None:
        if own is None and any(".lora_A" in name for name in header.table.entries):
            raise MissingFile(
                f"the tensors are those of a LoRA, and their configuration is missing: send {CONFIG_FILE} with them; "
                'at the least it has {"peft_type": "LORA", "r": ..., "lora_alpha": ...}',
                param=CONFIG_FILE,
            )
        if own is None or own_fields is None:
            return None
        config = own.encode()
    elif own is not None and own_fields is None:
        raise InvalidConfig(
            "the file is a bundle, which has its configuration in it; send no second one", param="config"
        )
    if len(config) > limits.max_config_bytes:
        raise BundleTooLarge(f"{CONFIG_FILE} exceeds {limits.max_config_bytes} bytes", param=CONFIG_FILE)
    fields = _parse(config)
    if own_fields not in (None, fields):
        raise InvalidConfig("the file has another configuration in its metadata; send one of the two", param="config")
    return PeftFiles(fields, header, Weights(lambda: data), {}, (), limits.max_bytes)


def _assemble(
    fields: dict[str, Any], files: dict[str, _File], limits: BundleLimits, outside: tuple[str, ...] = ()
) -> PeftFiles:
    if MODEL_FILE not in files:
        if PICKLE_FILE in files:
            raise _pickled()
        raise MissingFile(f"the checkpoint has no {MODEL_FILE}; put it beside {CONFIG_FILE}", param=MODEL_FILE)
    known = {CONFIG_FILE, MODEL_FILE}
    for name in sorted(files):
        if name.endswith(".safetensors") and name not in known and not name.startswith(_APPLE_DOUBLE):
            raise UnexpectedFile(
                f"{name} lies beside {MODEL_FILE}, and nothing says which tensors of it belong to the adapter; remove "
                "it, or put its tensors into the checkpoint",
                param=name,
            )
    beside = {name: bytes(files[name].read(_MAX_BESIDE_BYTES)) for name in _READ_BESIDE if name in files}
    header, weights = _weights(files[MODEL_FILE], limits)
    ignored = tuple(sorted(set(files) - known - set(beside) - _HARMLESS)) + outside
    return PeftFiles(fields, header, weights, beside, ignored, limits.max_bytes)


def _weights(file: _File, limits: BundleLimits) -> tuple[Header, Weights]:
    """The weights' checked header, and the weights. Of a compressed file the header alone is expanded."""
    member = file.packed
    if member is None:
        data = file.read(limits.max_bytes)
        return parse_header(data, len(data), limits), Weights(lambda: data)
    return header_of(member.begin, member.size, limits), Weights(lambda: member.read(limits.max_bytes))


def _parse(text: bytes | str) -> dict[str, Any]:
    value = parse_json_object(text, CONFIG_FILE, InvalidConfig, CONFIG_FILE)
    if "peft_type" not in value:
        raise InvalidConfig(
            f"{CONFIG_FILE} has neither peft_type (a PEFT checkpoint) nor format_version (a bundle); add one of them",
            param=CONFIG_FILE,
        )
    return value


def _is_of_torch(prefix: bytes) -> bool:
    # APPNOTE.TXT of zip, 4.3.7: the length of the name, and 4 bytes later the name.
    name = prefix[30 : 30 + int.from_bytes(prefix[26:28], "little")]
    return looks_like_zip(prefix) and name.endswith(_TORCH_MEMBER)


def _pickled() -> PickledCheckpoint:
    return PickledCheckpoint(f"the weights are in {PICKLE_FILE}: {_CONVERSION}", param=PICKLE_FILE)


def _several(folders: list[str]) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"there are several adapters: {', '.join(sorted(folders)[:8])}; import each one by itself", param="bundle"
    )
