"""Attaches trainable adapters to a base model, detaches them, and counts their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor, nn

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.sera_linear import SeraLinear
from sera_serve.layers.targets import adaptable_linears, linear_widths, select_targets
from sera_serve.sera_config import SeraConfig


class ModuleShape(TypedDict):
    """One adapted layer, as the adapter format describes it."""

    d_in: int
    d_out: int
    rank: int
    split: int
    use_mixer: bool
    scaling: float


def attach_adapter(model: nn.Module, config: SeraConfig) -> dict[str, SeraLinear]:
    """Replace each target of `model` by a `SeraLinear`, in place, and freeze all other parameters.

    Args:
        model: The base model. If a target does not fit, the model is not changed.
        config: The adapter's shape and targets.

    Returns:
        The new layers, by the dotted path of the wrapped layer.

    Raises:
        InvalidConfiguration: See `select_targets`.
    """
    return attach_layers(model, dict.fromkeys(select_targets(model, config), config))


def attach_layers(model: nn.Module, configs: Mapping[str, SeraConfig]) -> dict[str, SeraLinear]:
    """`attach_adapter`, with a shape of its own for each layer.

    Args:
        model: The base model. If a layer does not fit, the model is not changed.
        configs: The shape of each layer, by its dotted path.

    Raises:
        InvalidConfiguration: A path names no linear layer, or a shape does not fit its layer.
    """
    linears = adaptable_linears(model)
    for path, config in configs.items():
        if path not in linears:
            raise InvalidConfiguration(f"the base has no linear layer {path!r}", param="target_modules")
        config.check_fits(path, *linear_widths(linears[path]))
    model.requires_grad_(False)
    layers = {}
    for path, config in configs.items():
        layers[path] = SeraLinear(linears[path], config)
        replace_module(model, path, layers[path])
    return layers


def detach_adapter(model: nn.Module) -> None:
    """Put the wrapped base layers back. A no-op on a model without adapters."""
    for path, layer in attached_layers(model).items():
        replace_module(model, path, layer.base)


def attached_layers(model: nn.Module) -> dict[str, SeraLinear]:
    """Return the `SeraLinear` layers of `model` by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SeraLinear)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of every attached layer without gradients, by their names in the adapter format."""
    tensors = {}
    for path, layer in attached_layers(model).items():
        tensors[f"{path}.sera_a"] = layer.sera_a.detach()
        if layer.sera_c is not None:
            tensors[f"{path}.sera_c"] = layer.sera_c.detach()
        tensors[f"{path}.sera_b"] = layer.sera_b.detach()
    return tensors


def module_specs(model: nn.Module) -> dict[str, ModuleShape]:
    """Return the description of every attached layer in the adapter format, by path."""
    return {
        path: ModuleShape(
            d_in=layer.d_in,
            d_out=layer.d_out,
            rank=layer.config.rank,
            split=layer.config.split,
            use_mixer=layer.config.use_mixer,
            scaling=layer.config.scaling,
        )
        for path, layer in attached_layers(model).items()
    }


def count_adapter_parameters(model: nn.Module, config: SeraConfig) -> int:
    """Return the number of trainable parameters of the adapter on `model`, without a head.

    Only shapes are read, so `model` may be on the meta device. `model` is not changed.
    """
    total = 0
    for module in select_targets(model, config).values():
        d_in, d_out = linear_widths(module)
        if "a" in config.train_factors:
            total += d_in * config.segment_rank
        if "c" in config.train_factors and config.use_mixer:
            total += config.rank**2
        if "b" in config.train_factors:
            total += config.segment_rank * d_out
    return total


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path` in `model` by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
