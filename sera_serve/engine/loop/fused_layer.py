"""Decoder layers of the common form: sums, norms and the updates before them in one kernel on a GPU.

The form: hidden = x + attention(norm(x)), then hidden + mlp(norm(hidden)). As with attention layers, each layer is
computed both ways on a real pass, and keeps its own way unless the results agree.

The sum at a layer's end is normalized by the next layer, or by the model's last norm. A fused layer computes that norm
too, and offers it to the module, which takes it if it is asked for the very tensor that the layer returned.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sera_serve.engine.loop.attention import KeyValuePool
from sera_serve.engine.loop.attention_backend import AttentionBackend
from sera_serve.engine.loop.fused_attention import FusedAttention, ProbedCall, gives_the_same, probed_calls
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.layers.gpu_layers import OneKernelNorm
from sera_serve.layers.served_mlp import FusedSiluMLP

logger = logging.getLogger("sera_serve.engine")

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

AddNorm = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]
"""`sera_kernels.norm.add_norm`."""


class FusedLayer:
    """The forward function of one decoder layer, in place of its own."""

    def __init__(
        self, attention: FusedAttention, mlp: FusedSiluMLP, norms: tuple[OneKernelNorm, ...], add_norm: AddNorm
    ) -> None:
        """Take the place of a layer's forward function.

        Args:
            attention: The layer's.
            mlp: The layer's.
            norms: Before the attention, before the MLP, and of the result.
            add_norm: The kernel.
        """
        self._attention, self._mlp = attention, mlp
        self._before, self._between, self._next = norms
        self._add_norm = add_norm

    def __call__(
        self, hidden_states: Tensor, *args: Any, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> Tensor:
        """Map (1, tokens, hidden) to the same; the other arguments have no effect in a step."""
        assert position_embeddings is not None
        y, update = self._attention.computed(self._before(hidden_states), position_embeddings)
        hidden, normed = self._sum(hidden_states, y, self._between, update)
        y, update = self._mlp.computed(normed)
        hidden, normed = self._sum(hidden, y, self._next, update)
        self._next.offer(hidden, normed)
        return hidden

    def _sum(self, x: Tensor, y: Tensor, norm: OneKernelNorm, update: Tensor | None) -> tuple[Tensor, Tensor]:
        assert norm.eps is not None
        hidden, normed = self._add_norm(x[0], y[0], norm.weight, norm.eps, update)
        return hidden[None], normed[None]


@torch.inference_mode()
def fuse_layers(paged: PagedModel, backend: AttentionBackend, add_norm: AddNorm) -> int:
    """Give decoder layers of the common form a `FusedLayer`; returns how many have it.

    Args:
        paged: A model that one loop alone runs, with serving layers attached and attention fused.
        backend: What attends.
        add_norm: Adds and normalizes.
    """
    layers = [module for module in paged.model.modules() if _has_parts(module)]
    norms = [module for module in paged.model.modules() if isinstance(module, OneKernelNorm)]
    pool = KeyValuePool(paged.shapes, 1, paged.dtype, paged.device, backend)
    # By the identity of what each is given. `calls` keeps the outputs of layers alive.
    inputs: dict[int, nn.Module] = {}
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(lambda norm, args: inputs.update({id(args[0]): norm})))
        calls = probed_calls(paged, pool, layers, lambda output: output)
    fused = 0
    for layer, call in calls.items():
        following = inputs.get(id(call.output))
        if not isinstance(following, OneKernelNorm) or following.weight.shape[0] != call.output.shape[-1]:
            continue
        before, attention, between, mlp = (layer.get_submodule(name) for name in _PARTS)
        mine = FusedLayer(attention.forward, mlp.forward, (before, between, following), add_norm)  # type: ignore[arg-type]
        if _agree(mine, following, call, pool):
            layer.forward = mine
            fused += 1
    logger.info("%d of %d layers add and normalize in one kernel", fused, len(paged.shapes))
    return fused


def _has_parts(layer: nn.Module) -> bool:
    """Return whether a layer's parts are those of the form, fused already."""
    if not all(hasattr(layer, name) for name in _PARTS):
        return False
    norms = [layer.get_submodule(name) for name in (_PARTS[0], _PARTS[2])]
    forwards = [layer.get_submodule(name).forward for name in (_PARTS[1], _PARTS[3])]
    return (
        all(isinstance(norm, OneKernelNorm) for norm in norms)
        and isinstance(forwards[0], FusedAttention)
        and isinstance(forwards[1], FusedSiluMLP)
        and "position_embeddings" in inspect.signature(layer.forward).parameters
    )


def _agree(mine: FusedLayer, following: OneKernelNorm, call: ProbedCall, pool: KeyValuePool) -> bool:
    """Whether both ways give the same output, and the same norm of it."""

    def fused() -> list[Tensor]:
        output = mine(call.hidden_states, position_embeddings=call.position_embeddings)
        return [output, following(output)]

    return gives_the_same(fused, [call.output, following(call.output)], pool)
