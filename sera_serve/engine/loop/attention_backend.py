"""What computes attention: the interface of its implementations, and the choice of one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from sera_serve.errors import InvalidConfiguration

if TYPE_CHECKING:
    from sera_serve.engine.loop.attention import KeyValuePool, StepContext

BackendName = Literal["auto", "triton", "torch", "flash-attn", "flashinfer"]
_LIBRARIES = {"flash-attn": "flash_attn", "flashinfer": "flashinfer"}
_PACKAGES = {"flash-attn": "flash-attn", "flashinfer": "flashinfer-python"}


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer attends.

    Attributes:
        scale: Factor of the scores.
        window: A token sees itself and the `window - 1` tokens before it; None is all tokens before it.
        softcap: Scores are squashed into (-softcap, softcap), as in Gemma 2; None leaves them.
        sinks: (heads,) logits that take part in the softmax, as in gpt-oss, or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether softmax of the scores is all there is, but for a window."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class RowKeys:
    """Where the keys of each row are, on the device; a row is one token.

    Attributes:
        table: int64 or int32 (sequences, pages), the pages of each sequence. Beyond the sequence's keys it may have the
            number of any page.
        lengths: int64 (rows,), keys of each row.
        owners: int32 (rows,), the sequence of each row; None where each row is a sequence of its own.
    """

    table: Tensor
    lengths: Tensor
    owners: Tensor | None = None


class AttentionBackend(Protocol):
    """Attention over one kind of device. It keeps nothing of a step: what it makes for all layers, the step keeps."""

    has_paged_decode: bool
    """Whether decodes of any lengths are attended in one call, in place."""

    reads_padding: bool
    """Whether what a page holds beyond its request's end is read, with a weight of 0: it must then be finite."""

    def write(self, pool: KeyValuePool, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put (tokens, kv_heads, width) keys and values of a layer at int64 (tokens,) places of the pool."""

    def decode(self, step: StepContext, layer: int, query: Tensor, keys: RowKeys, options: AttentionOptions) -> Tensor:
        """Attend one token of each row; each shape follows from the shapes of the arguments, as a graph demands.

        Args:
            step: The step under way.
            layer: Layer of the pool.
            query: (rows, heads, key width).
            keys: Where the keys of each row are.
            options: How the layer attends.

        Returns:
            (rows, heads, value width).
        """
        ...

    def packed(
        self, step: StepContext, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Attend the parts of a step that the host has packed.

        Args:
            step: The step under way.
            layer: Layer of the pool.
            query: (tokens, heads, key width).
            key: (tokens, kv_heads, key width), this step's own.
            value: (tokens, kv_heads, value width), likewise.
            options: How the layer attends.

        Returns:
            (tokens, heads, value width).
        """
        ...


def choose_backend(name: BackendName, device: torch.device) -> AttentionBackend:
    """The attention of a device.

    Args:
        name: The setting `attention`. "auto" is Triton's kernels on CUDA and torch elsewhere.
        device: Where the base is.

    Raises:
        InvalidConfiguration: The device has no such attention, or a library is not installed.
    """
    from sera_serve.engine.loop.torch_attention import TorchAttention

    has_triton = importlib.util.find_spec("triton") is not None
    if name == "torch" or (name == "auto" and (device.type != "cuda" or not has_triton)):
        return TorchAttention()
    if device.type != "cuda":
        raise InvalidConfiguration(
            f"attention {name} needs a CUDA device, and the base is on {device}; choose attention auto",
            param="attention",
        )
    if not has_triton:
        raise InvalidConfiguration(
            f"attention {name} needs Triton, which is not installed; choose attention torch", param="attention"
        )
    from sera_serve.engine.loop import cuda_attention

    if name in _LIBRARIES and importlib.util.find_spec(_LIBRARIES[name]) is None:
        raise InvalidConfiguration(
            f"attention {name} needs a library that is not installed; "
            f"run `pip install {_PACKAGES[name]}`, or choose attention auto",
            param="attention",
        )
    if name == "flash-attn":
        return cuda_attention.PagedAttention(cuda_attention.FlashAttnVarlen())
    if name == "flashinfer":
        return cuda_attention.PagedAttention(cuda_attention.FlashInferVarlen())
    return cuda_attention.PagedAttention(cuda_attention.TorchVarlen())
