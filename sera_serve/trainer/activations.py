"""Checkpointed activations: a block keeps its input alone, and the backward pass computes the rest again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration


@contextmanager
def checkpointed_activations(base: FrozenBase, enabled: bool) -> Iterator[None]:
    """Let the base's blocks checkpoint while they train, within the block.

    Raises:
        InvalidConfiguration: The architecture has no such blocks.
    """
    if not enabled:
        yield
        return
    if not _blocks(base.model) or not base.model.supports_gradient_checkpointing:
        raise InvalidConfiguration(
            f"base {base.name} has no blocks whose activations can be checkpointed; leave --checkpoint-activations out",
            param="checkpoint_activations",
        )
    # The other kind of checkpoint gives no gradients where a block's input needs none, as on a frozen base.
    _switch(base.model, "enable", {"use_reentrant": False})
    try:
        yield
    finally:
        _switch(base.model, "disable")
        mark_training(base.model, False)


def mark_training(model: nn.Module, mode: bool) -> None:
    """Switch the checkpointing of blocks that have it enabled. What is in the blocks stays in evaluation mode."""
    for block in _blocks(model):
        block.training = mode and bool(block.gradient_checkpointing)


def _switch(model: nn.Module, action: str, *arguments: Any) -> None:
    """Call the model's method. Old releases of transformers have the second name alone; 5.23 warns of it."""
    names = (f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}")
    getattr(model, next(name for name in names if hasattr(model, name)))(*arguments)


def _blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
