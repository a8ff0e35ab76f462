"""Modules that train a head on the states of a text, pooled or of every token, or of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sera_serve.base import FrozenBase, Pooling
from sera_serve.trainer.model import AdapterModel

LossOf = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of scores and targets."""


class HeadModel(AdapterModel):
    """Adapted base, states (pooled, or those of all tokens), dropout, head, and a loss."""

    def __init__(
        self, base: FrozenBase | None, head: nn.Linear, loss: LossOf, pooling: Pooling | None, dropout: float
    ) -> None:
        """Prepare.

        Args:
            base: With the adapter attached; None where the rows bring their pooled states.
            head: (rows of the head, hidden_size).
            loss: See `LossOf`.
            pooling: How the states become one; None leaves one for each token.
            dropout: Of the head's inputs.
        """
        super().__init__(base, head)
        # FrozenBase is no module, so nn.Module does not register the base twice.
        self.frozen = base
        self.loss = loss
        self.pooling: Pooling | None = pooling
        self.dropout = nn.Dropout(dropout)

    def forward(self, labels: Tensor, features: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute scores and the mean loss.

        Args:
            labels: What the loss takes: a row for each row, and for each token without pooling.
            features: float32 (rows, hidden_size), the pooled states; None computes them from `inputs`.
            inputs: What `FrozenBase.hidden_states` takes, or `pixel_values` as `FrozenBase.image_states` does.
        """
        assert self.head is not None
        if features is None:
            assert self.frozen is not None
            if self.pooling is None:
                states = self.frozen.hidden_states(**inputs)
            elif "pixel_values" in inputs:
                states = self.frozen.pooled_images(pooling=self.pooling, **inputs)
            else:
                states = self.frozen.pooled_states(pooling=self.pooling, **inputs)
            features = states.float()
        logits = self.head(self.dropout(features))
        return {"loss": self.loss(logits, labels), "logits": logits}


class ScaledHeadModel(HeadModel):
    """A head with one output. It trains on the numbers divided by `scale`, and is stored for the numbers themselves.

    The scale is a power of two, which makes both steps exact: a head that is stored and loaded again has the same bits.
    """

    def __init__(
        self, base: FrozenBase | None, head: nn.Linear, pooling: Pooling, dropout: float, scale: float
    ) -> None:
        super().__init__(base, head, self._squared_error, pooling, dropout)
        self.scale = scale

    def _squared_error(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(logits[:, 0], labels)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, and a copy of the head that gives the numbers themselves."""
        tensors = super().stored_tensors()
        return {name: t * self.scale if name.startswith("head.") else t for name, t in tensors.items()}

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored values into the adapter and the head; raise ValueError if names or shapes differ."""
        # Of the head it checks names and shapes alone: `stored_tensors` has given it a copy.
        super().load_stored_tensors(tensors)
        assert self.head is not None
        with torch.no_grad():
            self.head.weight.copy_(tensors["head.weight"] / self.scale)
            self.head.bias.copy_(tensors["head.bias"] / self.scale)
