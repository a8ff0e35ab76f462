"""Finds the linear layers of a base model that an adapter can adapt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.quantized_linear import QuantizedLinear
from sera_serve.sera_config import ALL_LINEAR, SeraConfig

_MOST_NAMES = 12


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `module` is a linear layer: `nn.Linear`, GPT-2's `Conv1D`, or one with a quantized weight."""
    return isinstance(module, (nn.Linear, Conv1D, QuantizedLinear))


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


def pattern_matches(pattern: str, path: str) -> bool:
    """Return whether `pattern` names the module at the dotted path `path`.

    A pattern is a path or the last names of a path (`q_proj`, `layers.0.self_attn.q_proj`). `*` stands for any
    characters, dots included, `?` for one character, and `[...]` for one of a set, as in `fnmatch`.
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


def match_targets(paths: Sequence[str], config: SeraConfig) -> list[str]:
    """Return those of `paths`, the linear layers of a base, that `config.target_modules` names, in their order.

    Raises:
        InvalidConfiguration: A name matches none of them.
    """
    if config.target_modules == ALL_LINEAR:
        return list(paths)
    for pattern in config.target_modules:
        if not any(pattern_matches(pattern, path) for path in paths):
            raise InvalidConfiguration(
                f"target module {pattern!r} matches no linear layer of this base; it has {near_names(pattern, paths)}",
                param="target_modules",
            )
    return [path for path in paths if any(pattern_matches(pattern, path) for pattern in config.target_modules)]


def select_targets(model: nn.Module, config: SeraConfig) -> dict[str, nn.Module]:
    """Return the layers of `model` that `config.target_modules` names. Each layer is checked to fit rank and split.

    Raises:
        InvalidConfiguration: A name matches no linear layer, or split does not divide a width of a layer.
    """
    linears = adaptable_linears(model)
    chosen = {path: linears[path] for path in match_targets(list(linears), config)}
    for path, module in chosen.items():
        config.check_fits(path, *linear_widths(module))
    return chosen


def near_names(pattern: str, paths: Iterable[str]) -> str:
    """List those of `paths` that are close to `pattern`, or some of them if none is close."""
    known = list(paths)
    # A pattern of one name is near other names; a longer one is near whole paths.
    names = sorted({path.rpartition(".")[2] for path in known}) if "." not in pattern else known
    return ", ".join(difflib.get_close_matches(pattern, names, n=3) or names[:_MOST_NAMES])
