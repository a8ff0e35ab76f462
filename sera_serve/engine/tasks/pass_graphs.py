"""Classification passes as CUDA graphs, by the number and length of their rows.

A short pass takes a GPU less time than Python takes to launch its operations, and meanwhile Python does not prepare
steps of generation. A graph is one launch. It is captured when the first pass of its size comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sera_kernels import NO_ADAPTER, ShapeClasses
from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.engine.loop.captures import FIRST_CLASSES, Captures, NotCaptured, least_covering
from sera_serve.engine.tasks.passes import PassStates, compute_pass
from sera_serve.layers import AdapterContext

# Of a pass with padding: beyond, a GPU is busy for about as long as the host. Llama-3-8B's takes some 20 us a token on
# an H200, and the host 26 to 50 ms a pass.
_MOST_TOKENS = 2048
# So many tokens of padding cost less than the launches that they spare.
_MOST_PADDING = 512
_SHORTEST = 16
# Each keeps some MB of the device's memory. There are some 80 sizes, each for all kinds of shapes that are served.
_MOST_GRAPHS = 512


@dataclass(frozen=True)
class PassKey:
    """What Python decides of a static pass.

    Attributes:
        rows: The most rows.
        length: The most tokens of a row; None for images, which have as many as the base makes of one.
        classes: The kinds of shapes that the rows' adapters may have; none in a pass of the base model alone.
        embeds: Whether a dual base projects.
        has_types: Whether tokens have segments.
    """

    rows: int
    length: int | None
    classes: ShapeClasses
    embeds: bool = False
    has_types: bool = False


class PassBuffers:
    """The inputs of a pass, on the host and on the device, and its results: one of each for passes of all sizes."""

    def __init__(self, base: FrozenBase, max_rows: int, max_tokens: int) -> None:
        """Allocate.

        Args:
            base: What runs.
            max_rows: The most rows of a pass.
            max_tokens: The most tokens of a pass, padding included.
        """
        sizes: dict[str, tuple[int, torch.dtype]] = {"slots": (max_rows, torch.int32)}
        if base.reads_text:
            names = ("input_ids", "attention_mask", "token_type_ids")
            sizes |= dict.fromkeys(names, (max_tokens, torch.int64))
        tower = base.image_tower
        if tower is not None:
            images = min(max_rows, max_tokens // tower.tokens)
            sizes["pixel_values"] = (images * 3 * tower.height * tower.width, base.dtype)
        on_gpu = base.device.type == "cuda"
        self.host = {name: torch.zeros(n, dtype=dtype, pin_memory=on_gpu) for name, (n, dtype) in sizes.items()}
        self.device = {name: torch.zeros_like(column, device=base.device) for name, column in self.host.items()}
        self.states = torch.zeros(max_tokens * base.hidden_size, dtype=base.dtype, device=base.device)
        projected = max_rows * base.embedding_size if base.kind == "dual" else 0
        self.projected = torch.zeros(projected, dtype=base.dtype, device=base.device)


class StaticPass:
    """The passes of one key. Rows of padding have one token, and no adapter.

    The host waits for a pass before it stages the next one.
    """

    def __init__(self, base: FrozenBase, context: AdapterContext, buffers: PassBuffers, key: PassKey) -> None:
        """Set up.

        Args:
            base: With serving layers attached.
            context: The serving layers' context.
            buffers: Large enough for the key; shared by all passes.
            key: What is fixed.
        """
        self._base, self._context, self._key = base, context, key
        shapes: dict[str, tuple[int, ...]] = {"slots": (key.rows,)}
        tower = base.image_tower
        if key.length is None:
            assert tower is not None
            shapes["pixel_values"] = (key.rows, 3, tower.height, tower.width)
            length = tower.tokens
        else:
            names = ["input_ids", "attention_mask", *(["token_type_ids"] if key.has_types else [])]
            shapes |= dict.fromkeys(names, (key.rows, key.length))
            length = key.length
        self._host = {name: _first(buffers.host[name], shape) for name, shape in shapes.items()}
        self._device = {name: _first(buffers.device[name], shape) for name, shape in shapes.items()}
        self._inputs = {name: column for name, column in self._device.items() if name != "slots"}
        # Of texts, a dual base gives nothing but vectors.
        is_dual, is_text = base.kind == "dual", key.length is not None
        self._states = _first(buffers.states, (0 if is_dual and is_text else key.rows, length, base.hidden_size))
        projects = is_dual and (is_text or key.embeds)
        self._projected = _first(buffers.projected, (key.rows, base.embedding_size)) if projects else None

    def stage(self, rows: Sequence[ModelInputs], slots: Sequence[int]) -> None:
        """Bring rows, at most as many and as long as the key's, and padding to the device."""
        host, key = self._host, self._key
        host["slots"].fill_(NO_ADAPTER)
        host["slots"][: len(rows)] = torch.tensor(slots, dtype=torch.int32)
        if key.length is None:
            host["pixel_values"].zero_()
            for place, row in enumerate(rows):
                assert row.pixels is not None
                host["pixel_values"][place] = torch.from_numpy(row.pixels)
        else:
            for name, column in self._base.pad(rows, torch.device("cpu"), (key.rows, key.length)).items():
                host[name].copy_(column)
            # A row without a token to see would be no number.
            host["attention_mask"][len(rows) :, 0] = 1
        for name, column in host.items():
            self._device[name].copy_(column, non_blocking=True)

    @torch.no_grad()
    def run(self) -> None:
        """Compute what was staged."""
        key = self._key
        found = compute_pass(self._base, self._context, self._inputs, self._device["slots"], key.classes, key.embeds)
        if self._states.numel():
            self._states.copy_(found.states)
        if self._projected is not None:
            assert found.projected is not None
            self._projected.copy_(found.projected)

    def outcome(self, rows: int, longest: int) -> PassStates:
        """What the last run gave, for the rows and tokens that were staged. The next run overwrites it."""
        states = self._states[:rows, :longest]
        projected = None if self._projected is None else self._projected[:rows]
        if self._key.length is None:
            assert self._base.image_tower is not None
            mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
            return PassStates(states, mask, self._base.image_tower.prefix_tokens, projected)
        return PassStates(states, self._inputs["attention_mask"][:rows, :longest], None, projected)


class PassGraphs:
    """The graphs of the passes of one model."""

    def __init__(self, base: FrozenBase, context: AdapterContext, max_rows: int, max_tokens: int) -> None:
        """Set up without capturing; see `PassBuffers`.

        Args:
            base: With serving layers attached, on a CUDA device.
            context: The serving layers' context.
            max_rows: The most rows of a pass.
            max_tokens: The most tokens of a pass, padding included. Some passes of fewer tokens have no graph.
        """
        self._base = base
        self._most_rows, self._most_tokens = max_rows, min(max_tokens, _MOST_TOKENS)
        buffers = PassBuffers(base, self._most_rows, self._most_tokens)
        self._classes = [FIRST_CLASSES, ShapeClasses()]
        self._captures: Captures[PassKey, StaticPass] = Captures(
            lambda key: _padding(StaticPass(base, context, buffers, key)), "a classification pass"
        )

    @property
    def keys(self) -> list[PassKey]:
        """What is captured by now."""
        return list(self._captures)

    def capture_first(self) -> None:
        """Capture the smallest pass of texts and that of images, as far as the base reads them.

        Raises:
            RuntimeError: The base's passes cannot be captured.
        """
        first = [ModelInputs.of([0])] if self._base.reads_text else []
        tower = self._base.image_tower
        if tower is not None:
            pixels = np.zeros((3, tower.height, tower.width), np.float32)
            first.append(ModelInputs.of(pixels=pixels, image_tokens=tower.tokens))
        for row in first:
            key = self._key([row], ShapeClasses(), embeds=False)
            if key is not None:
                self._captures.captured(key)

    def run(
        self, rows: Sequence[ModelInputs], slots: Sequence[int], classes: ShapeClasses, embeds: bool
    ) -> PassStates | None:
        """`run_pass` by a graph; None where there is none for such rows. The next call overwrites the result."""
        key = self._key(rows, classes, embeds)
        if key is None or not self._captures.can_run(lambda: key):
            return None
        try:
            static, graph = self._captures.get(key)
        except NotCaptured:
            return None
        if key.classes not in self._classes:
            self._classes.append(key.classes)
        static.stage(rows, slots)
        graph.replay()
        return static.outcome(len(rows), max(map(len, rows)))

    def _key(self, rows: Sequence[ModelInputs], classes: ShapeClasses, embeds: bool) -> PassKey | None:
        """The smallest pass that has room for these rows; None where they are to run without a graph."""
        count, longest = len(rows), max(map(len, rows))
        is_image = rows[0].is_image
        # Few images fill a pass.
        size = count if is_image else min(_size(count), self._most_rows)
        # A base may have no more positions than its longest text.
        length = longest if is_image else max(longest, min(_size(max(longest, _SHORTEST)), self._base.max_length))
        if size * length > self._most_tokens or size * length - count * longest > _MOST_PADDING:
            return None
        key = PassKey(
            rows=size,
            length=None if is_image else length,
            classes=least_covering(self._classes, classes),
            embeds=embeds and is_image and self._base.kind == "dual",
            has_types=any(row.token_type_ids for row in rows),
        )
        return key if key in self._captures or len(self._captures) < _MOST_GRAPHS else None


def _size(least: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below."""
    power = 1 << (least - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= least else power


def _first(column: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a column, in a shape."""
    return column[: math.prod(shape)].view(shape)


def _padding(static: StaticPass) -> StaticPass:
    static.stage([], [])
    return static
