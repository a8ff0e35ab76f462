"""What the trainer replaces of transformers' `Trainer`: methods that are not public, each by its name and parameters.

A method that transformers renames would be called no more, and the stock one would take its place in silence: whole
models in the checkpoints, and a run that goes on with other random numbers.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from sera_serve.trainer.loop import AdapterTrainer

REPLACED = sorted(
    name
    for name, member in vars(AdapterTrainer).items()
    if inspect.isfunction(member) and name.startswith("_") and not name.startswith("__")
)


def test_the_replaced_methods_are_the_ones_that_were_looked_at() -> None:
    assert REPLACED == [
        "_determine_best_metric",
        "_get_train_sampler",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_save_checkpoint",
    ]


@pytest.mark.parametrize("name", REPLACED)
def test_transformers_has_the_method_with_these_parameters(name: str) -> None:
    ours = inspect.signature(getattr(AdapterTrainer, name)).parameters
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", REPLACED)
def test_the_loop_of_transformers_calls_the_method(name: str) -> None:
    callers = [
        other
        for other, member in vars(Trainer).items()
        if inspect.isfunction(member) and other != name and f"self.{name}" in inspect.getsource(member)
    ]
    assert callers
