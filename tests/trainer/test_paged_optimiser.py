"""Checkpoints hold the state of bitsandbytes' optimisers too, which have numbers and mappings in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.checkpoint import load_optimiser, save_checkpoint
from sera_serve.trainer.settings import load_options


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_its_state_is_restored(tmp_path: Path) -> None:
    from bitsandbytes.optim import PagedAdamW32bit

    def steps(parameter: torch.nn.Parameter, optimiser: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            (parameter**2).sum().backward()
            optimiser.step()

    def start() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 20))
        optimiser = PagedAdamW32bit([{"params": [parameter], "lr": 1e-2}], weight_decay=0.1)
        return parameter, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)

    undisturbed, optimiser, schedule = start()
    steps(undisturbed, optimiser, 3)
    saved = save_checkpoint(tmp_path, 3, {"adapter": {"a": undisturbed}}, optimiser, schedule, TrainerState())
    other, restored, its_schedule = start()
    with torch.no_grad():
        other.copy_(undisturbed)
    load_optimiser(saved, restored, its_schedule)
    steps(undisturbed, optimiser, 2)
    steps(other, restored, 2)
    assert torch.equal(undisturbed, other)


def test_it_needs_a_gpu() -> None:
    options = {"base": "embedded", "store": "s", "name": "a/b", "task": "classify", "train": "t.csv"}
    with pytest.raises(InvalidConfiguration, match="paged-adamw pages to and from a GPU, and --device is cpu"):
        load_options(None, {**options, "optimizer": "paged-adamw"})
    assert load_options(None, {**options, "optimizer": "paged-adamw", "device": "cuda"}).optimizer == "paged-adamw"
