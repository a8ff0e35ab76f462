"""The tasks that the trainer knows: each gives the training loop a model, rows, a collator and an evaluation."""

from sera_serve.trainer.task_options import Task
from sera_serve.trainer.tasks.classify import CLASSIFY, ClassifyTask
from sera_serve.trainer.tasks.generate import GENERATE, GenerateTask
from sera_serve.trainer.tasks.image_classify import IMAGE_CLASSIFY
from sera_serve.trainer.tasks.protocol import TaskKind, TrainingTask, check_base_of_texts, row_counts
from sera_serve.trainer.tasks.regress import REGRESS
from sera_serve.trainer.tasks.retrieve import RETRIEVE
from sera_serve.trainer.tasks.token_classify import TOKEN_CLASSIFY, TokenClassifyTask

TASKS: dict[Task, TaskKind] = {
    "classify": CLASSIFY,
    "generate": GENERATE,
    "image-classify": IMAGE_CLASSIFY,
    "retrieve": RETRIEVE,
    "regress": REGRESS,
    "token-classify": TOKEN_CLASSIFY,
}

__all__ = [
    "TASKS",
    "ClassifyTask",
    "GenerateTask",
    "TokenClassifyTask",
    "TrainingTask",
    "check_base_of_texts",
    "row_counts",
]
