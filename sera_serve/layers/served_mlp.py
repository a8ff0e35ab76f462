"""MLPs of the form down(silu(gate(x)) * up(x)), as in Llama: updates and activation in one pass, on a GPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sera_serve.layers.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from sera_serve.layers.served_linear import SharedInputGroup

_LAYERS = ["gate_proj", "up_proj"]
# Tokens of the comparison with the module's own forward function.
_TOKENS = 3


def find_silu_mlp(model: nn.Module, paths: list[str]) -> nn.Module | None:
    """Return the MLP whose two first layers are the layers at `paths`, if it has the form and is on a GPU.

    The module's names and its activation must be those of the form, and its own forward function must compute the same.
    """
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) != 1 or [path.rpartition(".")[2] for path in paths] != _LAYERS:
        return None
    mlp = model.get_submodule(parents.pop())
    return mlp if _can_fuse(mlp) and _has_form(mlp) else None


class FusedSiluMLP:
    """The forward function of an MLP that `find_silu_mlp` found, in place of its own."""

    def __init__(self, first: SharedInputGroup, last: SharedInputGroup) -> None:
        """Make a forward function from the group of gate and up, and the group of down."""
        # Imported here, because the import of Triton takes as long as the rest of a small server's start.
        from sera_kernels.activation import silu_mul, updated_silu_mul

        self._first, self._last = first, last
        self._silu_mul, self._updated_silu_mul = silu_mul, updated_silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        y, update = self.computed(x)
        return y if update is None else y + update.view(y.shape)

    def computed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, and what is still to be added to it, (tokens, width); or None if it is complete."""
        first, context = self._first, self._first.context
        if context.batch is not None and first.is_updated_in_place(x):
            gate, up = (y.view(-1, y.shape[-1]) for y in first.products(x))
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            hidden = self._updated_silu_mul(rows, gate, up, first.modules, context.batch, context.pool, context.tables)
        else:
            outputs, updates = first.computed(x)
            gate, up = (y.view(-1, y.shape[-1]) for y in outputs)
            hidden = self._silu_mul(gate, up, updates)
        (y,), updates = self._last.computed(hidden.view(*x.shape[:-1], -1))
        return y, None if updates is None else updates[0]


def fuse_silu_mlp(mlp: nn.Module) -> None:
    """Replace the forward function of an MLP that `find_silu_mlp` found, if its layers are served in two groups."""
    gate, up, down = (mlp.get_submodule(name) for name in (*_LAYERS, "down_proj"))
    first, last = getattr(gate, "group", None), getattr(down, "group", None)
    if first is not None and last is not None and first.holds([gate, up]) and last.holds([down]):
        mlp.forward = FusedSiluMLP(first, last)


def _can_fuse(mlp: nn.Module) -> bool:
    """Return whether the module is on a GPU that Triton compiles for, with weights that are not quantized."""
    weights = list(mlp.parameters())
    quantized = any(isinstance(module, QuantizedLinear) for module in mlp.modules())
    return (
        not quantized
        and bool(weights)
        and all(w.is_cuda for w in weights)
        and importlib.util.find_spec("triton") is not None
    )


@torch.no_grad()
def _has_form(mlp: nn.Module) -> bool:
    """Return whether the module computes down(silu(gate(x)) * up(x)), by its parts and by a small example."""
    gate, up, down = (getattr(mlp, name, None) for name in (*_LAYERS, "down_proj"))
    activation = type(getattr(mlp, "act_fn", None)).__name__
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return False
    if not activation.startswith("SiLU") or gate.out_features != up.out_features:
        return False
    weight = gate.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, gate.in_features, generator=generator).to(weight.device, weight.dtype)
    want: Tensor = mlp(x)
    got: Tensor = down(nn.functional.silu(gate(x)) * up(x))
    # The same operations: only a library's choice of another product could differ.
    unit = torch.finfo(weight.dtype).eps
    return torch.allclose(got, want, rtol=4 * unit, atol=4 * unit * float(want.abs().max()))
