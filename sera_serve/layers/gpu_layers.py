"""Cheaper forms of a base model's own layers on a GPU: fewer kernels for the same numbers.

A decode step reads every weight once, and does little else. What keeps it from the speed of the memory is the number of
its kernels: each takes a microsecond or more, whatever it computes.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sera_serve.layers.attach import replace_module

# Of bfloat16, the coarsest dtype that is served: rounding at another place is a difference of one unit.
_TOLERANCE = 2**-7


class JoinedProducts:
    """Linear layers that read the same input, computed as one product.

    The weights become one tensor, and the layers' own weights views of it: no memory is used twice.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Join the layers, in place."""
        self._weight = _joined([layer.get_parameter("weight") for layer in layers])
        has_bias = layers[0].bias is not None
        self._bias = _joined([layer.get_parameter("bias") for layer in layers]) if has_bias else None
        self._widths = [layer.out_features for layer in layers]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Map (..., d_in) to one (..., d_out) for each layer: views of one tensor, whose rows are not adjacent."""
        return list(functional.linear(x, self._weight, self._bias).split(self._widths, dim=-1))


def join_products(layers: Sequence[nn.Module]) -> JoinedProducts | None:
    """Join layers if there are several, on a GPU, plain and alike but in width; else return None."""
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    if len(linears) < 2 or len(linears) < len(layers):
        return None
    kinds = {(linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in linears}
    if len(kinds) > 1 or linears[0].weight.device.type != "cuda":
        return None
    return JoinedProducts(linears)


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of the parts, one after the other along the first axis. The parts become views of it."""
    first = parts[0].data
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            break
        end += part.nbytes
    else:
        # Joined already, by another model object over the same weights.
        size = (sum(len(part) for part in parts), *first.shape[1:])
        if end <= first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
            return first.as_strided(size, first.stride())
    joined = torch.cat([part.data for part in parts])
    for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = view
    return joined


class OneKernelNorm(nn.RMSNorm):
    """A root-mean-square norm of one kernel."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        """Use this very weight (width,)."""
        super().__init__([weight.numel()], eps, device="meta")
        self.weight = weight
        self._kernel = _norm_kernel(weight.numel()) if weight.is_cuda else None
        self._known: tuple[Tensor, Tensor] | None = None

    def offer(self, x: Tensor, normed: Tensor) -> None:
        """Take `normed` as the result for `x`, which is the very next input if the model is as it was found."""
        self._known = x, normed

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        known, self._known = self._known, None
        if known is not None and known[0] is x:
            return known[1]
        if self._kernel is not None and x.is_contiguous() and x.dtype == self.weight.dtype:
            assert self.eps is not None
            return self._kernel(x, self.weight, self.eps)
        return super().forward(x)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Replace root-mean-square norms by those of one kernel, in place; every other norm is left as it is.

    Architectures have classes of their own for the same norm, of six kernels. Whether a class computes what torch does
    is found out by computing both.
    """
    fits: dict[type, bool] = {}
    for path, norm in list(model.named_modules()):
        weight, eps = getattr(norm, "weight", None), _epsilon(norm)
        if not type(norm).__name__.endswith("RMSNorm") or isinstance(norm, nn.RMSNorm) or eps is None:
            continue
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            continue
        if type(norm) not in fits:
            fits[type(norm)] = _is_plain(norm, eps)
        if fits[type(norm)]:
            replace_module(model, path, OneKernelNorm(weight, eps).eval())


def _norm_kernel(width: int) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    # Imported here, because a CPU needs no Triton.
    from sera_kernels.norm import LARGEST_WIDTH, rms_norm

    return rms_norm if width <= LARGEST_WIDTH else None


def _epsilon(norm: nn.Module) -> float | None:
    values = [getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)]
    return float(values[0]) if len(values) == 1 and isinstance(values[0], float) else None


def _is_plain(norm: nn.Module, eps: float) -> bool:
    """Whether a norm is x / sqrt(mean(x^2) + eps) * weight."""
    probe: Callable[[Tensor], Tensor] = copy.deepcopy(norm)
    weight: Tensor = probe.weight  # type: ignore[attr-defined]
    generator = torch.Generator(weight.device).manual_seed(0)
    weight.normal_(generator=generator)
    # The second input is small enough for eps to count.
    x = torch.randn(2, len(weight), device=weight.device, generator=generator)
    x = (x * torch.tensor([[1.0], [eps**0.5]], device=weight.device)).to(weight.dtype)
    want = functional.rms_norm(x, (len(weight),), weight, eps)
    return bool(((probe(x) - want).abs() <= _TOLERANCE * want.abs()).all())
