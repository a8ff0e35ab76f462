"""Rotary frequencies by sequence, for bases whose rotary scaling looks at the whole batch.

transformers picks the frequencies of the scaling types `longrope` and `dynamic` from the largest position in a batch:

- `longrope` (Phi-3, Phi-3.5, Phi-4-mini) has two sets of factors. A batch with a position at or beyond
  `original_max_position_embeddings`, the threshold, uses the long set for every token, else the short set. PhiMoE picks
  its attention factor (`long_mscale` or `short_mscale`) in the same way.
- `dynamic` computes the frequencies anew from the largest position, once that position is beyond
  `max_position_embeddings`. Up to that length it never changes them.

In a batch of several sequences, one long sequence would so change the output of all others. Here a sequence gets what
it gets alone. With `longrope`, a sequence of n tokens is on the long side if n > threshold, with all of its tokens:
`Phi3ForCausalLM.generate` drops the cached keys and values when a sequence crosses the threshold, and computes them
again with the long set. `PerSequenceRotary` selects by token, and `RotaryContext` says which tokens are on the long
side. With `dynamic`, the base is served up to the length at which scaling would begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sera_serve.errors import InvalidConfiguration

SHORT, LONG = 0, 1


@dataclass(frozen=True)
class RotaryScaling:
    """How the rotary frequencies of a base depend on the length of a sequence.

    Attributes:
        kind: `fixed` if they do not depend on it; else `longrope` or `dynamic`.
        threshold: The most tokens of a sequence for which the original frequencies hold. None if `fixed`.
    """

    kind: Literal["fixed", "longrope", "dynamic"]
    threshold: int | None = None

    def side(self, length: int) -> int:
        """Return the side of a sequence of `length` tokens: `LONG` for longrope beyond the threshold, else `SHORT`.

        Keys and values of one side are invalid on the other side. A sequence that grows from the threshold to one more
        token must be computed again from its first token.
        """
        return LONG if self.kind == "longrope" and self.threshold is not None and length > self.threshold else SHORT


class RotaryContext:
    """Says which tokens of the next forward pass belong to sequences on the long side. Owned by one model object.

    Attributes:
        threshold: The most tokens of a sequence on the short side.
        long_tokens: bool on the model's device, of shape (tokens,) for a packed batch of one row, or (rows, length).
            With None, each row of `position_ids` decides for itself: it is long if its largest position is at or
            beyond the threshold. So None is right for a packed batch without long sequences.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.long_tokens: Tensor | None = None


class PerSequenceRotary(nn.Module):
    """Runs a longrope module for both sides, and selects by token.

    Semantics: result[t] = stock(positions)[t] as if every sequence in the batch were on the side of t's sequence.
    The stock module runs twice. In the short run every position is limited to the last one below the threshold; only
    long tokens and padding have larger positions. The long run sees one more position, the threshold, and its result is
    cut off.
    No operation here reads the device. (PhiMoE's own module does.)

    Attributes:
        rotary: The stock module.
        context: Says which tokens are on the long side.
    """

    def __init__(self, rotary: nn.Module, context: RotaryContext) -> None:
        super().__init__()
        self.rotary = rotary
        self.context = context

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return what the stock module returns: tensors (rows, length, ...), such as cos and sin.

        Args:
            x: Gives the dtype and device of the result.
            position_ids: int64 (rows, length), or (1, length) for positions that all rows share.
            layer_type: Passed on to a stock module that has one set of frequencies for each type of layer.
        """
        options = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rotary.rope_type
        if isinstance(kind, Mapping) and kind[layer_type] != "longrope":
            return self.rotary(x, position_ids, **options)
        threshold = self.context.threshold
        long = self.context.long_tokens
        if long is None:
            long = position_ids.amax(-1, keepdim=True) >= threshold
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), threshold)
        short_run = self.rotary(x, position_ids.clamp(max=threshold - 1), **options)
        long_run = self.rotary(x, torch.cat([position_ids, beyond], -1), **options)
        if isinstance(short_run, Tensor):
            return _select(long, long_run, short_run)
        return tuple(_select(long, *results) for results in zip(long_run, short_run, strict=True))


def rotary_scaling(model: PreTrainedModel, name: str = "") -> RotaryScaling:
    """Find out how a model's rotary frequencies depend on the length of a sequence.

    Args:
        model: Its config names the types of scaling, its modules hold the frequencies.
        name: What messages call the base.

    Raises:
        InvalidConfiguration: The type depends on the length in a way that cannot be served by sequence.
    """
    found: set[RotaryScaling] = set()
    config = model.config.get_text_config()
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            found.add(RotaryScaling("longrope", parameters.get("original_max_position_embeddings")))
        elif "dynamic" in kind:
            # Not original_max_position_embeddings: transformers' dynamic scaling begins at this length.
            found.add(RotaryScaling("dynamic", getattr(config, "max_position_embeddings", None)))
    if not found:
        return RotaryScaling("fixed")
    if len(found) > 1 or any(scaling.threshold is None for scaling in found):
        kinds = ", ".join(sorted(f"{scaling.kind} from {scaling.threshold} tokens" for scaling in found))
        raise _unsupported(name, f"it has rotary scaling of several or unknown lengths ({kinds})")
    scaling = found.pop()
    if scaling.kind == "longrope" and not _rotary_modules(model):
        raise _unsupported(name, "it has rotary scaling of type longrope, but no rotary module that can be found")
    return scaling


def install_per_sequence_rotary(model: PreTrainedModel, name: str = "") -> RotaryContext | None:
    """Replace every longrope module of a model object by a `PerSequenceRotary`, in place.

    Returns:
        The context of the model object; None where there is no such module. A second call returns the same context and
        changes nothing.

    Raises:
        InvalidConfiguration: As `rotary_scaling`, which has the same arguments.
    """
    if (present := rotary_context(model)) is not None:
        return present
    scaling = rotary_scaling(model, name)
    if scaling.kind != "longrope" or scaling.threshold is None:
        return None
    context = RotaryContext(scaling.threshold)
    replaced = {rotary: PerSequenceRotary(rotary, context) for rotary in _rotary_modules(model)}
    for parent in list(model.modules()):
        if isinstance(parent, PerSequenceRotary):
            continue
        for attribute, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, attribute, replaced[child])
    return context


def rotary_context(model: nn.Module) -> RotaryContext | None:
    """Return the context of a model object with per-sequence rotary modules, or None."""
    return next((module.context for module in model.modules() if isinstance(module, PerSequenceRotary)), None)


@contextmanager
def row_lengths(context: RotaryContext | None, attention_mask: Tensor) -> Iterator[None]:
    """Within the block, each row of a padded batch is on the side of its own number of real tokens.

    Args:
        context: Of the model object; without one there is nothing to say.
        attention_mask: (rows, length), 1 at real tokens.
    """
    if context is None:
        yield
        return
    lengths = attention_mask.sum(-1, keepdim=True)
    previous, context.long_tokens = context.long_tokens, (lengths > context.threshold).expand(attention_mask.shape)
    try:
        yield
    finally:
        context.long_tokens = previous


def shared_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that two model objects can share: all but buffers that a forward pass writes.

    A longrope module copies the chosen frequencies into a buffer in each pass. Two threads that run two model objects
    at the same time must not share this buffer.
    """
    written = {
        id(buffer) for module in model.modules() if isinstance(module, PerSequenceRotary) for buffer in module.buffers()
    }
    return [*model.parameters(), *(buffer for buffer in model.buffers() if id(buffer) not in written)]


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """A config's rope parameters: one mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [value for value in parameters.values() if isinstance(value, Mapping)]


def _rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Stock modules that compute longrope frequencies, wherever the model keeps them."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, Mapping) else [kind]
        if "longrope" in kinds:
            found.append(module)
    return found


def _select(long: Tensor, long_run: Tensor, short_run: Tensor) -> Tensor:
    """Select by token between the long run, whose last position is one too many, and the short run."""
    mask = long[(..., *[None] * (short_run.ndim - 2))]
    return torch.where(mask, long_run[:, :-1], short_run)


def _unsupported(name: str, problem: str) -> InvalidConfiguration:
    return InvalidConfiguration(
        f"base {name!r} cannot be served: {problem}, so that one tenant's long prompt would change another tenant's "
        "output; choose a base with another type of rotary scaling",
        param="base",
    )
