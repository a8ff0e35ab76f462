"""The serving layer: a base linear layer whose tokens each get the update of their own adapter."""

from __future__ import annotations

from torch import Tensor, nn

from sera_kernels import grouped_sera
from sera_serve.layers.attach import replace_module
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.targets import adaptable_linears


class ServedLinear(nn.Module):
    """base(x), plus each token's adapter by one grouped call over the device pool."""

    def __init__(self, base: nn.Module, module: int, context: AdapterContext) -> None:
        super().__init__()
        self.base = base
        self.module = module
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        y: Tensor = self.base(x)
        batch = self.context.batch
        if batch is not None:
            # y is fresh from the base layer, so it may be changed in place.
            grouped_sera(
                x.reshape(-1, x.shape[-1]),
                [y.view(-1, y.shape[-1])],
                [self.module],
                batch,
                self.context.pool,
                self.context.tables,
            )
        return y


def attach_serving(model: nn.Module, context: AdapterContext) -> None:
    """Wrap every adaptable linear layer of `model`, in place; row m of the tables is the m-th of them."""
    for module, (path, base) in enumerate(adaptable_linears(model).items()):
        replace_module(model, path, ServedLinear(base, module, context))
