"""The training layer for several adapters: one frozen linear layer, and for each segment of tokens its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sera_serve.layers.attach import replace_module
from sera_serve.layers.block_update import (
    blocks_of_a,
    blocks_of_b,
    expand_into,
    expand_onto,
    outer_segments,
    reduce_segments,
)
from sera_serve.layers.sera_linear import SeraLinear
from sera_serve.layers.targets import linear_widths

Drawing = Callable[[int], AbstractContextManager[None]]
"""Gives a block in which the dropout of an adapter, by its key, draws its random numbers."""


def draw_as_ever(key: int) -> AbstractContextManager[None]:
    """Let dropout draw from torch's global generator."""
    return nullcontext()


@dataclass
class SegmentContext:
    """Which adapter each token of the current pass has.

    Attributes:
        segments: (key of the adapter, tokens) for each run of tokens, in the order of the tokens of the pass. Empty:
            the pass has no adapter.
        drawing: See `Drawing`.
    """

    segments: list[tuple[int, int]] = field(default_factory=list)
    drawing: Drawing = draw_as_ever


class MultiLinear(nn.Module):
    """h = base(x), and for the tokens of each segment h += scaling * ((x A) C) B with the factors of its adapter.

    The factors belong to `SeraLinear` layers elsewhere. They are no parameters of this module, and gradients go to
    them. Each token is computed from itself alone, so an adapter's tokens do not depend on the tokens of others.
    """

    def __init__(self, base: nn.Module, context: SegmentContext) -> None:
        """Wrap `base`, a linear layer whose parameters are frozen."""
        super().__init__()
        self.base = base
        self.d_in, self.d_out = linear_widths(base)
        self.context = context
        # A plain dictionary: the factors are trained by their own models.
        self.adapters: dict[int, SeraLinear] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out). The leading axes hold the tokens of `context.segments`, in their order.

        Raises:
            ValueError: The segments have another number of tokens than x.
        """
        h: Tensor = self.base(x)
        segments = self.context.segments
        if not any(key in self.adapters for key, _ in segments):
            return h
        counts = [tokens for _, tokens in segments]
        if sum(counts) != x.numel() // self.d_in:
            raise ValueError(f"the segments have {sum(counts)} tokens, and the input has {x.numel() // self.d_in}")
        parts, factors, end = [], [], 0
        for key, tokens in segments:
            end += tokens
            if key in self.adapters:
                layer = self.adapters[key]
                parts.append(_Part(slice(end - tokens, end), layer.config.split, layer.config.scaling))
                factors += [layer.sera_a, layer.sera_c, layer.sera_b]
        result: Tensor = cast(Any, _AddUpdates).apply(h, self._dropped(x, segments, counts), parts, *factors)
        return result

    def _dropped(self, x: Tensor, segments: list[tuple[int, int]], counts: list[int]) -> Tensor:
        """The input of the adapters: x, with the dropout of those that have one."""
        keys = [key for key, _ in segments]
        if not any(_drops(self.adapters.get(key)) for key in keys):
            return x
        return torch.cat(
            [self._drop(key, part) for key, part in zip(keys, x.reshape(-1, self.d_in).split(counts), strict=True)]
        )

    def _drop(self, key: int, x: Tensor) -> Tensor:
        layer = self.adapters.get(key)
        if layer is None or not _drops(layer):
            return x
        with self.context.drawing(key):
            dropped: Tensor = layer.dropout(x)
        return dropped


def _drops(layer: SeraLinear | None) -> bool:
    return layer is not None and isinstance(layer.dropout, nn.Dropout) and layer.dropout.training


@dataclass(frozen=True)
class _Part:
    """The tokens of one adapter in a pass, and what its factors do not say."""

    tokens: slice
    split: int
    scaling: float


class _AddUpdates(torch.autograd.Function):
    """`block_update.add_update` for each adapter's own tokens: T tokens in all."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, parts: list[_Part], *factors: Tensor | None) -> Tensor:
        rows_h, rows_x = h.view(-1, h.shape[-1]), x.reshape(-1, x.shape[-1])
        reduced = []
        for part, (a, c, b) in zip(parts, _triples(factors), strict=True):
            assert a is not None and b is not None
            u = reduce_segments(rows_x[part.tokens].to(a.dtype), blocks_of_a(a, part.split))
            reduced.append(u)
            expand_onto(rows_h[part.tokens], u if c is None else u @ c, blocks_of_b(b, part.split), part.scaling)
        # The factors come after h, x and the parts.
        needs_x = any(ctx.needs_input_grad[3::3])
        ctx.save_for_backward(x if needs_x else None, *reduced, *factors)
        ctx.parts, ctx.x_shape, ctx.x_dtype = parts, x.shape, x.dtype
        ctx.mark_dirty(h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        parts = ctx.parts
        x, *saved = ctx.saved_tensors
        reduced, triples = saved[: len(parts)], _triples(saved[len(parts) :])
        needs = ctx.needs_input_grad
        rows_g = g.reshape(-1, g.shape[-1])
        # Tokens without an adapter get no gradient from here.
        dx = torch.zeros(ctx.x_shape, dtype=ctx.x_dtype, device=g.device) if needs[1] else None
        gradients: list[Tensor | None] = []
        for number, (part, u, (a, c, b)) in enumerate(zip(parts, reduced, triples, strict=True)):
            needs_a, needs_c, needs_b = needs[3 + 3 * number : 6 + 3 * number]
            own = rows_g[part.tokens].to(b.dtype)
            da = dc = db = None
            if needs_b:
                v = u if c is None else u @ c
                db = outer_segments(own, v, part.split).permute(2, 0, 1).reshape(b.shape).mul_(part.scaling)
            if dx is not None or needs_a or needs_c:
                dv = reduce_segments(own, blocks_of_b(b, part.split)).mul_(part.scaling)
                dc = u.T @ dv if needs_c else None
                du = dv if c is None else dv @ c.T
                if needs_a:
                    rows = x.reshape(-1, x.shape[-1])[part.tokens].to(a.dtype)
                    da = outer_segments(rows, du, part.split).reshape(a.shape)
                if dx is not None:
                    expanded = du.new_empty(len(du), dx.shape[-1])
                    expand_into(expanded, du, blocks_of_a(a, part.split))
                    dx.view(-1, dx.shape[-1])[part.tokens] = expanded
            gradients += [da, dc, db]
        return g, dx, None, *gradients


def _triples(factors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(factors[::3], factors[1::3], factors[2::3], strict=True))


class MultiAttachment:
    """The adapters that a model object with `MultiLinear` layers has at the moment."""

    def __init__(self, model: nn.Module, drawing: Drawing = draw_as_ever) -> None:
        """Use `model`, a base model that nothing else wraps; for `drawing` see `SegmentContext`."""
        self.context = SegmentContext(drawing=drawing)
        self._model = model
        self._layers: dict[str, MultiLinear] = {}

    def set_adapter(self, key: int, layers: Mapping[str, SeraLinear]) -> None:
        """Let segments with this key use these layers, by the dotted path of the linear layer that each adapts."""
        for path in layers.keys() - self._layers.keys():
            wrapped = MultiLinear(self._model.get_submodule(path), self.context)
            replace_module(self._model, path, wrapped)
            self._layers[path] = wrapped
        for path, wrapped in self._layers.items():
            if path in layers:
                wrapped.adapters[key] = layers[path]
            else:
                wrapped.adapters.pop(key, None)

    def remove_adapter(self, key: int) -> None:
        """Forget the layers of a key."""
        self.set_adapter(key, {})
