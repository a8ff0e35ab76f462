"""Loss scaling, for a base in float16.

The gradient passes through the base in the base's dtype, and float16 has no number between 0 and 6e-8. At a small loss
every gradient of the adapter would be zero. So the loss is multiplied by a power of two before the backward pass, and
the float32 gradients of adapter and head are divided by it after that. Neither rounds. A gradient that is not finite
tells that the scale is too large: it is halved, and the batch is computed again. After many finite steps it doubles.

`torch.amp.GradScaler` does the same beside its own optimiser step, which `transformers.Trainer` reaches through its
mixed precision only. It leaves the step out, where this one is made again: a short run has no step to lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

# That of GradScaler. Its 2,000 steps before a doubling are more than many adapters train for.
FIRST_SCALE = 2.0**16
STEPS_TO_DOUBLE = 200
LARGEST_SCALE = 2.0**32


def needs_loss_scale(model: nn.Module) -> bool:
    """Whether gradients pass through float16 weights. A head that trains on states alone has no base in its model."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


class LossScale:
    """The factor of the loss, a power of two from 1 to 2 ** 32.

    Attributes:
        scale: The factor of the next backward pass.
    """

    def __init__(self) -> None:
        self.scale = FIRST_SCALE
        self._finite_steps = 0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divide gradients by the scale, and set the scale of the next step.

        Returns:
            False if a gradient is not finite. Then all of them are dropped, and the batch must be computed again. With
            the scale 1 the scale is not the cause, and the gradients stay as they are.
        """
        trained = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        # One answer for all, because each waits for the GPU.
        if gradients and self.scale > 1 and not bool(torch.stack([g.isfinite().all() for g in gradients]).all()):
            self.scale, self._finite_steps = self.scale / 2, 0
            for parameter in trained:
                parameter.grad = None
            return False
        for gradient in gradients:
            gradient.div_(self.scale)
        self._finite_steps += 1
        if self._finite_steps == STEPS_TO_DOUBLE:
            self.scale, self._finite_steps = min(2 * self.scale, LARGEST_SCALE), 0
        return True

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on."""
        return {"scale": torch.tensor(self.scale), "finite_steps": torch.tensor(self._finite_steps)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.scale, self._finite_steps = float(tensors["scale"]), int(tensors["finite_steps"])
