"""A frozen linear layer whose weight is kept in four or eight bits, by bitsandbytes or torchao.

The product is that of the dequantized weight, in the dtype of the input, forward and backward. So the layer is exactly
an ordinary linear layer with the dequantized weight, which is never kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sera_serve.errors import InvalidConfiguration
from sera_serve.quantization import QuantizationKind

KINDS: tuple[QuantizationKind, ...] = ("nf4", "int8", "int4")
# Of int4, along a row: one scale and one zero point for so many weights.
GROUP = 32


class QuantizedWeight(nn.Module, ABC):
    """A quantized matrix (d_out, d_in). All its tensors are buffers, so that model objects can share them."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Compute the matrix, (d_out, d_in)."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(self.buffers()).device


class Nf4Weight(QuantizedWeight):
    """bitsandbytes' NF4, in blocks of 64 with scales that are quantized too (QLoRA, section 3)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        self._state = state
        self.register_buffer("codes", codes)
        # The very tensors that the state has: a copy of the module with shared buffers shares them.
        tensors = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See `QuantizedWeight`."""
        import bitsandbytes.functional as bnb

        # The state has the dtype that the weight had.
        return cast(Tensor, bnb.dequantize_4bit(self.get_buffer("codes"), self._state)).to(dtype)


class Int8Weight(QuantizedWeight):
    """torchao's weight-only int8, symmetric, with one scale a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from torchao.quantization import Int8Tensor, PerRow

        quantized: Any = Int8Tensor.from_hp(weight, granularity=PerRow())
        self.register_buffer("codes", quantized.qdata)
        self.register_buffer("scale", quantized.scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See `QuantizedWeight`."""
        return self.get_buffer("codes").to(dtype) * self.get_buffer("scale").to(dtype)


class Int4Weight(QuantizedWeight):
    """torchao's groupwise int4 with a zero point, two codes a byte.

    torchao's own int4 tensors have products on GPUs alone, so its primitives quantize and dequantize.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

        self.shape = weight.shape
        weight = weight.float()
        scale, zero = choose_qparams_affine(
            weight, MappingType.ASYMMETRIC, (1, GROUP), torch.uint8, 0, 15, zero_point_dtype=torch.int32
        )
        # Rounded before the codes are chosen, so that they are right for the scale that is kept.
        scale = scale.half() if bool(((scale < 6e4) & (scale > 6.2e-5)).all()) else scale
        codes = quantize_affine(weight, (1, GROUP), scale.float(), zero, torch.uint8, 0, 15)
        self.register_buffer("codes", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.uint8))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See `QuantizedWeight`."""
        from torchao.quantization.quant_primitives import dequantize_affine

        packed = self.get_buffer("codes")
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(self.shape)
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero")
        found = dequantize_affine(
            codes, (1, GROUP), scale.float(), zero.to(torch.int32), torch.uint8, 0, 15, output_dtype=torch.float32
        )
        return cast(Tensor, found.to(dtype))


# Bytes of a weight with its part of the scales: of int4 half a byte, and 3 bytes for each group.
BYTES_A_WEIGHT: dict[QuantizationKind, float] = {"nf4": 0.52, "int8": 1.01, "int4": 0.5 + 3 / GROUP}
# bitsandbytes' tables of 16 and 256 values, which each matrix has.
BYTES_A_MATRIX: dict[QuantizationKind, int] = {"nf4": 1100, "int8": 0, "int4": 0}
_WEIGHTS: dict[QuantizationKind, type[QuantizedWeight]] = {"nf4": Nf4Weight, "int8": Int8Weight, "int4": Int4Weight}
_LIBRARY = {"nf4": "bitsandbytes", "int8": "torchao", "int4": "torchao"}


class QuantizedLinear(nn.Module):
    """h = x W^T + b with a frozen, quantized W.

    Attributes:
        in_features: d_in.
        out_features: d_out.
        kind: How W is kept.
        quantized: W.
        bias: (d_out,), not quantized, or None.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, kind: QuantizationKind, path: str) -> None:
        """Quantize.

        Args:
            weight: (d_out, d_in).
            bias: (d_out,) or None. It is kept as it is.
            kind: What to quantize to.
            path: What messages call the layer.

        Raises:
            InvalidConfiguration: The library is not installed or cannot do it here, or the shape does not fit.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind: QuantizationKind = kind
        if kind == "int4" and self.in_features % GROUP:
            raise InvalidConfiguration(
                f"quantize int4 works in groups of {GROUP}, and layer {path} is {self.in_features} wide; take nf4 or "
                "int8",
                param="quantize",
            )
        try:
            with torch.no_grad():
                self.quantized = _WEIGHTS[kind](weight.detach())
        except ImportError as error:
            raise InvalidConfiguration(
                f'quantize {kind} needs {_LIBRARY[kind]}, which cannot be imported ({error}): pip install "sera-serve'
                '[quant]"',
                param="quantize",
            ) from error
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise InvalidConfiguration(
                f"{_LIBRARY[kind]} cannot quantize to {kind} on {weight.device.type} "
                f"({' '.join(str(error).split())[:200]}); take another --quantize",
                param="quantize",
            ) from error
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The codes: for their device. Their shape and dtype are those of the storage."""
        return self.quantized.get_buffer("codes")

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out), in the dtype of x."""
        h: Tensor = cast(Any, _Product).apply(x, self.quantized)
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def extra_repr(self) -> str:
        """Return a summary of the shape for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T. The backward pass dequantizes again: to keep W would cost the memory that quantizing saves."""

    @staticmethod
    def forward(x: Tensor, quantized: QuantizedWeight) -> Tensor:
        return functional.linear(x, quantized.dequantize(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantizedWeight], output: Tensor) -> None:
        ctx.quantized = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.quantized.dequantize(gradient.dtype), None
