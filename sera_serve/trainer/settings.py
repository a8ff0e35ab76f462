"""Every option of a training run, in one place: the command line, YAML files and Python callers all fill this in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from adapters_store import parse_adapter
from adapters_store.errors import InvalidAdapterName
from sera_serve.base import Pooling
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import ALL_LINEAR, SeraConfig
from sera_serve.layers.config import Factor
from sera_serve.trainer.methods import METHODS, Method

Task = Literal["classify", "generate"]
SelectBy = Literal["loss", "accuracy", "macro_f1", "matthews"]

_ONLY_FOR_TASK: dict[Task, tuple[str, ...]] = {
    "classify": ("text_column", "text_pair_column", "label_column", "pooling", "head_learning_rate"),
    "generate": ("prompt_column", "completion_column", "messages_column"),
}
_ADAPTER_SHAPE = ("rank", "split", "lora_alpha", "target_modules", "train_factors")
# What changes where a run is kept or how it is watched, but not the adapter that comes out.
_NOT_IDENTITY = {"store", "train", "eval", "test", "work_dir", "resume", "checkpoint_seconds", "description"}


def _option(default: Any, help_text: str, group: str, **limits: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"group": group}, **limits)


WHAT, DATA, ADAPTER, OPTIMISER, RUN = "What to train", "Data", "Adapter", "Optimisation", "Run"


class TrainSettings(BaseModel):
    """Options of one training run; field descriptions are the command line's help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = _option(..., 'Frozen base model: "embedded", a folder, or a hub id.', WHAT, min_length=1)
    store: Path = _option(..., "Folder of the adapter store; made if absent.", WHAT)
    name: str = _option(..., "Adapter id, tenant/name; each run publishes its next version.", WHAT)
    task: Task = _option(..., "classify: a label for each text. generate: text that continues a prompt.", WHAT)
    description: str | None = _option(None, "A note kept with the version.", WHAT, max_length=500)

    train: Path = _option(..., "Training rows: .csv, .tsv, .jsonl, .parquet, or .txt (plain text).", DATA)
    eval: Path | None = _option(None, "Rows that choose the best epoch; else a part of --train is held out.", DATA)
    test: Path | None = _option(None, "Rows scored once, at the end, with the chosen epoch.", DATA)
    text_column: str = _option("text", "classify: column with the text.", DATA)
    text_pair_column: str | None = _option(
        None,
        "classify: second text, joined to the first by a line break (send it so to the server too).",
        DATA,
    )
    label_column: str = _option("label", "classify: column with the label.", DATA)
    prompt_column: str | None = _option(
        None, 'generate: column with the prompt ("prompt" unless --completion-column is given alone).', DATA
    )
    completion_column: str | None = _option(
        None,
        'generate: column to learn to write ("completion"). Alone: plain text, all of it is learned.',
        DATA,
    )
    messages_column: str | None = _option(
        None, "generate: column with chat turns [{role, content}]; the assistant's are learned.", DATA
    )
    eval_fraction: float = _option(
        0.1,
        "Part of --train held out when there is no --eval; 0: none, the last epoch is kept.",
        DATA,
        ge=0,
        le=0.5,
    )
    train_limit: int | None = _option(None, "Train on at most this many rows, drawn by the seed.", DATA, ge=1)
    max_length: int | None = _option(None, "Longest row in tokens (the base's own limit, at most 512).", DATA, ge=8)

    method: Method = _option("sera", "Member of the adapter family; head-only trains no adapter.", ADAPTER)
    rank: int = _option(16, "Width of the reduced vector.", ADAPTER, ge=1, le=4096)
    split: int | None = _option(
        None, "Diagonal blocks of A and B: the rank for sera and melora, 1 for the others.", ADAPTER, ge=1
    )
    lora_alpha: float | None = _option(None, "Update scale is lora_alpha / rank (2 * rank).", ADAPTER, gt=0)
    target_modules: str | tuple[str, ...] = _option(
        ALL_LINEAR, 'Linear layers to adapt: names such as "q_proj,v_proj", or all-linear.', ADAPTER
    )
    train_factors: tuple[Factor, ...] | None = _option(
        None, "Factors that train, of a,c,b; by default those of the method.", ADAPTER
    )
    pooling: Pooling | None = _option(None, "classify: last_token (decoders), cls (encoders) or mean.", ADAPTER)
    dropout: float = _option(0.0, "Dropout on the inputs of adapter and head.", ADAPTER, ge=0, lt=1)

    epochs: int = _option(3, "Passes over the training rows.", OPTIMISER, ge=1, le=1000)
    learning_rate: float | None = _option(
        None,
        "Peak learning rate; it falls linearly to 0 (0.01 for sera, melora and head-only, 0.003 for the others).",
        OPTIMISER,
        gt=0,
        le=10,
    )
    head_learning_rate: float | None = _option(
        None, "classify: learning rate of the head, if another than the adapter's.", OPTIMISER, gt=0, le=10
    )
    batch_size: int = _option(16, "Rows a step.", OPTIMISER, ge=1, le=4096)
    warmup_ratio: float = _option(0.06, "Part of the steps in which the rate rises.", OPTIMISER, ge=0, lt=1)
    weight_decay: float = _option(0.0, "AdamW weight decay.", OPTIMISER, ge=0, le=1)
    select_by: SelectBy | None = _option(
        None, "What makes an epoch the best: accuracy (classify) or loss (generate).", OPTIMISER
    )
    seed: int = _option(0, "Seed of initial values, row order and dropout.", OPTIMISER, ge=0, lt=2**32)

    device: str = _option("cpu", "Torch device: cpu or cuda.", RUN)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "dtype of the frozen base; the adapter trains in float32.", RUN
    )
    work_dir: Path | None = _option(None, "Folder for checkpoints (a sibling of the store).", RUN)
    resume: bool = _option(True, "Continue a killed run of the same settings and data, or begin anew.", RUN)
    checkpoint_seconds: float = _option(
        15.0, "Least time between checkpoints within an epoch; each epoch's end saves too.", RUN, ge=0
    )

    @field_validator("name")
    @classmethod
    def _name_is_an_id(cls, value: str) -> str:
        try:
            parse_adapter(value)
        except InvalidAdapterName as error:
            raise ValueError(error.message) from error
        return value

    @field_validator("target_modules", "train_factors", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and not (info.field_name == "target_modules" and value == ALL_LINEAR):
            value = value.split(",")
        if isinstance(value, list):
            return tuple(part.strip() if isinstance(part, str) else part for part in value)
        return value

    @model_validator(mode="after")
    def _options_agree(self) -> TrainSettings:
        for task, fields in _ONLY_FOR_TASK.items():
            for field in fields:
                if task != self.task and getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(f"{flag(field)} is for task {task}; leave it out for {self.task}")
        if self.task == "generate":
            if self.messages_column and (self.prompt_column or self.completion_column):
                raise ValueError("--messages-column excludes --prompt-column and --completion-column; give one kind")
            if self.prompt_column and not self.completion_column:
                raise ValueError("--prompt-column needs --completion-column: the text to learn to write")
            if self.select_by not in (None, "loss"):
                raise ValueError(f"--select-by {self.select_by} is for task classify; generate has only loss")
        self._check_method()
        return self

    def _check_method(self) -> None:
        method = METHODS[self.method]
        if not method.adapts:
            if self.task == "generate":
                raise ValueError("method head-only has no head to train for task generate; choose sera or lora")
            given = [field for field in _ADAPTER_SHAPE if field in self.model_fields_set]
            if given:
                raise ValueError(f"{flag(given[0])} has no meaning for method head-only; leave it out")
            return
        try:
            method.check(self.rank, self.effective_split, self.train_factors)
            self.adapter_config()
        except InvalidConfiguration as error:
            raise ValueError(error.message) from error

    @property
    def effective_split(self) -> int:
        """`split`, or the method's default for this rank."""
        return self.split or (self.rank if METHODS[self.method].splits else 1)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the method's default."""
        return self.learning_rate or METHODS[self.method].learning_rate

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """(prompt, completion) columns of task generate, defaults filled in; (None, None) for chat rows."""
        if self.messages_column:
            return None, None
        if self.completion_column is None:
            return "prompt", "completion"
        return self.prompt_column, self.completion_column

    @property
    def best_metric(self) -> SelectBy:
        """The metric that chooses the epoch."""
        return self.select_by or ("accuracy" if self.task == "classify" else "loss")

    def adapter_config(self) -> SeraConfig | None:
        """The adapter's shape, or None for head-only.

        Raises:
            InvalidConfiguration: Rank and split do not fit each other.
        """
        method = METHODS[self.method]
        if not method.adapts:
            return None
        return SeraConfig(
            rank=self.rank,
            split=self.effective_split,
            lora_alpha=self.lora_alpha or 2.0 * self.rank,
            target_modules=cast(Any, self.target_modules),
            use_mixer=method.use_mixer,
            dropout=self.dropout,
            train_factors=self.train_factors or method.train_factors,
        )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out, as JSON values: equal identities and data give equal adapters."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY)

    def default_work_dir(self) -> Path:
        """Where checkpoints of this adapter go unless told: beside the store, never inside it."""
        return self.work_dir or self.store.with_name(self.store.name + ".training") / self.name


def flag(field: str) -> str:
    """The command line's spelling of a field."""
    return "--" + field.replace("_", "-")
