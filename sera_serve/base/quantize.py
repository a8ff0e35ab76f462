"""Keeps the linear layers of a frozen base in four or eight bits."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from sera_serve.base.model import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import adaptable_linears
from sera_serve.layers.attach import replace_module
from sera_serve.layers.quantized_linear import BYTES_A_MATRIX, BYTES_A_WEIGHT, KINDS, QuantizedLinear
from sera_serve.quantization import QuantizationKind, Quantize


def quantize_base(base: FrozenBase, kind: QuantizationKind) -> None:
    """Quantize every linear layer of a base that an adapter may adapt, in place, one layer after the other.

    Embeddings, norms, biases and the output embedding stay as they are. The fingerprint was computed before and stays,
    so adapters of the base and of the quantized base are exchangeable. An adapter is exact beside the quantized weight.

    Args:
        base: A base without adapters, on the device where it will be used.
        kind: nf4 (bitsandbytes, 4.1 bits a weight), int8 (torchao, one scale a row) or int4 (torchao, groups of 32,
            4.75 bits a weight).

    Raises:
        InvalidConfiguration: The kind is unknown, or the library is missing or does not run here, or a layer's width
            does not fit. The base may be quantized in part: do not use it.
    """
    if kind not in KINDS:
        raise InvalidConfiguration(f"quantize is {kind!r}; choose none, {', '.join(KINDS)}", param="quantize")
    for path, layer in adaptable_linears(base.model).items():
        if isinstance(layer, QuantizedLinear):
            raise InvalidConfiguration(f"the base is quantized to {layer.kind} already", param="quantize")
        weight = layer.get_parameter("weight")
        # GPT-2's Conv1D stores (d_in, d_out).
        matrix = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        bias = getattr(layer, "bias", None)
        quantized = QuantizedLinear(matrix, bias if isinstance(bias, nn.Parameter) else None, kind, path)
        replace_module(base.model, path, quantized)


def planned_bytes(model: nn.Module, quantize: Quantize) -> int:
    """Bytes that a model's parameters will have. Works on the device "meta"; quantized, to about 1%."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if quantize == "none":
        return weights
    linears = [layer.get_parameter("weight") for layer in adaptable_linears(model).values()]
    saved = sum(
        weight.nbytes - BYTES_A_WEIGHT[quantize] * weight.numel() - BYTES_A_MATRIX[quantize] for weight in linears
    )
    return weights - int(saved)
