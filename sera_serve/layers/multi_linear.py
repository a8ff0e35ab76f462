"""The training layer for several adapters: one frozen linear layer, and for each segment of tokens its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sera_serve.layers.attach import replace_module
from sera_serve.layers.block_update import Part, add_updates
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
        parts: list[Part] = []
        factors: list[Tensor | None] = []
        end = 0
        for key, tokens in segments:
            end += tokens
            if key in self.adapters:
                layer = self.adapters[key]
                parts.append(Part(end - tokens, end, layer.config.split, layer.config.scaling))
                factors += [layer.sera_a, layer.sera_c, layer.sera_b]
        return add_updates(h, self._dropped(x, segments, counts), parts, factors)

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


class MultiAttachment:
    """The adapters that a model object with `MultiLinear` layers has at the moment."""

    def __init__(self, model: nn.Module, drawing: Drawing = draw_as_ever) -> None:
        """Use `model`, a base model that nothing else wraps; for `drawing` see `SegmentContext`."""
        self.context = SegmentContext(drawing=drawing)
        self._model = model
        self._layers: dict[str, MultiLinear] = {}

    def set_adapter(self, key: int, layers: Mapping[str, SeraLinear]) -> None:
        """Let segments with this key use these layers, by the dotted path of the linear layer that each adapts.

        Without layers, the key is forgotten.
        """
        for path in layers.keys() - self._layers.keys():
            wrapped = MultiLinear(self._model.get_submodule(path), self.context)
            replace_module(self._model, path, wrapped)
            self._layers[path] = wrapped
        for path, wrapped in self._layers.items():
            if path in layers:
                wrapped.adapters[key] = layers[path]
            else:
                wrapped.adapters.pop(key, None)
