"""The kinds of quantization, for options that are read without torch."""

from __future__ import annotations

from typing import Literal

QuantizationKind = Literal["nf4", "int8", "int4"]
"""How the linear layers of a quantized base are kept."""

Quantize = Literal["none", QuantizationKind]
"""The same, or as they are."""
