"""The tasks of the trainer: what each is, its options and its metrics."""

from __future__ import annotations

from itertools import chain
from typing import Literal

Task = Literal["classify", "generate", "regress", "token-classify", "image-classify", "retrieve"]
RowFormat = Literal["alpaca", "chatml", "sharegpt", "prompt-completion", "text"]
SelectBy = Literal[
    "loss",
    "accuracy",
    "macro_f1",
    "matthews",
    "micro_f1",
    "subset_accuracy",
    "pearson",
    "spearman",
    "mse",
    "f1",
    "precision",
    "recall",
    "token_accuracy",
    "rsum",
]
LOWER_IS_BETTER: tuple[SelectBy, ...] = ("loss", "mse")

# Options that belong to some tasks only, and the metrics that may choose the best epoch; the first is the default.
TASK_OPTIONS: dict[Task, tuple[str, ...]] = {
    "classify": (
        *("text_column", "text_pair_column", "label_column", "max_length"),
        *("pooling", "head_learning_rate", "multi_label", "label_separator"),
    ),
    "regress": ("text_column", "text_pair_column", "label_column", "max_length", "pooling", "head_learning_rate"),
    "token-classify": (
        *("text_column", "spans_column", "tokens_column", "tags_column", "max_length", "head_learning_rate"),
    ),
    "generate": (
        *("format", "prompt_column", "completion_column", "messages_column", "max_length", "chat_template", "packing"),
    ),
    "image-classify": (
        *("image_column", "images", "label_column", "pooling", "head_learning_rate", "augment"),
        *("multi_label", "label_separator"),
    ),
    "retrieve": ("image_column", "images", "caption_column", "max_length", "margin", "augment"),
}
TASK_METRICS: dict[Task, tuple[SelectBy, ...]] = {
    "classify": ("accuracy", "loss", "macro_f1", "matthews"),
    "generate": ("loss",),
    "regress": ("pearson", "loss", "spearman", "mse"),
    "token-classify": ("f1", "loss", "precision", "recall", "token_accuracy"),
    "image-classify": ("accuracy", "loss", "macro_f1", "matthews"),
    "retrieve": ("rsum", "loss"),
}
# Further metrics of a run, which are reported and choose no epoch.
REPORTED_METRICS: dict[Task, tuple[str, ...]] = {
    "generate": ("perplexity", "bits_per_byte"),
    "retrieve": ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"),
}
# In place of the task's own, where labels do not exclude each other.
MULTI_LABEL_METRICS: tuple[SelectBy, ...] = ("micro_f1", "loss", "macro_f1", "subset_accuracy")
# Query and value of both towers, as in the paper's experiment 2.
RETRIEVE_TARGETS = ("q_proj", "v_proj")
# The columns that an option may name for each format, and where chats are if no option says so.
FORMAT_COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("messages_column",),
    "sharegpt": ("messages_column",),
    "prompt-completion": ("prompt_column", "completion_column"),
    "text": ("completion_column",),
}
CHAT_COLUMNS: dict[str | None, str] = {"chatml": "messages", "sharegpt": "conversations"}
TASK_HELP = (
    "classify: predict a label for each text. regress: a number for each text. token-classify: find spans in a text, "
    "such as names. generate: continue a prompt. image-classify: predict a label for each image. retrieve: find images "
    "by their captions, and captions by their images."
)


def options_of_others(task: Task) -> list[str]:
    """The options of other tasks that this one has not."""
    return [name for name in dict.fromkeys(chain(*TASK_OPTIONS.values())) if name not in TASK_OPTIONS[task]]
