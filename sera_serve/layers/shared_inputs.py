"""Which layers read the same input (q, k and v; gate and up), found by watching one small forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sera_serve.layers.targets import adaptable_linears


@torch.no_grad()
def find_shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Group the adaptable layers of `model` by the tensor that they are called with.

    Only layers of one parent module are grouped, so that no update is computed long before it is used. A layer that
    the pass does not reach is a group of its own.

    Returns:
        Paths; every adaptable layer is in exactly one group, groups and members in the order of the model.
    """
    inputs: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Any:
        # The tensors are kept, so that none of them is freed and its identity given to another.
        return lambda module, args: inputs.__setitem__(path, args[0])

    linears = adaptable_linears(model)
    for path, linear in linears.items():
        handles.append(linear.register_forward_pre_hook(watch(path)))
    try:
        model(**{name: value.to(model.device) for name, value in model.dummy_inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for path in linears:
        parent = path.rpartition(".")[0]
        key = (parent, id(inputs[path])) if path in inputs else path
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def shared_input_rows(model: nn.Module, groups: list[list[str]]) -> list[list[tuple[int, str]]]:
    """The groups with each path's row in the adapter tables."""
    rows = {path: row for row, path in enumerate(adaptable_linears(model))}
    return [[(rows[path], path) for path in group] for group in groups]
