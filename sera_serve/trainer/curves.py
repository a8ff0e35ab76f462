"""Curves of a run: a picture at the end, and TensorBoard's events on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from sera_serve.errors import InvalidConfiguration

# Okabe and Ito's blue, vermilion and green, which every kind of sight tells apart.
_TRAINING, _EVALUATION, _CHOSEN = "#0072b2", "#d55e00", "#009e73"
_MOST_EVALUATIONS = 100


def tensorboard_callback(folder: Path, resumed_at: int | None) -> TrainerCallback:
    """Return transformers' own callback, which writes to `folder`.

    Args:
        folder: Made if absent.
        resumed_at: The step of the checkpoint that the run goes on from. What a killed process wrote after it is
            hidden.

    Raises:
        InvalidConfiguration: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidConfiguration(
            "--tensorboard needs the package tensorboard; install it with: pip install tensorboard", param="tensorboard"
        ) from error
    purge = None if resumed_at is None else resumed_at + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=purge))


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Return the metrics of each evaluation, with `epoch`, out of a `log_history` of transformers.

    A figure that is not finite becomes None, because JSON has no word for it. Of very many evaluations, evenly spaced
    ones are returned, at most 100.
    """
    found: list[dict[str, float | None]] = [
        {
            "epoch": round(entry["epoch"]),
            **{k.removeprefix("eval_"): v if math.isfinite(v) else None for k, v in entry.items() if k[:5] == "eval_"},
        }
        for entry in history
        if "eval_loss" in entry
    ]
    return found[:: -(-len(found) // _MOST_EVALUATIONS) or 1]


def check_plot(path: Path) -> None:
    """Make the folder of a picture, and see that the picture can be written. Before training, which may take hours.

    Raises:
        InvalidConfiguration: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise InvalidConfiguration(
            f"--plot {path} cannot be written: {error.strerror}; name another file", param="plot"
        ) from error


def plot_curves(
    history: Sequence[Mapping[str, Any]], path: Path, *, title: str, metric: str, chosen_epoch: float | None
) -> None:
    """Draw the loss of training and evaluation, and the other metrics, over the epochs.

    Args:
        history: The `log_history` of transformers.
        path: The PNG file. Its folder is made if absent.
        title: Title of the picture.
        metric: The metric that chooses the epoch; its panel comes after the loss.
        chosen_epoch: The epoch that was kept; None if none was chosen.

    Raises:
        OSError: The file cannot be written.
    """
    # matplotlib takes a second to import.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scores = evaluations(history)
    names = [name for name in (scores[0] if scores else {}) if name not in ("epoch", "loss")]
    names.sort(key=lambda name: name != metric)
    figure = Figure(figsize=(max(5.5, 3.8 * (1 + len(names))), 3.6), dpi=130)
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    steps = [entry for entry in history if "loss" in entry]
    panels[0].plot(
        [entry["epoch"] for entry in steps],
        [entry["loss"] for entry in steps],
        color=_TRAINING,
        # A single point makes no line.
        marker="o" if len(steps) == 1 else "",
        markersize=4,
        label="training",
    )
    for panel, name in zip(panels, ["loss", *names], strict=True):
        if scores:
            panel.plot(
                [score["epoch"] for score in scores],
                [score[name] for score in scores],
                color=_EVALUATION,
                marker="o",
                markersize=4,
                label="evaluation",
            )
        if chosen_epoch is not None and scores:
            panel.axvline(chosen_epoch, color=_CHOSEN, linestyle="--", linewidth=1.2, label="chosen epoch")
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("epoch")
        panel.grid(True, alpha=0.3)
        # With two ticks at least, a run of one epoch would have an axis of hundredths of an epoch.
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
