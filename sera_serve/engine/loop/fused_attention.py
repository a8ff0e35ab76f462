"""Attention layers of the common form, with updates, rotation and the write to the cache as one kernel on a GPU.

The form: q, k and v are products of the same states; q and k may be normalized by head; they are rotated; the output is
a product of what attention gives. Whether a layer has it is not read off its class, of which there are hundreds. Each
layer is computed both ways on a real pass, and keeps its own way unless the results agree.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext, attend, running, step_under_way
from sera_serve.engine.loop.attention_backend import AttentionBackend, AttentionOptions, RowKeys
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.layers.served_linear import ServedLinear, SharedInputGroup

logger = logging.getLogger("sera_serve.engine")

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx")
_PROBED_TOKENS = 5
# Of the norm of a layer's output. Half precision rounds at other places.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Rotate = Callable[..., tuple[Tensor, Tensor]]
"""`sera_kernels.rotary.rotate_and_write`."""


class FusedAttention:
    """The forward function of one attention layer, in place of its own."""

    def __init__(self, layer: nn.Module, key_width: int, value_width: int, options: AttentionOptions, rotate: Rotate):
        """Take the place of `layer.forward`, whose attention has these options."""
        self._project = [layer.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
        self._output = layer.get_submodule("o_proj")
        self._first, self._last = _group_of(self._project), _group_of([self._output])
        self._norms = (getattr(layer, "q_norm", None), getattr(layer, "k_norm", None))
        self._index: int = layer.layer_idx  # type: ignore[assignment]
        self._widths = (key_width, key_width, value_width)
        self._options = options
        self._rotate = rotate

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Map (1, tokens, hidden) to the same; the other arguments have no effect in a step."""
        assert position_embeddings is not None
        y, update = self.computed(hidden_states, position_embeddings)
        return y if update is None else y + update, None

    def computed(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and what is still to be added to it, (tokens, hidden); or None if it is complete."""
        step = step_under_way()
        states, updates = _computed(self._project, self._first, hidden_states)
        if updates is not None and any(norm is not None for norm in self._norms):
            states, updates = [y + update for y, update in zip(states, updates, strict=True)], None
        q, k, v = (each[0].unflatten(-1, (-1, width)) for each, width in zip(states, self._widths, strict=True))
        q, k = (each if norm is None else norm(each) for norm, each in zip(self._norms, (q, k), strict=True))
        cos, sin = (table.reshape(-1, table.shape[-1]) for table in position_embeddings)
        keys, values = step.pool.keys[self._index], step.pool.values[self._index]
        q, k = self._rotate(q, k, v, cos, sin, keys, values, step.places, updates)
        out = attend(step, self._index, q, k, v, self._options)
        (y,), updates = _computed([self._output], self._last, out.flatten(1)[None])
        return y, None if updates is None else updates[0]


def _group_of(layers: Sequence[nn.Module]) -> SharedInputGroup | None:
    """Return the group whose layers these are, all of them and in order; or None."""
    group = layers[0].group if isinstance(layers[0], ServedLinear) else None
    return group if group is not None and group.holds(layers) else None


def _computed(
    layers: Sequence[nn.Module], group: SharedInputGroup | None, x: Tensor
) -> tuple[list[Tensor], list[Tensor] | None]:
    """As `SharedInputGroup.computed`, also for layers that are not one group."""
    return ([layer(x) for layer in layers], None) if group is None else group.computed(x)


@dataclass
class ProbedCall:
    """What a layer was given in the probe, and gave."""

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    output: Tensor


class _NotingBackend:
    """Notes how each layer attends."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.has_paged_decode, self.reads_padding = backend.has_paged_decode, backend.reads_padding
        self.options: dict[int, AttentionOptions] = {}

    def write(self, pool: KeyValuePool, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        self._backend.write(pool, layer, places, keys, values)

    def decode(self, step: StepContext, layer: int, query: Tensor, keys: RowKeys, options: AttentionOptions) -> Tensor:
        return self._backend.decode(step, layer, query, keys, options)

    def packed(
        self, step: StepContext, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.options[layer] = options
        return self._backend.packed(step, layer, query, key, value, options)


@torch.inference_mode()
def fuse_attention(paged: PagedModel, backend: AttentionBackend, rotate: Rotate) -> int:
    """Give the attention layers of the common form a `FusedAttention`; returns how many have it.

    Args:
        paged: A model that one loop alone runs, with serving layers attached.
        backend: What attends.
        rotate: Rotates and writes.
    """
    layers = [layer for layer in paged.model.modules() if all(hasattr(layer, name) for name in _PARTS)]
    layers = [layer for layer in layers if "position_embeddings" in inspect.signature(layer.forward).parameters]
    noting = _NotingBackend(backend)
    pool = KeyValuePool(paged.shapes, 1, paged.dtype, paged.device, noting)
    fused = 0
    for layer, call in probed_calls(paged, pool, layers, lambda output: output[0].clone()).items():
        index: int = layer.layer_idx  # type: ignore[assignment]
        shape = paged.shapes[index]
        mine = FusedAttention(layer, shape.key_width, shape.value_width, noting.options[index], rotate)
        if _agree(mine, call, pool, index):
            layer.forward = mine
            fused += 1
    logger.info("%d of %d attention layers rotate and write in one kernel", fused, len(paged.shapes))
    return fused


def probed_calls(
    paged: PagedModel, pool: KeyValuePool, layers: Sequence[nn.Module], kept: Callable[[Any], Tensor]
) -> dict[nn.Module, ProbedCall]:
    """Run the model over a few tokens, and note what layers are given, and their outputs as `kept` takes them."""
    calls: dict[nn.Module, ProbedCall] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        calls[layer] = ProbedCall(given["hidden_states"], given["position_embeddings"], kept(output))

    ids = torch.arange(_PROBED_TOKENS, device=paged.device)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        paged.logits(ids[None], ids[None], _probe_step(pool), 0)
    return calls


def _probe_step(pool: KeyValuePool) -> StepContext:
    """A prompt of a few tokens, on the scratch page."""
    places = torch.arange(_PROBED_TOKENS, device=pool.keys[0].device)
    return StepContext(pool, places, [Part(_PROBED_TOKENS, np.array([_PROBED_TOKENS]))])


def _agree(mine: FusedAttention, call: ProbedCall, pool: KeyValuePool, index: int) -> bool:
    """Whether both ways give the same output, keys and values."""
    want = [call.output, pool.keys[index].clone(), pool.values[index].clone()]
    pool.keys[index].zero_()
    pool.values[index].zero_()

    def fused() -> list[Tensor]:
        output, _ = mine(call.hidden_states, call.position_embeddings)
        return [output, pool.keys[index], pool.values[index]]

    return gives_the_same(fused, want, pool)


def gives_the_same(fused: Callable[[], list[Tensor]], want: list[Tensor], pool: KeyValuePool) -> bool:
    """Whether a fused form gives these tensors in a step of the probe, but for rounding; False where it cannot run."""
    try:
        with running(_probe_step(pool)):
            got = fused()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        logger.debug("a layer keeps its own form: %s", error)
        return False
    tolerance = _TOLERANCE[pool.keys[0].dtype]
    return all(
        mine.shape == right.shape and bool((mine - right).norm() <= tolerance * right.norm())
        for mine, right in zip(got, want, strict=True)
    )
