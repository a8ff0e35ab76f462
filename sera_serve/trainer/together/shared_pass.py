"""One forward and one backward pass through the base for the batches of several runs.

The tokens of all batches lie one after the other in one row. Linear layers, norms and activations see this row alone;
attention sees each batch with its own padding, as a run of its own does. Where an architecture cannot be run this way,
the batches are padded to the longest and stacked.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from sera_serve.base import FrozenBase
from sera_serve.base.rotary import row_lengths
from sera_serve.layers import SeraLinear
from sera_serve.layers.multi_linear import Drawing, MultiAttachment, draw_as_ever
from sera_serve.trainer.activations import mark_training

_NUMBERS = itertools.count()
# Arguments of attention functions that change nothing here: the base has no dropout, and positions are in the queries.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "is_causal", "logits_to_keep", "position_embeddings"}
_WITHOUT_EFFECT |= {"past_key_values", "past_key_value", "return_dict", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class Batch:
    """What one run asks of the base in one step.

    Attributes:
        key: Names the run.
        layers: Its adapter's layers, by path.
        input_ids: int64 (rows, length), right-padded.
        attention_mask: (rows, length), 1 at real tokens.
        token_type_ids: int64 (rows, length), or None for segment 0.
        kept: The number of last columns whose logits are wanted, or None for hidden states of all columns.
    """

    key: int
    layers: Mapping[str, SeraLinear]
    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None = None
    kept: int | None = None


class SharedPass:
    """A model object over the weights of a base, for passes with the adapters of several runs."""

    def __init__(self, base: FrozenBase, drawing: Drawing = draw_as_ever) -> None:
        """Make a model object over the same weights, and find out whether it can run without padding between runs.

        `drawing` gives a block in which the dropout of a run, by its key, draws its random numbers.
        """
        self._base = base.share_weights()
        self._attachment = MultiAttachment(self._base.model, drawing)
        self._backbone: nn.Module = self._base.model.base_model if base.kind == "decoder" else self._base.model
        self._accepted = set(inspect.signature(self._backbone.forward).parameters)
        self._outputs: list[Tensor] = []
        self._blocks: _Blocks | None = None
        self._offset = 0
        self._picks = base.kind == "decoder" and self._can_pick()
        self._find_blocks()
        # The trainer's models do it in `train`. It has no effect where activations are not checkpointed.
        mark_training(self._base.model, True)

    @property
    def is_flat(self) -> bool:
        """Whether the batches keep their own padding."""
        return self._blocks is not None

    def forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Run the base once.

        Returns:
            For each batch hidden states (rows, length, hidden) or logits (rows, kept, vocabulary): a tensor without
            history that requires a gradient. `backward` reads the gradients that it has by then.
        """
        for batch in batches:
            self._attachment.set_adapter(batch.key, {p: v for p, v in batch.layers.items() if not _is_unused(p)})
        if self._picks or len({batch.kept is None for batch in batches}) == 1:
            self._outputs = self._run(batches)
        else:
            # The states of a pass with logits cannot be had: one pass for each kind.
            parts = [[b for b in batches if (b.kept is None) == plain] for plain in (True, False)]
            found = {b.key: out for part in parts for b, out in zip(part, self._run(part), strict=True)}
            self._outputs = [found[batch.key] for batch in batches]
        for batch in batches:
            self._draw_unused(batch)
        return [output.detach().requires_grad_() for output in self._outputs]

    def backward(self, results: Sequence[Tensor]) -> None:
        """Run the base's backward pass once, from the gradients of the results of the last `forward`.

        The gradients of the adapters' factors are added to those that they have. A result without a gradient gives
        none.
        """
        pairs = [(o, r.grad) for o, r in zip(self._outputs, results, strict=True) if r.grad is not None]
        self._outputs = []
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def forget(self, key: int) -> None:
        """Let go of the layers of a run that has ended."""
        self._attachment.set_adapter(key, {})

    def _draw_unused(self, batch: Batch) -> None:
        """Draw the random numbers that a pass of the batch's own would draw for layers that no result depends on."""
        for path, layer in batch.layers.items():
            if _is_unused(path) and isinstance(layer.dropout, nn.Dropout) and layer.dropout.training:
                with self._attachment.context.drawing(batch.key):
                    layer.dropout(torch.ones(len(batch.input_ids), layer.d_in, device=batch.input_ids.device))

    def _run(self, batches: Sequence[Batch]) -> list[Tensor]:
        widest = max(batch.input_ids.shape[1] for batch in batches)
        widths = [batch.input_ids.shape[1] if self.is_flat else widest for batch in batches]
        tokens = [len(batch.input_ids) * width for batch, width in zip(batches, widths, strict=True)]
        starts = [0, *itertools.accumulate(tokens)]
        self._attachment.context.segments = [(b.key, count) for b, count in zip(batches, tokens, strict=True)]
        picked = [
            _last_columns(batch, start, width)
            for batch, start, width in zip(batches, starts, widths, strict=False)
            if batch.kept is not None
        ]
        with row_lengths(self._base.rotary_context, _stack([b.attention_mask for b in batches], widest)):
            states, logits = self._call(self._inputs(batches, widest), torch.cat(picked) if picked else None)
        outputs, done = [], 0
        for batch, start, width in zip(batches, starts, widths, strict=False):
            rows, length = batch.input_ids.shape
            if batch.kept is None:
                block = states[start : start + rows * width]
                outputs.append(block.view(rows, width, -1)[:, :length])
            else:
                assert logits is not None
                outputs.append(logits[done : done + rows * batch.kept].view(rows, batch.kept, -1))
                done += rows * batch.kept
        return outputs

    def _call(self, inputs: dict[str, Any], picked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the states of all tokens, (tokens, hidden), and the logits of the picked ones."""
        if picked is None:
            states = self._backbone(**inputs).last_hidden_state
            return states.reshape(-1, states.shape[-1]), None
        logits: Tensor
        if not self._picks:
            logits = self._base.model(**inputs).logits
            return logits.new_empty(0), logits.reshape(-1, logits.shape[-1])[picked]
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            # The output embedding is the most expensive matrix of a small base, so it gets the picked states alone.
            states = output.last_hidden_state
            found.append(states.reshape(-1, states.shape[-1]))
            return type(output)(last_hidden_state=found[0][picked].unsqueeze(0))

        handle = self._backbone.register_forward_hook(keep)
        try:
            logits = self._base.model(**inputs).logits
        finally:
            handle.remove()
        return found[0], logits[0]

    def _inputs(self, batches: Sequence[Batch], widest: int) -> dict[str, Any]:
        device = self._base.device
        # GPT-2 adds an embedding for zeros too, so they are given only beside others.
        has_types = any(batch.token_type_ids is not None for batch in batches)
        types = [torch.zeros_like(b.input_ids) if b.token_type_ids is None else b.token_type_ids for b in batches]
        if self._blocks is None:
            inputs = {
                "input_ids": _stack(
                    [b.input_ids for b in batches], widest, int(self._base.tokenizer.pad_token_id or 0)
                ),
                "attention_mask": _stack([b.attention_mask for b in batches], widest),
            }
            extra = {"token_type_ids": _stack(types, widest)} if has_types else {}
        else:
            self._blocks.masks = [b.attention_mask for b in batches]
            positions = [torch.arange(b.input_ids.shape[1], device=device).expand_as(b.input_ids) for b in batches]
            inputs = {
                "input_ids": _flat([b.input_ids for b in batches]),
                "position_ids": _flat(positions) + self._offset,
            }
            extra = {"token_type_ids": _flat(types)} if has_types else {}
        # A decoder would keep keys and values for a next step that never comes.
        caches = {"use_cache": False} if "use_cache" in self._accepted else {}
        return inputs | extra | caches

    @torch.no_grad()
    def _can_pick(self) -> bool:
        """Whether the model computes logits from what its backbone returns, by comparison with its own logits."""
        row = self._example(5)
        want = self._base.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[:, -2:]
        self._picks = True
        try:
            (got,) = self._run([Batch(-1, {}, row, torch.ones_like(row), None, 2)])
        except (IndexError, TypeError):
            # OPT's model runs a part of its backbone, not the backbone itself.
            return False
        return _agree(got, want)

    @torch.no_grad()
    def _find_blocks(self) -> None:
        """Use `_Blocks` if the architecture gives the same states with them as with padding."""
        model = self._base.model
        if "position_ids" not in self._accepted or self._base.rotary_context is not None:
            return
        own = model.config._attn_implementation
        batches = [Batch(-1, {}, row, torch.ones_like(row)) for row in (self._example(11), self._example(5, rows=2))]
        want = self._run(batches)
        padding = getattr(model.config, "pad_token_id", None)
        name = f"sera_together_{next(_NUMBERS)}"
        blocks = _Blocks()
        AttentionInterface.register(name, blocks.attend)
        AttentionMaskInterface.register(name, _no_mask)
        # RoBERTa and its kin count positions from the padding token's id on.
        for offset in dict.fromkeys((0, (padding or 0) + 1)):
            self._offset, self._blocks = offset, blocks
            try:
                model.set_attn_implementation(name)
                if all(_agree(a, b) for a, b in zip(self._run(batches), want, strict=True)):
                    return
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                # Whatever an architecture does with arguments that it does not know, padding is right for it.
                pass
        self._offset, self._blocks = 0, None
        model.set_attn_implementation(own)

    def _example(self, length: int, rows: int = 1) -> Tensor:
        """Token ids (rows, length). They repeat, so that a wrong position shows."""
        vocabulary = self._base.model.config.get_text_config().vocab_size
        row = torch.arange(length, device=self._base.device).remainder(3) * 7 + 3
        return (row + torch.arange(rows, device=row.device)[:, None]).remainder(vocabulary)


class _Blocks:
    """Attention over batches that lie one after the other, each with its own rows and padding."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The registered function: (1, heads, tokens, width) to (1, tokens, heads, width)."""
        unknown = {name for name, argument in others.items() if argument is not None} - _WITHOUT_EFFECT
        if unknown or dropout:
            raise ValueError(f"attention with {', '.join(sorted(unknown)) or 'dropout'}")
        causal = bool(getattr(module, "is_causal", False) if others.get("is_causal") is None else others["is_causal"])
        outputs = []
        counts = [mask.numel() for mask in self.masks]
        parts = zip(self.masks, *(tensor[0].split(counts, dim=1) for tensor in (query, key, value)), strict=True)
        for mask, q, k, v in parts:
            rows, length = mask.shape
            # (heads, tokens, width) to (rows, heads, length, width).
            q, k, v = (t.unflatten(1, (rows, length)).transpose(0, 1) for t in (q, k, v))
            out = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_visible(mask, causal, sliding_window),
                is_causal=causal and (sliding_window is None or sliding_window >= length),
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0), None


def _is_unused(path: str) -> bool:
    """Whether a layer belongs to an encoder's pooler: no state goes through it, and its input is not all tokens."""
    return "pooler" in path.split(".")


def _visible(mask: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """The mask of attention, broadcast to (rows, heads, length, length), or None if `is_causal` or nothing says it."""
    length = mask.shape[1]
    if causal and (window is None or window >= length):
        # Padding is on the right: no real token sees it.
        return None
    if causal:
        assert window is not None
        behind = torch.arange(length, device=mask.device)[:, None] - torch.arange(length, device=mask.device)
        return (behind >= 0) & (behind < window)
    return None if bool(mask.all()) else mask[:, None, None, :].bool()


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The registered mask function: `_Blocks` makes its own masks."""
    return


def _agree(got: Tensor, want: Tensor) -> bool:
    """Whether states differ by rounding alone. Measured: a position off by one changes them by over 0.1."""
    difference, size = (got - want).double().norm(), want.double().norm()
    return bool(difference <= 8 * torch.finfo(want.dtype).eps * size) or bool(difference <= 1e-5 * size)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])[None]


def _stack(tensors: Sequence[Tensor], width: int, filler: int = 0) -> Tensor:
    return torch.cat([functional.pad(t, (0, width - t.shape[1]), value=filler) for t in tensors])


def _last_columns(batch: Batch, start: int, width: int) -> Tensor:
    """Places, among all tokens, of the last columns of a batch; int64 (rows * kept,)."""
    rows, length = batch.input_ids.shape
    assert batch.kept is not None
    device = batch.input_ids.device
    columns = torch.arange(length - batch.kept, length, device=device)
    return (start + torch.arange(rows, device=device)[:, None] * width + columns).flatten()
