"""One forward pass over rows of one kind: texts or images, each row with the adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters_store import AdapterConfig
from sera_kernels import NO_ADAPTER, AdapterBatch, ShapeClasses
from sera_serve.base import FrozenBase, ModelInputs, Pooling, pool_image_states, pool_states
from sera_serve.layers import AdapterContext


@dataclass(frozen=True)
class PassStates:
    """What a pass gives.

    Attributes:
        states: The last states (rows, tokens, hidden). Of texts on a dual base there are none, and it has no rows.
        mask: int64 (rows, tokens), 1 at real tokens; an image has no others.
        prefix_tokens: Of images, the tokens before those of the patches; None for texts.
        projected: Of a dual base, the vector of each row in the space of both towers (rows, embedding size).
    """

    states: Tensor
    mask: Tensor
    prefix_tokens: int | None
    projected: Tensor | None
    _by_pooling: dict[Pooling, Tensor] = field(default_factory=dict, init=False, repr=False)

    def for_head(self, config: AdapterConfig, default_pooling: Pooling) -> Tensor:
        """What an adapter's head reads: pooled states (rows, hidden), or all of them (rows, tokens, hidden) to tag."""
        if config.task == "token-classify":
            return self.states
        return self._pooled(config.pooling or default_pooling)

    def embedded(self, pooling: Pooling) -> Tensor:
        """The vector of each row (rows, embedding size); a dual base has its own pooling."""
        return self._pooled(pooling) if self.projected is None else self.projected

    def _pooled(self, pooling: Pooling) -> Tensor:
        # All rows, once: adapters take slices, which copy nothing and bring no indices to the device.
        if pooling not in self._by_pooling:
            self._by_pooling[pooling] = (
                pool_states(self.states, self.mask, pooling)
                if self.prefix_tokens is None
                else pool_image_states(self.states, pooling, self.prefix_tokens)
            )
        return self._by_pooling[pooling]


def run_pass(
    base: FrozenBase,
    context: AdapterContext,
    rows: Sequence[ModelInputs],
    slots: Sequence[int],
    classes: ShapeClasses,
    embeds: bool,
) -> PassStates:
    """Run rows of one kind through the base with serving layers.

    Args:
        base: With serving layers attached.
        context: The serving layers' context.
        rows: All texts, or all images.
        slots: The slot of each row's adapter, or `NO_ADAPTER`.
        classes: The kinds of shapes of the adapters.
        embeds: Whether any row is to become a vector: a dual base projects only then.
    """
    row_slots = torch.tensor(slots, dtype=torch.int32).to(base.device, non_blocking=True)
    inputs = base.pad(rows) if rows[0].pixels is None else {"pixel_values": base.pad_images(rows)}
    return compute_pass(base, context, inputs, row_slots, classes, embeds)


def compute_pass(
    base: FrozenBase,
    context: AdapterContext,
    inputs: Mapping[str, Tensor],
    row_slots: Tensor,
    classes: ShapeClasses,
    embeds: bool,
) -> PassStates:
    """`run_pass` for what is on the device already. Python decides nothing here by what a tensor contains.

    Args:
        base: As in `run_pass`, as all that is not named here.
        context: Likewise.
        inputs: What `FrozenBase.pad` gives, or `pixel_values`, what `FrozenBase.pad_images` gives.
        row_slots: int32 (rows,).
        classes: As in `run_pass`.
        embeds: Likewise.
    """
    if "pixel_values" in inputs:
        return _compute_images(base, context, inputs["pixel_values"], row_slots, classes, embeds)
    mask = inputs["attention_mask"]
    token_slots = torch.where(mask.bool(), row_slots.unsqueeze(1), NO_ADAPTER).flatten().to(torch.int32)
    if base.kind == "dual":
        with context.run(AdapterBatch(token_slots, classes)):
            end_states = base.text_pooled(inputs["input_ids"], mask)
        with context.run(AdapterBatch(row_slots, classes)):
            projected = base.project_text(end_states)
        return PassStates(end_states.new_empty(0, 0, 0), mask, None, projected)
    with context.run(AdapterBatch(token_slots, classes)):
        states = base.hidden_states(**inputs)
    return PassStates(states, mask, None, None)


def _compute_images(
    base: FrozenBase, context: AdapterContext, pixels: Tensor, row_slots: Tensor, classes: ShapeClasses, embeds: bool
) -> PassStates:
    tower = base.image_tower
    assert tower is not None
    with context.run(AdapterBatch(row_slots.repeat_interleave(tower.tokens), classes)):
        states = base.image_states(pixels)
    mask = torch.ones(states.shape[:2], dtype=torch.int64, device=base.device)
    projected = None
    if base.kind == "dual" and embeds:
        # The projection reads one token a row.
        with context.run(AdapterBatch(row_slots, classes)):
            projected = base.project_image(states[:, 0])
    return PassStates(states, mask, tower.prefix_tokens, projected)
