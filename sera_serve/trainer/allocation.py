"""Rank allocation: training starts with more rank than it ends with, and the layers share what is left by importance.

The method is AdaLoRA's (Zhang et al., 2023, https://arxiv.org/abs/2303.10512) on SeRA's layers. A unit of rank is what
can leave a layer so that a smaller layer of the same form remains: with segments of rank m, unit j is the column j of
every block of A, the row j of every block of B, and the rows and columns of C between them. A layer of rank r and
`split` segments has r / split units. Its rank becomes a multiple of `split`, or 0: then the layer leaves the adapter.

* The sensitivity of an element is |w * gradient|; its importance is the smoothed sensitivity times the smoothed
  deviation from it (AdaLoRA, equations 7 to 9). The importance of a unit is the sum of its means over A, B and C.
* The budget falls from the first total rank to the last by a cubic, between a warm-up and a last phase (equation 11).
* Units beyond the budget have their part of C set to zero after each step (without C: their part of B). Gradients may
  bring them back until the last phase begins. Then the choice is fixed. The sensitivity is taken between the step and
  the masking, as in PEFT's AdaLoRA: the step has just moved the masked part away from zero, where its sensitivity
  would be zero, too.
* At the end the parts that are zero leave the layers. The smaller layers compute what the masked ones did.

AdaLoRA's penalty on the angles between directions is left out: SeRA's C is full, so directions need not be orthogonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sera_serve.layers import SeraLinear
from sera_serve.layers.attach import replace_module
from sera_serve.trainer.checkpoint import copy_tensors
from sera_serve.trainer.patterns import total_ranks

# AdaLoRA's smoothing of sensitivity and of its deviation.
BETA_SENSITIVITY, BETA_UNCERTAINTY = 0.85, 0.85
# A B that starts at zero gives A and C no gradient at the first step.
LEAST_STEPS = 3
_FACTORS = ("a", "c", "b")


@dataclasses.dataclass(frozen=True)
class BudgetSchedule:
    """The total rank that the layers may have after a step (AdaLoRA, equation 11).

    Attributes:
        first: Total rank at the start.
        last: Total rank at the end.
        warmup_steps: Steps before the budget falls.
        settled_step: The step from which the budget is `last`.
    """

    first: int
    last: int
    warmup_steps: int
    settled_step: int

    def at(self, step: int) -> int:
        """The budget after step `step`; steps count from 1."""
        if step >= self.settled_step:
            return self.last
        if step <= self.warmup_steps:
            return self.first
        rest = 1 - (step - self.warmup_steps) / (self.settled_step - self.warmup_steps)
        return self.last + int((self.first - self.last) * rest**3)


def settled_step(steps: int, final: float) -> int:
    """The step from which the ranks are the last ones, of `steps` steps with the part `final` after that."""
    return max(1, steps - max(1, round(final * steps)))


def few_steps_note(steps: int, final: float) -> list[str]:
    """Say so where the ranks are settled after a few gradients, which tell little about the layers."""
    settled = settled_step(steps, final)
    if settled >= LEAST_STEPS:
        return []
    return [
        f"the ranks are settled at step {settled} of {steps}, when their importance says little yet; give more rows or "
        "epochs, or no budget"
    ]


class RankAllocator:
    """Keeps the importance of every unit, masks the units beyond the budget, and takes them out at the end.

    Attributes:
        kept: For each layer a bool tensor (segment_rank,): the units that are not masked.
    """

    def __init__(self, layers: Mapping[str, SeraLinear], budget: float) -> None:
        """
        Args:
            layers: The attached layers by path.
            budget: Mean rank of a layer at the end.

        Raises:
            InvalidConfiguration: See `total_ranks`.
        """
        self._layers = dict(layers)
        self._first, self._last = total_ranks([layer.config for layer in layers.values()], budget)
        self.kept = {
            path: torch.ones(layer.config.segment_rank, dtype=torch.bool, device=layer.sera_a.device)
            for path, layer in self._layers.items()
        }
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            self._sensitivity[name] = torch.zeros_like(parameter)
            self._uncertainty[name] = torch.zeros_like(parameter)

    def schedule(self, steps: int, warmup: float, final: float) -> BudgetSchedule:
        """Return the budget of a training of `steps` steps.

        Args:
            steps: Steps in all.
            warmup: Part of the steps before the budget falls.
            final: Part of the steps after it has fallen.
        """
        settled = settled_step(steps, final)
        return BudgetSchedule(self._first, self._last, min(round(warmup * steps), settled - 1), settled)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{path}.{factor}", parameter)
            for path, layer in self._layers.items()
            for factor in _FACTORS
            if (parameter := getattr(layer, f"sera_{factor}")) is not None and parameter.requires_grad
        ]

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of a step, after the optimiser has moved the factors and before they are masked.

        A layer that the loss does not reach has importance 0.
        """
        for name, parameter in self._trained():
            if parameter.grad is None:
                continue
            seen = (parameter * parameter.grad).abs_()
            smoothed, deviation = self._sensitivity[name], self._uncertainty[name]
            smoothed.mul_(BETA_SENSITIVITY).add_(seen, alpha=1 - BETA_SENSITIVITY)
            deviation.mul_(BETA_UNCERTAINTY).add_((seen - smoothed).abs_(), alpha=1 - BETA_UNCERTAINTY)

    def importance(self, path: str) -> Tensor:
        """The importance of each unit of a layer, (segment_rank,)."""
        config = self._layers[path].config
        total = torch.zeros(config.segment_rank, device=self.kept[path].device)
        for factor in _FACTORS:
            name = f"{path}.{factor}"
            if name not in self._sensitivity:
                continue
            score = self._sensitivity[name] * self._uncertainty[name]
            if factor == "a":
                total += score.mean(0)
            elif factor == "b":
                total += score.mean(1)
            else:
                by_unit = score.view(config.split, config.segment_rank, config.split, config.segment_rank)
                total += (by_unit.mean((0, 2, 3)) + by_unit.mean((0, 1, 2))) / 2
        return total

    def choose(self, budget: int) -> None:
        """Keep the most important units within a total rank of `budget`. The first of equal units comes first."""
        units = [
            (float(score), path, index)
            for path in self._layers
            for index, score in enumerate(self.importance(path).tolist())
        ]
        units.sort(key=lambda unit: -unit[0])
        for kept in self.kept.values():
            kept.zero_()
        for _, path, index in units:
            cost = self._layers[path].config.split
            if cost <= budget:
                self.kept[path][index] = True
                budget -= cost

    @torch.no_grad()
    def mask(self) -> None:
        """Set the part of C of each unit that is not kept to zero; without C, its part of B."""
        for path, layer in self._layers.items():
            kept = self.kept[path]
            if kept.all():
                continue
            if layer.sera_c is None:
                layer.sera_b[~kept] = 0.0
                continue
            split, segment_rank = layer.config.split, layer.config.segment_rank
            by_unit = layer.sera_c.view(split, segment_rank, split, segment_rank)
            by_unit[:, ~kept] = 0.0
            by_unit[:, :, :, ~kept] = 0.0

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on: importance and choice."""
        groups = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty, "kept": self.kept}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; ValueError if it belongs to other layers."""
        copy_tensors(self.state(), tensors)

    def compress(self, model: nn.Module) -> None:
        """Replace each layer of `model` by one with the kept units only. A layer without any is detached."""
        for path, kept in self.kept.items():
            layer = self._layers[path]
            if not kept.any():
                replace_module(model, path, layer.base)
            elif not kept.all():
                replace_module(model, path, smaller_layer(layer, kept))


@torch.no_grad()
def smaller_layer(layer: SeraLinear, kept: Tensor) -> SeraLinear:
    """Return the layer that has the units `kept` of `layer` only: bool (segment_rank,), not all of them False.

    It computes what `layer` does where the other units are masked. Split and scaling stay.
    """
    config, units = layer.config, int(kept.sum())
    split, rank = config.split, config.split * units
    new = SeraLinear(layer.base, dataclasses.replace(config, rank=rank, lora_alpha=config.scaling * rank))
    # The factors keep their dtype.
    new.sera_a.data = layer.sera_a[:, kept]
    new.sera_b.data = layer.sera_b[kept]
    if layer.sera_c is not None and new.sera_c is not None:
        by_unit = layer.sera_c.view(split, config.segment_rank, split, config.segment_rank)
        new.sera_c.data = by_unit[:, kept][:, :, :, kept].reshape(rank, rank)
    return new


class SettlesRanks(TrainerCallback):  # type: ignore[misc]
    """A callback under which ranks fall to a budget.

    Attributes:
        settled_step: The step from which the ranks are the last ones. No earlier epoch is the best.
    """

    settled_step = 0


class AllocateRanks(SettlesRanks):
    """Runs an allocator beside the optimiser's steps."""

    def __init__(self, allocator: RankAllocator, warmup: float, final: float) -> None:
        self.allocator = allocator
        self._warmup, self._final = warmup, final
        self._schedule: BudgetSchedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the schedule: the number of steps is known now."""
        self._schedule = self.allocator.schedule(state.max_steps, self._warmup, self._final)
        self.settled_step = self._schedule.settled_step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the gradients and choose within the budget, while the choice is open. Mask the rest."""
        assert self._schedule is not None
        step = state.global_step + 1
        if step <= self.settled_step:
            self.allocator.observe()
            self.allocator.choose(self._schedule.at(step))
        self.allocator.mask()
