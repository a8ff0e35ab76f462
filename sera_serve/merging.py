"""Folding an adapter into its base model's weights."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from adapters_store import AdapterBundle, check_base, dense_factors
from sera_serve.base import FrozenBase


def merge_adapter(base: FrozenBase, bundle: AdapterBundle) -> None:
    """Add scaling * A C B to each adapted layer's weight, in place; a classifier's head stays outside.

    The sum is taken in float64 and rounded once, to the weight's dtype.

    Raises:
        WrongBase, UnknownModule, WrongShape: The adapter was made for another base; nothing is changed.
    """
    check_base(bundle.config, base.info, base.module_shapes())
    with torch.no_grad():
        for path in bundle.config.modules:
            layer = base.model.get_submodule(path)
            weight = layer.get_parameter("weight")
            delta = dense_factors(bundle, path).delta_weight().to(weight.device)
            # nn.Linear stores (d_out, d_in), GPT-2's Conv1D (d_in, d_out).
            merged = weight.double() + (delta if isinstance(layer, Conv1D) else delta.T)
            weight.copy_(merged.to(weight.dtype))
