"""A bundle: an adapter's configuration and tensors, independent of their container."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from adapters_store.format.config import AdapterConfig
from adapters_store.format.containers import CONFIG_FILE, METADATA_KEY, RawBundle, read_bytes, read_path
from adapters_store.format.mmap_buffer import writable_memory
from adapters_store.format.safetensors_file import MODEL_FILE, BundleLimits, read_tensor, save_tensors
from adapters_store.format.tensor_table import DTYPE_NAMES, DTYPES, TensorTable, describe_tensors
from adapters_store.format.validation import check_names_and_shapes, check_values, is_surely_finite

DEFAULT_LIMITS = BundleLimits()
# The order of dtypes in a file that safetensors writes.
_FILE_ORDER = ("F32", "BF16", "F16")
# Bytes from which it takes less time to start a thread than to wait: 1 MiB takes 0.6 ms. A hash of many bytes does not
# hold the interpreter's lock.
_HASHED_BESIDE_FROM = 1 << 20


class AdapterBundle:
    """An adapter in memory, not to be written to.

    The constructor checks nothing. `validate_bundle`, `AdapterStore.publish` and every reader check the bundle.

    Attributes:
        config: What the tensors mean.
    """

    def __init__(self, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to CPU memory: training may go on with the originals.

        Args:
            config: What the tensors mean.
            tensors: Under the names of `expected_shapes(config)`.
        """
        self.config = config
        self._tensors: dict[str, Tensor] | None = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self._read: _ReadTensors | None = None
        self._digest: str | None = None

    # No `cached_property`: before Python 3.12 it holds one lock for all bundles, also while a large one is hashed.

    @property
    def tensors(self) -> dict[str, Tensor]:
        """CPU tensors under the names of `expected_shapes(config)`."""
        if self._tensors is None:
            assert self._read is not None, "a bundle was made from tensors, or was read"
            data, entries = self._read.data, self._read.table.entries
            self._tensors = {name: read_tensor(data, entry) for name, entry in entries.items()}
        return self._tensors

    def flat_tensors(self) -> dict[str, Tensor]:
        """The elements of each tensor (elements,) by name: for a bundle that was read, in less time than `tensors`."""
        if self._read is None:
            return {name: tensor.view(-1) for name, tensor in self.tensors.items()}
        # One operation for each run: there are hundreds of tensors.
        data, table = self._read.data, self._read.table
        parts = (read_tensor(data, run.whole).split(run.sizes) for run in table.runs)
        return dict(zip(table.names, chain.from_iterable(parts), strict=True))

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the canonical bundle: the same for any container. See FORMAT.md.

        A thread computes that of a large bundle from when it was read; the first use waits for it.
        """
        if self._digest is None:
            self._digest = self._computed_digest() if self._read is None else self._read.digest()
        return self._digest

    def _computed_digest(self) -> str:
        tensors = sorted(self.tensors.items())
        described = describe_tensors([(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors])
        data = [tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in tensors]
        return content_hash(_manifest(self.config.canonical_json(), described), data)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the single-file form, which a store keeps."""
        tensors = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.tensors.items()]
        return file_bytes(self.config, tensors)

    def save(self, directory: Path | str) -> None:
        """Write the directory form; the directory is made, existing files of the two names are replaced.

        Raises:
            OSError: A file cannot be written.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        save_tensors(self.tensors, folder / MODEL_FILE, {"format": "pt"})

    def save_file(self, path: Path | str) -> None:
        """Write the single-file form: one .safetensors with the configuration in its metadata.

        Raises:
            OSError: The file cannot be written.
        """
        save_tensors(self.tensors, path, _metadata_of(self.config))

    def to_bytes(self) -> bytes:
        """The single-file form in memory."""
        data: bytes = safetensors.torch.save(self.tensors, metadata=_metadata_of(self.config))
        return data

    @classmethod
    def load(cls, path: Path | str, limits: BundleLimits = DEFAULT_LIMITS, within: Path | None = None) -> AdapterBundle:
        """Read and check a bundle from a directory, a .safetensors file or a .tar; its bytes are held once.

        Args:
            path: What to read.
            limits: Caps.
            within: No file outside this directory is read, wherever a symbolic link leads; None reads any file.

        Raises:
            InvalidBundle: One of the subclasses that FORMAT.md lists.
        """
        return cls._checked(read_path(os.fspath(path), limits, within))

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview,
        limits: BundleLimits = DEFAULT_LIMITS,
        *,
        kept_tables: bool = False,
    ) -> AdapterBundle:
        """Read and check a bundle from the bytes of a .safetensors file or a .tar; raises as `load` does.

        The bundle shares a writable buffer, which must not change afterwards.

        Args:
            data: The bytes.
            limits: Caps.
            kept_tables: As of `parse_header`.
        """
        return cls._checked(read_bytes(memoryview(data), limits, kept_tables=kept_tables))

    @classmethod
    def _checked(cls, raw: RawBundle) -> AdapterBundle:
        data, table = raw.data, raw.header.table
        if data.readonly:
            data = writable_memory(len(raw.data))
            data[:] = raw.data
        data = raw.header.tensor_bytes(data)
        # Usually there is one run. A hundred small tensors took far longer to check and hash one by one.
        runs = [run.whole for run in table.runs]
        parts = [data[run.begin : run.end] for run in runs]
        # Our own writers write the canonical configuration, so that its hash need not wait for it to be checked.
        written = raw.config if isinstance(raw.config, str) else raw.config.decode(errors="replace")
        digest = hash_meanwhile(_manifest(written, table.described), parts)
        config = AdapterConfig.from_json(raw.config)
        check_names_and_shapes(config, table.shapes)
        canonical = config.canonical_json()
        if canonical != written:
            digest = hash_meanwhile(_manifest(canonical, table.described), parts)
        # The tensors are in memory of the bundle's own already. The constructor would copy them once more.
        bundle = object.__new__(cls)
        bundle.config = config
        bundle._tensors = bundle._digest = None
        bundle._read = _ReadTensors(data, table, digest)
        if not all(is_surely_finite(read_tensor(data, run)) for run in runs):
            check_values(bundle.tensors)
        return bundle


@dataclass(frozen=True)
class _ReadTensors:
    """The tensors of a file in writable memory.

    Attributes:
        data: `Header.tensor_bytes` of the file.
        table: Names, shapes and places in `data`.
        digest: Waits for the digest.
    """

    data: memoryview
    table: TensorTable
    digest: Callable[[], str]


def _manifest(config: str, described: str) -> str:
    """What comes before the bytes of the tensors, in order of name: canonical JSON.

    Args:
        config: The canonical configuration.
        described: `describe_tensors` of the tensors.
    """
    return f'{{"config":{config},"tensors":{described}}}'


def content_hash(manifest: str, data: Sequence[memoryview]) -> str:
    """SHA-256, in hexadecimal, of the manifest's length (8 bytes, little-endian), the manifest and the data."""
    encoded = manifest.encode()
    digest = hashlib.sha256(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def hash_meanwhile(manifest: str, data: Sequence[memoryview]) -> Callable[[], str]:
    """Begin to compute `content_hash`; the result waits for it. The data must not change until then.

    Little data, and data for which no thread can be started, is hashed by whoever waits.
    """
    if sum(part.nbytes for part in data) < _HASHED_BESIDE_FROM:
        return partial(content_hash, manifest, data)
    found: list[str] = []
    # A daemon, because nobody waits for it where the bundle is refused.
    thread = threading.Thread(
        target=lambda: found.append(content_hash(manifest, data)), name="bundle-hash", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:
        return partial(content_hash, manifest, data)

    def wait() -> str:
        thread.join()
        return found[0]

    return wait


def _metadata_of(config: AdapterConfig) -> dict[str, str]:
    return {METADATA_KEY: config.canonical_json()}


def file_bytes(config: AdapterConfig, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes of the single-file form of a bundle with these tensors (name, dtype, shape); nothing is written.

    The configuration counts too: a small adapter may have one of 1 MiB.
    """
    header: dict[str, Any] = {"__metadata__": _metadata_of(config)}
    end = 0
    # As safetensors orders them; the offsets are in the header.
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (_FILE_ORDER.index(tensor[1]), tensor[0])):
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Its length comes first, and spaces make it a multiple of 8.
    return 8 + -(-len(text) // 8) * 8 + end


def validate_bundle(bundle: AdapterBundle) -> None:
    """Check a bundle made in memory, with the checks of a reader.

    Raises:
        InvalidConfig: A reader would refuse the configuration.
        MissingTensor, UnexpectedTensor, WrongShape, WrongDtype, NotFinite: `param` is the tensor's name.
    """
    AdapterConfig.from_json(bundle.config.canonical_json())
    check_names_and_shapes(bundle.config, {name: tuple(tensor.shape) for name, tensor in bundle.tensors.items()})
    check_values(bundle.tensors)
