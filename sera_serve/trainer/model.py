"""The modules that `transformers.Trainer` trains: a frozen base with an adapter, a head for a classifier, the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from sera_serve.base import FrozenBase
from sera_serve.base.rotary import row_lengths
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import adapter_tensors, attached_layers
from sera_serve.trainer.activations import mark_training
from sera_serve.trainer.checkpoint import copy_tensors

IGNORED = -100
_HEAD_STD = 0.02


class AdapterModel(nn.Module):
    """Base class: only the adapter and the head train, and the base's own dropout is never active.

    Attributes:
        head: Linear layer (num_labels, hidden_size), or None for a generator.
    """

    # The losses here are means over the batch; Trainer divides by accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, base: FrozenBase | None, head: nn.Linear | None) -> None:
        super().__init__()
        self.base_model = base.model if base is not None else None
        self.head = head

    def train(self, mode: bool = True) -> AdapterModel:
        """Switch the dropout of the adapter and the head. The frozen base stays in evaluation mode."""
        super().train(mode)
        if self.base_model is not None:
            self.base_model.eval()
            mark_training(self.base_model, mode)
            for layer in attached_layers(self.base_model).values():
                layer.dropout.train(mode)
        return self

    @property
    def head_parameters(self) -> int:
        """Numbers of the head; 0 without one."""
        return sum(p.numel() for p in self.head.parameters()) if self.head is not None else 0

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the adapter and its head, by its name in the adapter format. They share memory."""
        tensors = adapter_tensors(self.base_model) if self.base_model is not None else {}
        if self.head is not None:
            tensors["head.weight"] = self.head.weight.detach()
            tensors["head.bias"] = self.head.bias.detach()
        return tensors

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of `tensors` into the adapter; raise ValueError if names or shapes differ."""
        copy_tensors(self.stored_tensors(), tensors)


def new_head(base: FrozenBase, num_labels: int) -> nn.Linear:
    """Create a float32 classifier head with `num_labels` rows, small normal weights and zero bias."""
    head = nn.Linear(base.hidden_size, num_labels, device=base.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=_HEAD_STD)
    nn.init.zeros_(head.bias)
    return head


class GeneratorModel(AdapterModel):
    """An adapted causal language model, with the loss on labelled tokens only."""

    def __init__(self, base: FrozenBase) -> None:
        if base.kind != "decoder":
            raise InvalidConfiguration(
                f"base {base.name} is an encoder, which cannot generate; take a decoder, or --task classify",
                param="base",
            )
        super().__init__(base, None)
        self._rotary = base.rotary_context
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters

    def token_losses(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Compute the negative log-likelihood in nats of each labelled token.

        Args:
            input_ids: int64 (rows, length), right-padded.
            attention_mask: (rows, length), 1 at real tokens.
            labels: int64 (rows, length): the token itself if it is learned, else `IGNORED`.

        Returns:
            float32 (rows, columns): 0 for tokens without a label. There is one column for each token after the first,
            without the leading columns in which no row has a label.
        """
        assert self.base_model is not None
        targets = labels[:, 1:]
        first = int((targets != IGNORED).any(0).int().argmax())
        kept = targets.shape[1] - first
        # The output embedding is the most expensive matrix of a small base. Skip it where nothing is learned.
        options = {"logits_to_keep": kept + 1} if self._keeps_logits else {}
        with row_lengths(self._rotary, attention_mask):
            output = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
        logits = output.logits[:, -(kept + 1) : -1].float()
        targets = targets[:, first:]
        return _token_losses(logits, targets)

    def packed_losses(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Compute the negative log-likelihood in nats of each labelled token of packed rows.

        A row begins where the positions begin anew; transformers then lets no token attend to another row
        (`find_packed_sequence_indices` in its `masking_utils`).

        Args:
            input_ids: int64 (sequences, length), several rows one after the other in each sequence.
            position_ids: int64 (sequences, length): the position of each token in its own row.
            labels: int64 (sequences, length): the token itself if it is learned, else `IGNORED`. The first token of
                each row is not learned.

        Returns:
            float32 (sequences, length - 1): 0 for tokens without a label.
        """
        assert self.base_model is not None
        targets = labels[:, 1:]
        # Columns in which no sequence learns a token need no output embedding.
        kept = (targets != IGNORED).any(0).nonzero().flatten()
        options = {"logits_to_keep": kept} if self._keeps_logits else {}
        output = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
        logits = output.logits if self._keeps_logits else output.logits[:, kept]
        losses = targets.new_zeros(targets.shape, dtype=torch.float32)
        return losses.index_copy(1, kept, _token_losses(logits.float(), targets[:, kept]))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the mean loss over labelled tokens; arguments as in `token_losses`, or as in `packed_losses`."""
        if position_ids is not None:
            losses = self.packed_losses(input_ids, position_ids, labels)
        else:
            assert attention_mask is not None
            losses = self.token_losses(input_ids, attention_mask, labels)
        return {"loss": losses.sum() / (labels[:, 1:] != IGNORED).sum().clamp(min=1)}


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)
