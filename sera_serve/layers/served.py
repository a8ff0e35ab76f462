"""The serving layer: a base linear layer whose tokens each get the update of their own adapter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sera_kernels import AdapterBatch, add_updates
from sera_serve.layers.attach import replace_module
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.shared_inputs import shared_input_rows


class ServedLinear(nn.Module):
    """base(x), plus each token's adapter by one grouped call over the device pool for all layers that share x."""

    def __init__(self, base: nn.Module, group: SharedInputGroup) -> None:
        super().__init__()
        self.base = base
        # Plain attributes, which are found faster than submodules; in a tuple, so that torch does not take the
        # group for a child of this layer.
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

    The first call computes all of them, and the later ones fetch their part; a call with another tensor is computed on
    its own terms, so a model that does not behave as it did at attach time is served right, only slower.
    """

    def __init__(self, context: AdapterContext, modules: list[int]) -> None:
        """SharedInputGroup that adapt these rows of the tables; their layers join in the same order."""
        self.context = context
        self.modules = tuple(modules)
        self._bases: list[Callable[[Tensor], Tensor]] = []
        self._input: Tensor | None = None
        self._batch: AdapterBatch | None = None
        self._outputs: list[Tensor | None] = []

    def join(self, base: Callable[[Tensor], Tensor]) -> int:
        """Take in the forward function of the next layer, and return its index for `output`."""
        self._bases.append(base)
        return len(self._bases) - 1

    def output(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` gives for `x`, adapters of the current batch included."""
        y = self._outputs[index] if x is self._input and self.context.batch is self._batch else None
        if y is None:
            y = self._compute(index, x)
        # Each is handed out once; the last one lets go of x.
        self._outputs[index] = None
        if index == len(self._bases) - 1:
            self._input = None
        return y

    def _compute(self, index: int, x: Tensor) -> Tensor:
        context = self.context
        if context.batch is None:
            raise RuntimeError("no forward pass with adapters is running")
        # Each y is fresh from its base layer, so it may be changed in place.
        outputs = [base(x) for base in self._bases]
        add_updates(x.contiguous(), outputs, self.modules, context.batch, context.pool, context.tables)
        self._input, self._batch = x, context.batch
        self._outputs = list(outputs)
        return outputs[index]


def attach_serving(model: nn.Module, context: AdapterContext, groups: list[list[str]]) -> None:
    """Wrap every adaptable linear layer of `model`, in place; row m of the tables is the m-th of them.

    Args:
        model: A base model for one engine's use.
        context: Pool, tables and batch that the layers read.
        groups: From `find_shared_inputs`, on the same architecture.
    """
    for members in shared_input_rows(model, groups):
        group = SharedInputGroup(context, [row for row, _ in members])
        for _, path in members:
            replace_module(model, path, ServedLinear(model.get_submodule(path), group))
