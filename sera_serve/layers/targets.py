"""Finds the linear layers of a base model that an adapter can adapt."""

from __future__ import annotations

import difflib
from typing import TypeGuard, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.config import ALL_LINEAR, SeraConfig


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `module` is a linear layer: `nn.Linear`, or GPT-2's `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer. `Conv1D` stores its weight transposed."""
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return int(d_in), int(d_out)
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def adaptable_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer except the output embedding, by dotted path, in the model's order.

    The output embedding is left out, as in PEFT's "all-linear", because it is often tied to the input embedding.
    """
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    return {path: module for path, module in model.named_modules() if is_linear(module) and module is not output}


def select_targets(model: nn.Module, config: SeraConfig) -> dict[str, nn.Module]:
    """Return the layers of `model` that `config.target_modules` names. Each layer is checked to fit rank and split.

    Raises:
        InvalidConfiguration: A name matches no linear layer, or split does not divide a width of a layer.
    """
    linears = adaptable_linears(model)
    if config.target_modules == ALL_LINEAR:
        chosen = linears
    else:
        chosen = {}
        for path, module in linears.items():
            if any(path == suffix or path.endswith("." + suffix) for suffix in config.target_modules):
                chosen[path] = module
        for suffix in config.target_modules:
            if not any(path == suffix or path.endswith("." + suffix) for path in chosen):
                raise InvalidConfiguration(_no_such_module(suffix, linears), param="target_modules")
    for path, module in chosen.items():
        config.check_fits(path, *linear_widths(module))
    return chosen


def _no_such_module(suffix: str, linears: dict[str, nn.Module]) -> str:
    names = sorted({path.rpartition(".")[2] for path in linears})
    near = difflib.get_close_matches(suffix, names, n=3) or names
    return f"target module {suffix!r} matches no linear layer of this base; it has {', '.join(near)}"
