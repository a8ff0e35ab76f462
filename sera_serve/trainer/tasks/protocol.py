"""What a task is to the rest of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adapters_store import AdapterConfig
from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.labelled import Examples
from sera_serve.trainer.model import AdapterModel
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.task_options import Task


class TrainingTask(Protocol):
    """What the training loop needs from a task: a model, rows, and their evaluation.

    Attributes:
        model: The module to train.
        train_rows: The training rows, each a mapping.
        lengths: Length of each training row in tokens; 1 for a row of head-only training.
        train_tokens: Tokens of all training rows.
        eval_rows: The rows that choose the best epoch; may be empty.
        test_rows: The rows that are scored once at the end; may be empty.
        notes: Changes to the data that the user should know (rows truncated, texts split).
        base: The base that the model stands on.
    """

    base: FrozenBase

    model: AdapterModel
    train_rows: Sequence[Any]
    lengths: Sequence[int]
    train_tokens: int
    eval_rows: Sequence[Any]
    test_rows: Sequence[Any]
    notes: list[str]

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        ...

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics of the model on `rows`, without drawing random numbers."""
        ...

    def bundle_fields(self) -> dict[str, Any]:
        """Return the fields of `AdapterConfig` that the task decides: labels, pooling, template and the like."""
        ...


def row_counts(task: TrainingTask) -> dict[str, int]:
    """The number of rows by use."""
    return {"train": len(task.train_rows), "eval": len(task.eval_rows), "test": len(task.test_rows)}


LoadData = Callable[[TrainSettings, AdapterConfig | None], Examples[Any]]
"""Reads and checks the files of a run. The second argument is the adapter that the run goes on from, or None.

It raises `InvalidData`.
"""
BuildTask = Callable[[TrainSettings, FrozenBase, Any, int], TrainingTask]
"""Makes the task from settings, a base with the adapter attached, the data, and the longest row in tokens."""


@dataclass(frozen=True)
class TaskKind:
    """One `--task`: what reads its rows, and what makes its task from them.

    Attributes:
        load: See `LoadData`.
        build: See `BuildTask`. The data are those of `load`.
        takes_images: Whether its rows have images. A server of a base with an image tower serves no other adapter.
    """

    load: LoadData
    build: BuildTask
    takes_images: bool = False


_TASKS_OF_IMAGES = {"vision": "image-classify", "dual": "image-classify or retrieve"}


def check_base_of_texts(task: Task, base: FrozenBase) -> None:
    """Check that a base serves adapters of tasks on texts.

    A CLIP base reads texts too. It would train, and no server would take requests for the adapter.

    Args:
        task: A task on texts: its `TaskKind` takes no images.
        base: The loaded base.

    Raises:
        InvalidConfiguration: It is a vision or a dual base.
    """
    if (fitting := _TASKS_OF_IMAGES.get(base.kind)) is not None:
        raise InvalidConfiguration(
            f"--task {task} trains on texts, and base {base.name} takes images; take --task {fitting}, or a base that "
            "is made for text alone",
            param="task",
        )
