"""Fourth stage of an import: the factors, scaling, gain and offset of each adapted layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.convert.import_base import ImportBase
from adapters_store.convert.peft_config import PatternBudget, PatternMatcher, PeftConfig
from adapters_store.convert.peft_errors import RankTooLarge, UnsupportedAdapter
from adapters_store.convert.peft_files import PeftFiles
from adapters_store.convert.peft_keys import LayerKeys
from adapters_store.errors import BundleTooLarge, MissingTensor, NotFinite, WrongShape
from adapters_store.format.mmap_buffer import writable_memory
from adapters_store.format.safetensors_file import read_tensor
from adapters_store.format.tensor_table import DTYPES
from adapters_store.format.validation import check_values, rank_fault

# Elements of a weight that are looked at in float64 at once.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class PeftLayer:
    """One adapted layer in PEFT's own layout, in the checkpoint's dtype, block-diagonal factors written out.

    Semantics, of a row x (d_in,): y = W x + bias + scaling * (B (A x) + lora_bias); with a magnitude m, y is
    (m / norm) * (W + scaling * B A) x + bias, `norm` the length of each row of W + scaling * B A.

    Attributes:
        a: `lora_A`, (rank, d_in).
        b: `lora_B`, (d_out, rank).
        scaling: Factor of the update.
        lora_bias: (d_out,), or None.
        magnitude: (d_out,), or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    lora_bias: Tensor | None
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    def gain_and_offset(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gain and offset (d_out,), float32, that a bundle needs for a magnitude or a bias; None where unused.

        The gain of DoRA is m / norm, and the offset (1 - gain) * bias keeps the layer's own bias as it is.

        Args:
            weight: The layer's weight in the base, (d_out, d_in).
            bias: The layer's bias in the base, (d_out,), or None.

        Raises:
            NotFinite: A row of W + scaling * B A has the length 0.
        """
        if self.magnitude is None:
            offset = None if self.lora_bias is None else (self.scaling * self.lora_bias.double()).float()
            return None, offset
        gain = self.magnitude.double() / self.row_norms(weight)
        if not gain.isfinite().all():
            raise NotFinite(
                "a row of the weight with the adapter has the length 0, and DoRA divides by it; train again",
                param="lora_magnitude_vector",
            )
        if bias is None:
            return gain.float(), None
        return gain.float(), ((1 - gain) * bias.cpu().double()).float()

    def row_norms(self, weight: Tensor) -> Tensor:
        """The length of each row of W + scaling * B A, float64 (d_out,) on the CPU."""
        rows = max(1, _BLOCK // weight.shape[1])
        a = self.a.double()
        norms = []
        for start in range(0, len(weight), rows):
            part = weight[start : start + rows].cpu().double()
            norms.append((part + self.scaling * (self.b[start : start + rows].double() @ a)).norm(dim=1))
        return torch.cat(norms)


class TensorReader:
    """Reads the tensors of a checkpoint by name; each one is finite.

    Attributes:
        max_bytes: Most bytes of a bundle made of them.
    """

    def __init__(self, files: PeftFiles) -> None:
        """Hold the files. The weights are read with the first tensor; a read-only buffer is copied once."""
        self.max_bytes = files.max_bytes
        self._header, self._weights = files.header, files.weights
        self._entries = files.header.table.entries
        self._data: memoryview | None = None

    def read(self, name: str) -> Tensor:
        """The tensor of that name, which must exist; raises NotFinite, or InvalidArchive for a damaged archive."""
        if self._data is None:
            data = self._weights.data()
            if data.readonly:
                copy = writable_memory(len(data))
                copy[:] = data
                data = copy
            self._data = self._header.tensor_bytes(data)
        tensor = read_tensor(self._data, self._entries[name])
        check_values({name: tensor})
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that name, which must exist; nothing is read."""
        return self._entries[name].shape

    def itemsize(self, name: str) -> int:
        """Bytes of an element of the tensor of that name, which must exist."""
        return DTYPES[self._entries[name].dtype].itemsize


def read_layers(
    reader: TensorReader, matched: Mapping[str, LayerKeys], config: PeftConfig, base: ImportBase
) -> tuple[dict[str, PeftLayer], list[str]]:
    """Read the tensors of every layer, whose shapes are checked, and find each layer's scaling.

    Returns:
        The layers by path in the base, and warnings.

    Raises:
        NotFinite: `param` is the tensor.
        InvalidArchive: The archive is damaged.
        InvalidConfig: A pattern is no regular expression, or there are too many, or they take too long.
    """
    budget = PatternBudget()
    alphas = PatternMatcher(config.alpha_patterns, "alpha_pattern", budget)
    ranks = PatternMatcher(config.rank_patterns, "rank_pattern", budget)
    layers: dict[str, PeftLayer] = {}
    other_ranks: list[str] = []
    for path, keys in matched.items():
        assert keys.lora_a is not None and keys.lora_b is not None
        d_in, _ = base.shapes[path]
        a = _dense(reader.read(keys.lora_a), d_in, config.blocks)
        b = _dense(reader.read(keys.lora_b), len(a), config.blocks)
        key = alphas.find(keys.path)
        alpha = config.alpha if key is None else config.alpha_patterns[key]
        key = ranks.find(keys.path)
        if len(a) != (config.rank if key is None else config.rank_patterns[key]):
            other_ranks.append(path)
        layers[path] = PeftLayer(
            a,
            b,
            config.scaling(alpha, len(a)),
            _vector(reader, keys.lora_bias),
            _vector(reader, keys.magnitude),
        )
    warnings = []
    if other_ranks:
        warnings.append(
            f"{len(other_ranks)} layers, such as {other_ranks[0]}, have another rank than adapter_config says; the "
            "rank of the tensors is used"
        )
    return layers, warnings


def check_layers(
    reader: TensorReader, matched: Mapping[str, LayerKeys], config: PeftConfig, base: ImportBase
) -> dict[str, int]:
    """Check every layer by the header alone: zeros take little room in an archive, and much in memory.

    Returns:
        The elements of each layer's factors in a bundle, by path in the base.

    Raises:
        BundleTooLarge: The factors exceed the limit once the zeros of block-diagonal ones are written out.
        RankTooLarge: A layer's rank is far above its widths, or above what is served.
        MissingTensor, WrongShape, UnsupportedAdapter: A layer cannot be carried over; `param` is its tensor.
    """
    nbytes = 0
    elements: dict[str, int] = {}
    for path, keys in matched.items():
        _check_parts(path, keys, config)
        assert keys.lora_a is not None and keys.lora_b is not None
        d_in, d_out = base.shapes[path]
        rank, _ = _dense_shape(reader.shape(keys.lora_a), keys.lora_a, d_in, config.blocks)
        shape_b = _dense_shape(reader.shape(keys.lora_b), keys.lora_b, rank, config.blocks)
        if shape_b != (d_out, rank):
            raise WrongShape(
                f"tensor {keys.lora_b!r} has shape {reader.shape(keys.lora_b)}; layer {path} of the base takes "
                f"({d_out}, {rank})",
                param=keys.lora_b,
            )
        if fault := rank_fault(path, rank, d_in, d_out):
            raise RankTooLarge(fault, param=keys.lora_a)
        for name in (keys.lora_bias, keys.magnitude):
            _check_vector(reader, name, d_out)
        elements[path] = rank * (d_in + d_out)
        # Written out, a block-diagonal factor has as many times the file's bytes as it has blocks.
        nbytes += rank * (d_in * reader.itemsize(keys.lora_a) + d_out * reader.itemsize(keys.lora_b))
        if nbytes > reader.max_bytes:
            raise BundleTooLarge(
                f"the factors have {nbytes} bytes or more with the zeros of {config.blocks} blocks written out; the "
                f"limit is {reader.max_bytes}: train with fewer blocks or a smaller rank",
                param=keys.lora_a,
            )
    return elements


def _check_parts(path: str, keys: LayerKeys, config: PeftConfig) -> None:
    """Every layer has both factors, and exactly the vectors that the configuration announces."""
    parts = {
        "lora_A": (keys.lora_a, True),
        "lora_B": (keys.lora_b, True),
        "lora_magnitude_vector": (keys.magnitude, config.use_dora),
        "the bias of lora_B": (keys.lora_bias, config.lora_bias),
    }
    for part, (name, needed) in parts.items():
        if needed and name is None:
            raise MissingTensor(f"layer {path} of the checkpoint has no {part}; save it again, whole", param=path)
        if name is not None and not needed:
            field = "use_dora" if part == "lora_magnitude_vector" else "lora_bias"
            raise UnsupportedAdapter(
                f"tensor {name!r} is there, and adapter_config.{field} is not true; correct one of the two", param=name
            )
    if config.use_dora and config.lora_bias:
        raise UnsupportedAdapter(
            "adapter_config has both use_dora and lora_bias, which PEFT does not allow; train with one of them",
            param="adapter_config.lora_bias",
        )


def _dense_shape(shape: tuple[int, ...], name: str, width: int, blocks: int) -> tuple[int, int]:
    """The shape (rows, width) of a factor with the zeros of a block-diagonal one written out; raises WrongShape."""
    if len(shape) == 2 and shape[1] == width:
        return shape[0], width
    if len(shape) == 2 and blocks > 1 and shape[1] * blocks == width and shape[0] % blocks == 0:
        return shape[0], width
    raise WrongShape(
        f"tensor {name!r} has shape {shape}; its layer in the base takes {width} columns: name the base that the "
        "adapter was trained on",
        param=name,
    )


def _dense(tensor: Tensor, width: int, blocks: int) -> Tensor:
    """A factor (rows, width), whose shape is checked, with the zeros of a block-diagonal one written out.

    BD-LoRA makes one factor of a layer block-diagonal and leaves the other one dense. A bundle has both factors
    block-diagonal or both dense, so it holds the zeros.
    """
    if tensor.shape[1] == width:
        return tensor
    written_out: Tensor = torch.block_diag(*tensor.chunk(blocks))
    return written_out


def _check_vector(reader: TensorReader, name: str | None, width: int) -> None:
    """Raise WrongShape for a vector (width,) of another shape; dimensions of size 1 beside it are allowed."""
    if name is None:
        return
    shape = reader.shape(name)
    if math.prod(shape) != width or max(shape, default=0) != width:
        raise WrongShape(f"tensor {name!r} has shape {shape}; the base takes ({width},)", param=name)


def _vector(reader: TensorReader, name: str | None) -> Tensor | None:
    return None if name is None else reader.read(name).reshape(-1)
