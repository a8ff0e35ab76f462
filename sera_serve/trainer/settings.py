"""Every option of a training run: the command line, YAML files and Python callers fill in `TrainSettings`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from adapters_store import parse_adapter, parse_ref
from adapters_store.errors import InvalidAdapterName
from sera_serve.base import Pooling
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import ALL_LINEAR, SeraConfig
from sera_serve.layers.config import Factor

Method = Literal["sera", "lora", "melora", "moslora", "lora-fa", "head-only"]


@dataclass(frozen=True)
class MethodPreset:
    """The settings that a method of the adapter family fixes (paper, table of methods).

    Attributes:
        splits: Whether A and B have more than one diagonal block. The default number of blocks is the rank.
        use_mixer: Whether the mixer C exists.
        train_factors: Factors that train by default.
        adapts: Whether the method trains an adapter; False for head-only.
        learning_rate: The default, from short trials on the embedded base.
    """

    splits: bool = False
    use_mixer: bool = False
    train_factors: tuple[Factor, ...] = ("a", "b")
    adapts: bool = True
    learning_rate: float = 3e-3

    def check(self, rank: int, split: int, train_factors: tuple[Factor, ...] | None) -> None:
        """Refuse a split or trained factors that belong to another method.

        Raises:
            InvalidConfiguration: The message names the method that the values describe.
        """
        if self.splits != (split > 1):
            mixer = "moslora" if self.use_mixer else "lora"
            remedy = (
                f"take a rank of at least 2 and a split above 1, or method {mixer}"
                if self.splits
                else f"leave --split out, or take method {'sera' if self.use_mixer else 'melora'}"
            )
            raise InvalidConfiguration(f"split {split} of rank {rank} does not belong to this method; {remedy}")
        if train_factors is not None and not set(train_factors) <= set(self.train_factors):
            raise InvalidConfiguration(
                f"train_factors is {','.join(train_factors)}; this method trains {','.join(self.train_factors)}",
                param="train_factors",
            )


METHODS: dict[Method, MethodPreset] = {
    # On hwu64 SeRA gained from 0.01 over 0.003, while LoRA of rank 8 no longer learned at 0.01.
    "sera": MethodPreset(splits=True, use_mixer=True, train_factors=("a", "c", "b"), learning_rate=1e-2),
    "lora": MethodPreset(),
    "melora": MethodPreset(splits=True, learning_rate=1e-2),
    "moslora": MethodPreset(use_mixer=True, train_factors=("a", "c", "b")),
    "lora-fa": MethodPreset(train_factors=("b",)),
    "head-only": MethodPreset(train_factors=(), adapts=False, learning_rate=1e-2),
}


Task = Literal["classify", "generate"]
SelectBy = Literal["loss", "accuracy", "macro_f1", "matthews"]

_ONLY_FOR_TASK: dict[Task, tuple[str, ...]] = {
    "classify": ("text_column", "text_pair_column", "label_column", "pooling", "head_learning_rate"),
    "generate": ("prompt_column", "completion_column", "messages_column", "chat_template"),
}
_ADAPTER_SHAPE = ("rank", "split", "lora_alpha", "target_modules", "train_factors")
# What a run keeps of the adapter that it goes on from.
KEPT_BY_INIT = ("method", *_ADAPTER_SHAPE, "pooling")
# These settings change where a run is stored or how it is shown. They do not change the resulting adapter.
# Of files, the contents count.
_NOT_IDENTITY = {
    *("store", "train", "eval", "test", "chat_template"),
    *("work_dir", "resume", "checkpoint_seconds", "description", "log_steps", "init_from"),
}


def _option(default: Any, help_text: str, group: str, **limits: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"group": group}, **limits)


WHAT, DATA, ADAPTER, OPTIMISER, RUN = "What to train", "Data", "Adapter", "Optimisation", "Run"


class TrainSettings(BaseModel):
    """Options of one training run. The descriptions of the fields are the command line's help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = _option(..., 'Frozen base model: "embedded", a folder, or a hub id.', WHAT, min_length=1)
    store: Path = _option(..., "Folder of the adapter store; created if absent.", WHAT)
    name: str = _option(..., "Adapter id, tenant/name; each run publishes its next version.", WHAT)
    task: Task = _option(..., "classify: predict a label for each text. generate: continue a prompt.", WHAT)
    description: str | None = _option(None, "A note kept with the version.", WHAT, max_length=500)
    init_from: str | None = _option(
        None,
        "Adapter of the store to go on from, such as acme/spam or acme/spam@v3; its method, shape, labels and template "
        "are kept.",
        WHAT,
    )

    train: Path = _option(..., "Training rows: .csv, .tsv, .jsonl, .parquet, or .txt (plain text).", DATA)
    eval: Path | None = _option(
        None, "Rows that choose the best epoch; without them a part of --train is held out.", DATA
    )
    test: Path | None = _option(None, "Rows scored once, at the end, with the chosen epoch.", DATA)
    text_column: str = _option("text", "classify: column with the text.", DATA)
    text_pair_column: str | None = _option(
        None,
        "classify: column with a second text, joined to the first by a line break (join them for the server too).",
        DATA,
    )
    label_column: str = _option("label", "classify: column with the label.", DATA)
    prompt_column: str | None = _option(
        None, 'generate: column with the prompt ("prompt" unless --completion-column is given alone).', DATA
    )
    completion_column: str | None = _option(
        None,
        'generate: column with the text to learn ("completion"). Alone: plain text, all of it is learned.',
        DATA,
    )
    messages_column: str | None = _option(
        None, "generate: column with chat turns [{role, content}]; the assistant's turns are learned.", DATA
    )
    chat_template: Path | None = _option(
        None,
        "generate: file with a Jinja template. Rows become chats (prompt: user, completion: assistant); the adapter "
        "keeps the template and answers chats.",
        DATA,
    )
    eval_fraction: float = _option(
        0.1,
        "Part of --train that is held out without --eval; 0: no part, and the last epoch is kept.",
        DATA,
        ge=0,
        le=0.5,
    )
    train_limit: int | None = _option(None, "Train on at most this many rows, drawn by the seed.", DATA, ge=1)
    max_length: int | None = _option(None, "Longest row in tokens (the base's own limit, at most 512).", DATA, ge=8)

    method: Method = _option("sera", "Method of the adapter family; head-only trains no adapter.", ADAPTER)
    rank: int = _option(16, "Width of the reduced vector.", ADAPTER, ge=1, le=4096)
    split: int | None = _option(
        None, "Diagonal blocks of A and B: the rank for sera and melora, 1 for the others.", ADAPTER, ge=1
    )
    lora_alpha: float | None = _option(None, "Update scale is lora_alpha / rank (2 * rank).", ADAPTER, gt=0)
    target_modules: str | tuple[str, ...] = _option(
        ALL_LINEAR, 'Linear layers to adapt: names such as "q_proj,v_proj", or all-linear.', ADAPTER
    )
    train_factors: tuple[Factor, ...] | None = _option(
        None, "Factors that train, out of a,c,b; the default depends on the method.", ADAPTER
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
        None, "classify: learning rate of the head (that of the adapter).", OPTIMISER, gt=0, le=10
    )
    batch_size: int = _option(16, "Rows a step.", OPTIMISER, ge=1, le=4096)
    warmup_ratio: float = _option(0.06, "Part of the steps in which the learning rate rises.", OPTIMISER, ge=0, lt=1)
    weight_decay: float = _option(0.0, "AdamW weight decay.", OPTIMISER, ge=0, le=1)
    select_by: SelectBy | None = _option(
        None, "Metric that chooses the best epoch: accuracy (classify) or loss (generate).", OPTIMISER
    )
    seed: int = _option(0, "Seed of initial values, row order and dropout.", OPTIMISER, ge=0, lt=2**32)

    device: str = _option("cpu", "Torch device: cpu or cuda.", RUN)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "dtype of the frozen base; the adapter trains in float32.", RUN
    )
    work_dir: Path | None = _option(None, "Folder for checkpoints (a folder beside the store).", RUN)
    resume: bool = _option(True, "Continue a killed run of the same settings and data, or start again.", RUN)
    checkpoint_seconds: float = _option(
        15.0, "Least time between checkpoints within an epoch; there is also one after each epoch.", RUN, ge=0
    )
    log_steps: int = _option(10, "Steps between two figures of the loss.", RUN, ge=1)

    @field_validator("name")
    @classmethod
    def _name_is_an_id(cls, value: str) -> str:
        try:
            parse_adapter(value)
        except InvalidAdapterName as error:
            raise ValueError(error.message) from error
        return value

    @field_validator("init_from")
    @classmethod
    def _init_is_a_reference(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                parse_ref(value)
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
            if self.chat_template and self.columns == (None, self.completion_column) and not self.messages_column:
                raise ValueError("--chat-template needs a question for each answer; give --prompt-column too")
            if self.select_by not in (None, "loss"):
                raise ValueError(f"--select-by {self.select_by} is for task classify; generate has only loss")
        if self.init_from is None:
            self._check_method()
        elif given := [field for field in KEPT_BY_INIT if field in self.model_fields_set]:
            raise ValueError(f"--init-from keeps what {flag(given[0])} says; leave {flag(given[0])} out")
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
        """(prompt, completion) columns of task generate, with defaults; (None, None) for chat rows."""
        if self.messages_column:
            return None, None
        if self.completion_column is None:
            return "prompt", "completion"
        return self.prompt_column, self.completion_column

    @property
    def best_metric(self) -> SelectBy:
        """The metric that chooses the best epoch."""
        return self.select_by or ("accuracy" if self.task == "classify" else "loss")

    def adapter_config(self) -> SeraConfig | None:
        """Return the adapter's shape, or None for head-only.

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
        """Return the settings that decide the result, as JSON values. Equal identities and data give equal adapters."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY)

    def default_work_dir(self) -> Path:
        """Return the folder for checkpoints of this adapter: by default beside the store, never inside it."""
        return self.work_dir or self.store.with_name(self.store.name + ".training") / self.name


def flag(field: str) -> str:
    """Return the command line's spelling of a field."""
    return "--" + field.replace("_", "-")


def load_options(config: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Read settings from a YAML file and from flags. A given flag wins over the file.

    Args:
        config: YAML file with the names of the fields as keys, or None.
        flags: Values by name of the field; None means that the flag was not given.

    Raises:
        InvalidConfiguration: The file cannot be read, or an option is unknown, missing or has an impossible value.
    """
    options = _read_yaml(config) if config is not None else {}
    options.update({name: value for name, value in flags.items() if value is not None})
    try:
        return TrainSettings.model_validate(options)
    except ValidationError as error:
        raise InvalidConfiguration(_readable(error), param=_param(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"--config {path} cannot be read: {error}", param="config") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise InvalidConfiguration(f"--config {path} is not valid YAML: {where}", param="config") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidConfiguration(f"--config {path} must hold `option: value` lines", param="config")
    known = TrainSettings.model_fields
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
            raise InvalidConfiguration(f"--config {path}: unknown option {key!r}{hint}", param=str(key))
    return value


def _param(error: ValidationError) -> str | None:
    location = error.errors(include_url=False)[0]["loc"]
    return str(location[0]) if location else None


def _readable(error: ValidationError) -> str:
    missing = [flag(str(e["loc"][0])) for e in error.errors() if e["type"] == "missing"]
    parts = [f"missing {', '.join(missing)}; give it as a flag or in --config"] if missing else []
    for item in error.errors(include_url=False):
        if item["type"] == "missing":
            continue
        text = item["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:] if text.startswith("Input") else text
        where = f"{flag(str(item['loc'][0]))} {item['input']!r}: " if item["loc"] else ""
        parts.append(where + text)
    return "; ".join(dict.fromkeys(parts))
