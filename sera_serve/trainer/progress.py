"""The display of a training run's progress."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


def progress_bars(console: Console) -> Progress:
    """Make the display of the bars of training runs, each with a name and its running loss. It needs a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Moves the bar of one run in a display of bars, and shows the running loss beside it."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars = bars
        self._name = name
        self._task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the current step, which is not 0 in a resumed run."""
        self._task = self._bars.add_task(self._name, total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show the running loss."""
        if self._task is not None and "loss" in logs:
            self._bars.update(self._task, loss=f"loss {logs['loss']:.3f}")

    def close(self) -> None:
        """Take the bar out of the display. The caller calls this after a failure too."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


class RichProgress(ProgressBar):
    """Shows a progress bar with the running loss on a terminal, and prints one line for each evaluation."""

    def __init__(self, console: Console) -> None:
        super().__init__(progress_bars(console), "training")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self._bars.start()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Print the epoch's metrics."""
        shown = "  ".join(
            f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")
        )
        line = f"epoch {round(state.epoch or 0)} of {args.num_train_epochs}: {shown}"
        self._bars.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """End the display."""
        if self._task is not None:
            self._bars.stop()
            self._task = None
