"""Running a Hugging Face decoder over the paged pool. The only file of the engine that imports its models' classes.

It stands on public interfaces of transformers alone: the registries of attention functions and of masks, a cache object
with `update`, and the arguments for the cache, `position_ids` and `logits_to_keep` of a forward pass.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from sera_kernels import AdapterBatch
from sera_serve.base import RotaryContext
from sera_serve.engine.loop.attention import KeyValuePool, LayerShape, StepContext, attend, running, step_under_way
from sera_serve.engine.loop.attention_backend import AttentionOptions
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import AdapterContext

_NAME = "sera_paged"
# Arguments that models hand to attention functions and that change nothing here: evaluation has no dropout, and
# positions are in the queries and keys already.
_WITHOUT_EFFECT = {"dropout", "position_ids", "cache_position", "use_cache", "is_causal", "logits_to_keep"}
_WITHOUT_EFFECT |= {
    "cache",
    "position_embeddings",
    "past_key_values",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
# Layers whose mask is causal, or causal within a window that the attention function is told.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class _PagedCache(Cache):  # type: ignore[misc]
    """Hands a step's keys and values to the pool as the layers compute them."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Take (1, kv_heads, tokens, width) and return it as it is: attention finds the rest in the pool."""
        step = step_under_way()
        step.pool.write(layer_idx, step.places, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states


class _ShapeProbe(Cache):  # type: ignore[misc]
    """Learns the shapes of each layer's keys and values from one small pass."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Note the shapes."""
        self.shapes[layer_idx] = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states


class PagedModel:
    """A decoder whose attention runs over the paged pool; for a model object that one loop alone runs.

    Attributes:
        shapes: Of each layer's keys and values.
        vocabulary: The number of logits.
        logits_dtype: Theirs, which some models choose wider than their weights'.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Switch the model's attention.

        Raises:
            InvalidConfiguration: The architecture cannot be served this way; the message says why.
        """
        _refuse_other_masks(model)
        self.model = model
        self._cache = {cache_argument(model): _PagedCache()}
        self.shapes, logits = _probed(model)
        self.vocabulary, self.logits_dtype = logits.shape[-1], logits.dtype
        AttentionInterface.register(_NAME, _paged_attention)
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
        model.set_attn_implementation(_NAME)
        # The eager experts of a mixture read the device to learn which tokens each expert has.
        if getattr(model.config.get_text_config(), "num_local_experts", None):
            model.set_experts_implementation("grouped_mm")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations, keys and values."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def layer_bytes(self) -> list[int]:
        """Keys and values of one token in each layer."""
        return [shape.kv_heads * (shape.key_width + shape.value_width) * self.dtype.itemsize for shape in self.shapes]

    def logits(self, ids: Tensor, positions: Tensor, step: StepContext, keep: Tensor | int) -> Tensor:
        """Run the step's packed tokens.

        Args:
            ids: int64 (1, tokens).
            positions: int64 (1, tokens), of each token in its sequence.
            step: Where keys and values go, and which each token sees.
            keep: int64 index of the tokens whose logits are wanted, or 0 for all.

        Returns:
            (kept tokens, vocabulary), of `logits_dtype`.
        """
        with running(step):
            output = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **self._cache,
            )
        logits: Tensor = output.logits
        return logits[0]


@dataclass(frozen=True)
class ServedDecoder:
    """What every step of generation runs on.

    Attributes:
        model: The decoder.
        context: The context of its serving layers.
        pool: Keys and values.
        rotary: Where a base with a rotary threshold reads which tokens of a step are beyond it.
    """

    model: PagedModel
    context: AdapterContext
    pool: KeyValuePool
    rotary: RotaryContext | None = None

    def logits(
        self,
        ids: Tensor,
        positions: Tensor,
        step: StepContext,
        keep: Tensor | int,
        adapters: AdapterBatch | None,
        long_tokens: Tensor | None,
    ) -> Tensor:
        """`PagedModel.logits` of int64 (tokens,) ids and positions, under each token's adapter.

        Args:
            ids: Of the step's tokens.
            positions: Of each token in its sequence.
            step: As in `PagedModel.logits`, like `keep`.
            keep: Likewise.
            adapters: None is the base model alone.
            long_tokens: As in `RotaryContext`; read where there is one.
        """
        if self.rotary is not None:
            self.rotary.long_tokens = long_tokens
        with self.context.run(adapters):
            return self.model.logits(ids[None], positions[None], step, keep)


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered function: (1, heads, tokens, width) to (1, tokens, heads, width)."""
    unknown = {name for name, argument in others.items() if argument is not None} - _WITHOUT_EFFECT
    if others.get("is_causal") is False:
        unknown.add("is_causal=False")
    if unknown:
        raise InvalidConfiguration(
            f"attention of {type(module).__name__} takes {', '.join(sorted(unknown))}, which generation does not "
            "serve; choose another base",
            param="base",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = attend(step_under_way(), layer, q, k, v, AttentionOptions(scale, sliding_window, softcap, s_aux))
    return out[None], None


def _refuse_other_masks(model: PreTrainedModel) -> None:
    """Refuse masks that the attention function is not told of, because the model's own masks are never made."""
    config = model.config.get_text_config()
    problems = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if not getattr(config, "is_causal", True) or any(getattr(m, "is_causal", None) is False for m in model.modules()):
        problems.append("attention that is not causal")
    if problems:
        raise InvalidConfiguration(
            f"{type(model).__name__} has {', '.join(problems)}, which generation does not serve; choose another base",
            param="base",
        )


def cache_argument(model: PreTrainedModel) -> str:
    """Name of a forward pass's argument for the cache: `cache` from transformers 5.24 on, before `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def _probed(model: PreTrainedModel) -> tuple[list[LayerShape], Tensor]:
    """Shapes of every layer, and the logits of one token, by a pass over it.

    Configurations name them differently, or not at all.
    """
    probe = _ShapeProbe()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    output = model(input_ids=ids, position_ids=ids, use_cache=True, **{cache_argument(model): probe})
    if sorted(probe.shapes) != list(range(len(probe.shapes))):
        raise InvalidConfiguration(
            f"{type(model).__name__} does not keep keys and values in every layer; choose another base", param="base"
        )
    return [probe.shapes[layer] for layer in range(len(probe.shapes))], output.logits
