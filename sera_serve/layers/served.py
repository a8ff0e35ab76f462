"""The serving layer: a base linear layer whose tokens each get the update of their own adapter."""

from __future__ import annotations

from torch import Tensor, nn

from sera_kernels import grouped_sera
from sera_serve.layers.attach import replace_module
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.siblings import sibling_modules


class ServedLinear(nn.Module):
    """base(x), plus each token's adapter by one grouped call over the device pool for all layers that share x."""

    def __init__(self, base: nn.Module, module: int, siblings: Siblings) -> None:
        super().__init__()
        self.base = base
        self.module = module
        # In a tuple, so that torch does not take the siblings for children of this layer.
        self._siblings = (siblings,)
        siblings.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        siblings = self._siblings[0]
        if siblings.context.batch is None:
            y: Tensor = self.base(x)
            return y
        return siblings.output(self, x)


class Siblings:
    """Layers that the base model calls one after the other with the same tensor.

    The first call computes all of them, and the later ones fetch their part; a call with another tensor is computed on
    its own terms, so a model that does not behave as it did at attach time is served right, only slower.
    """

    def __init__(self, context: AdapterContext) -> None:
        self.context = context
        self.layers: list[ServedLinear] = []
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, layer: ServedLinear, x: Tensor) -> Tensor:
        """What `layer` gives for `x`, adapters of the current batch included."""
        if x is not self._input or layer.module not in self._outputs:
            self._compute(x)
        y = self._outputs.pop(layer.module)
        if not self._outputs:
            self._input = None
        return y

    def _compute(self, x: Tensor) -> None:
        batch = self.context.batch
        if batch is None:
            raise RuntimeError("no forward pass with adapters is running")
        # Each y is fresh from its base layer, so it may be changed in place.
        outputs = [layer.base(x) for layer in self.layers]
        grouped_sera(
            x.reshape(-1, x.shape[-1]),
            [y.view(-1, y.shape[-1]) for y in outputs],
            [layer.module for layer in self.layers],
            batch,
            self.context.pool,
            self.context.tables,
        )
        self._input = x
        self._outputs = {layer.module: y for layer, y in zip(self.layers, outputs, strict=True)}


def attach_serving(model: nn.Module, context: AdapterContext, groups: list[list[str]]) -> None:
    """Wrap every adaptable linear layer of `model`, in place; row m of the tables is the m-th of them.

    Args:
        model: A base model for one engine's use.
        context: Pool, tables and batch that the layers read.
        groups: From `find_siblings`, on the same architecture.
    """
    for group in sibling_modules(model, groups):
        siblings = Siblings(context)
        for module, path in group:
            replace_module(model, path, ServedLinear(model.get_submodule(path), module, siblings))
