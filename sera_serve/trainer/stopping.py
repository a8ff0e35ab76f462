"""Early stopping that a resumed run repeats exactly: it is a function of what a checkpoint keeps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


def evaluations_since_best(state: Any) -> int:
    """Count the evaluations after the one of the best epoch.

    Args:
        state: transformers' `TrainerState`. Its history and its best step are in every checkpoint.
    """
    best = state.best_global_step or 0
    return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


class StopWithoutGain(TrainerCallback):  # type: ignore[misc]
    """Ends training after `patience` evaluations in a row without a new best epoch.

    transformers' `EarlyStoppingCallback` counts before the trainer decides which epoch is the best one, so it does not
    see that a lower loss decides between equal scores. Its counter is a state of its own.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for the end. The save of an epoch comes after its evaluation."""
        if evaluations_since_best(state) >= self._patience:
            control.should_training_stop = True
        return control
