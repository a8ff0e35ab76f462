"""The serving layer: a base linear layer that adds, for each token, the update of the token's own adapter.

Layers that read the same input (q, k and v; gate and up) form a `SharedInputGroup`. One grouped call updates the
outputs of all layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sera_kernels import AdapterBatch, add_updates
from sera_serve.layers.attach import replace_module
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.targets import adaptable_linears


class ServedLinear(nn.Module):
    """base(x), plus the update of each token's adapter from the device pool."""

    def __init__(self, base: nn.Module, group: SharedInputGroup) -> None:
        super().__init__()
        self.base = base
        # Plain attributes are found faster than submodules. The tuple hides the group from torch, which would else
        # register the group's layers as children of this layer.
        self._forward = base.forward
        self._shared = (group, group.context, group.join(base.forward))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        group, context, index = self._shared
        if context.batch is None:
            y: Tensor = self._forward(x)
            return y
        return group.output(index, x)


class SharedInputGroup:
    """Layers that the base model calls one after the other with the same tensor.

    The first call computes the outputs of all layers of the group. The later calls fetch their outputs. A call with
    another tensor computes all outputs again. A model that behaves differently than at attach time is therefore served
    correctly, but slower.
    """

    def __init__(self, context: AdapterContext, modules: list[int]) -> None:
        """Make a group without layers.

        Args:
            context: Pool, tables and batch.
            modules: The row of each layer in the adapter tables. The layers must join in the same order.
        """
        self.context = context
        self.modules = tuple(modules)
        self._bases: list[Callable[[Tensor], Tensor]] = []
        self._input: Tensor | None = None
        self._batch: AdapterBatch | None = None
        self._outputs: list[Tensor | None] = []

    def join(self, base: Callable[[Tensor], Tensor]) -> int:
        """Add the forward function of the next layer, and return the layer's index for `output`."""
        self._bases.append(base)
        return len(self._bases) - 1

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of layer `index` for `x`, with the updates of the current batch's adapters."""
        y = self._outputs[index] if x is self._input and self.context.batch is self._batch else None
        if y is None:
            y = self._compute(index, x)
        # Each output is handed out once. The last layer releases x.
        self._outputs[index] = None
        if index == len(self._bases) - 1:
            self._input = None
        return y

    def _compute(self, index: int, x: Tensor) -> Tensor:
        context = self.context
        if context.batch is None:
            raise RuntimeError("no forward pass with adapters is running")
        # Each base layer returns a new tensor, so its output may be changed in place.
        outputs = [base(x) for base in self._bases]
        add_updates(x.contiguous(), outputs, self.modules, context.batch, context.pool, context.tables)
        self._input, self._batch = x, context.batch
        self._outputs = list(outputs)
        return outputs[index]


@torch.no_grad()
def find_shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Group the adaptable layers of `model` by their input tensor, as one small forward pass shows it.

    A group has layers of one parent module only, so that each update is used soon after its computation. A layer that
    the forward pass does not call forms a group of its own.

    Returns:
        Groups of paths. Every adaptable layer is in exactly one group. Groups and paths are in the model's order.
    """
    inputs: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Any:
        # The dictionary keeps the tensors alive, so that no two of them have the same identity.
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


def attach_serving(model: nn.Module, context: AdapterContext, groups: list[list[str]]) -> None:
    """Replace every adaptable linear layer of `model` by a `ServedLinear`, in place.

    Row m of the adapter tables belongs to the m-th adaptable layer.

    Args:
        model: A base model that one engine uses alone.
        context: Pool, tables and batch that the layers read.
        groups: The result of `find_shared_inputs` for the same architecture.
    """
    rows = {path: row for row, path in enumerate(adaptable_linears(model))}
    for paths in groups:
        group = SharedInputGroup(context, [rows[path] for path in paths])
        for path in paths:
            replace_module(model, path, ServedLinear(model.get_submodule(path), group))
