"""MLPs of the form down(silu(gate(x)) * up(x)), as in Llama: updates and activation in one pass, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def fuse_silu_mlp(mlp: nn.Module, group: SharedInputGroup) -> None:
    """Replace the forward function of an MLP that `find_silu_mlp` found.

    Args:
        mlp: The module. Its layers are served already.
        group: The group of its two first layers.
    """
    # Imported here, because the import of Triton takes as long as the rest of a small server's start.
    from sera_kernels.triton_path import silu_mul_updates

    own: Callable[[Tensor], Tensor] = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if group.context.batch is None:
            return own(x)
        (gate, up), workspace = group.phases(x)
        hidden = silu_mul_updates(workspace, gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1]))
        result: Tensor = mlp.get_submodule("down_proj")(hidden.view(*x.shape[:-1], -1))
        return result

    mlp.forward = forward


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
