"""Every option of a training run: the command line, YAML files and Python callers fill in `TrainSettings`."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from adapters_store import MOST_RANK, Pooling, parse_adapter, parse_ref
from adapters_store.errors import InvalidAdapterName
from adapters_store.format.config import Method as StoredMethod
from sera_serve.errors import InvalidConfiguration
from sera_serve.quantization import Quantize
from sera_serve.sera_config import ALL_LINEAR, Factor, SeraConfig
from sera_serve.trainer.methods import DEFAULT_METHOD, METHODS, Method, MethodPreset
from sera_serve.trainer.option_text import check_options, flag, param_of, read_yaml, readable
from sera_serve.trainer.pattern_options import PATTERN_OPTIONS, parse_pattern
from sera_serve.trainer.schedule import SCHEDULE
from sera_serve.trainer.task_options import (
    CHAT_COLUMNS,
    FORMAT_COLUMNS,
    MULTI_LABEL_METRICS,
    RETRIEVE_TARGETS,
    TASK_HELP,
    TASK_METRICS,
    TASK_OPTIONS,
    RowFormat,
    SelectBy,
    Task,
    options_of_others,
)

_ADAPTER_SHAPE = ("rank", "split", "lora_alpha", "target_modules", "train_factors", *PATTERN_OPTIONS)
_ALLOCATION = ("budget", "budget_warmup", "budget_final")
# Codecs of domain names, which decode no file.
_ENCODINGS_OF_NAMES = ("idna", "punycode")
# Their decoders give halves of surrogate pairs, which no tokenizer takes. The other encodings of Python refuse them.
_ENCODINGS_OF_HALVES = ("utf-7", "unicode-escape", "raw-unicode-escape")
# What a run keeps of the adapter that it goes on from.
KEPT_BY_INIT = ("method", *_ADAPTER_SHAPE, "pooling")
# Options that name a file or a folder, or perhaps a data set of the hub.
FILES = ("train", "eval", "test", "chat_template", "images")
# These settings change where a run is stored or how it is shown. They do not change the resulting adapter.
# Of files, the contents count.
_NOT_IDENTITY = {
    *FILES,
    *("store", "work_dir", "resume", "checkpoint_seconds", "description", "log_steps", "init_from"),
    *("plot", "tensorboard"),
}


def _option(default: Any, help_text: str, group: str, **limits: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"group": group}, **limits)


WHAT, DATA, ADAPTER, OPTIMISER, RUN = "What to train", "Data", "Adapter", "Optimisation", "Run"


def group_of(field: FieldInfo) -> str:
    """The group of an option of `TrainSettings`, under which help and files show it."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


class TrainSettings(BaseModel):
    """Options of one training run. The descriptions of the fields are the command line's help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = _option(..., 'Frozen base model: "embedded", a folder, or a hub id.', WHAT, min_length=1)
    store: Path = _option(..., "Folder of the adapter store; created if absent.", WHAT)
    name: str = _option(..., "Adapter id, tenant/name; each run publishes its next version.", WHAT)
    task: Task = _option(..., TASK_HELP, WHAT)
    description: str | None = _option(None, "A note kept with the version.", WHAT, max_length=500)
    init_from: str | None = _option(
        None,
        "Adapter of the store to go on from, such as acme/spam or acme/spam@v3; its method, shape, labels and template "
        "are kept.",
        WHAT,
    )

    train: Path = _option(
        ...,
        "Training rows: .csv, .tsv, .jsonl, .json, .parquet or .txt (plain text), perhaps with .gz, .bz2, .xz or .zst; "
        "a folder that datasets saved; or hub:owner/name.",
        DATA,
    )
    eval: Path | None = _option(
        None, "Rows that choose the best epoch; without them a part of --train is held out.", DATA
    )
    test: Path | None = _option(None, "Rows scored once, at the end, with the chosen epoch.", DATA)
    text_column: str = _option("text", "classify, regress, token-classify: column with the text.", DATA)
    text_pair_column: str | None = _option(
        None,
        "classify, regress: column with a second text; the tokenizer makes a pair of the two, here and on the server.",
        DATA,
    )
    label_column: str = _option(
        "label", "classify, image-classify: column with the label. regress: with the number.", DATA
    )
    multi_label: bool = _option(
        False,
        "classify, image-classify: a row may have several labels, or none: a list in each cell, or text with "
        "--label-separator.",
        DATA,
    )
    label_separator: str = _option(
        "|", "--multi-label: what separates the labels in a cell of text.", DATA, min_length=1, max_length=8
    )
    spans_column: str | None = _option(
        None, 'token-classify: column with the spans [{start, end, label}] of the text ("spans").', DATA
    )
    tokens_column: str | None = _option(
        None, 'token-classify: column with the words of a text, in place of a text and its spans ("tokens").', DATA
    )
    tags_column: str | None = _option(None, 'token-classify: column with the BIO tag of each word ("tags").', DATA)
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
    image_column: str = _option(
        "image", "image-classify, retrieve: column with the image: a path, or the bytes of a file.", DATA
    )
    images: Path | None = _option(
        None,
        "image-classify, retrieve: folder or .zip that the paths of images start from (the folder of the file).",
        DATA,
    )
    caption_column: str = _option("caption", "retrieve: column with a caption, or a list of captions.", DATA)
    augment: bool = _option(
        False,
        "image-classify, retrieve: random resized crops and horizontal flips of the training images.",
        DATA,
    )
    format: RowFormat | None = _option(
        None,
        "generate: what the rows are like. alpaca: instruction, input, output. chatml: messages [{role, content}]. "
        "sharegpt: conversations [{from, value}]. prompt-completion. text: all of it is learned.",
        DATA,
    )
    delimiter: str | None = _option(
        None, "Character between two fields of a .csv or .tsv (by the suffix and the header).", DATA
    )
    encoding: str | None = _option(
        None, "Encoding of text files, such as utf-16 or cp1252 (by the byte order mark, or UTF-8).", DATA
    )
    packing: bool = _option(
        False, "generate: put several short rows of a step into one sequence; no row sees another one.", DATA
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

    method: Method = _option(DEFAULT_METHOD, "Method of the adapter family; head-only trains no adapter.", ADAPTER)
    rank: int = _option(16, "Width of the reduced vector.", ADAPTER, ge=1, le=MOST_RANK)
    split: int | None = _option(
        None, "Diagonal blocks of A and B: 1 for lora, lora-fa and moslora, the rank for the others.", ADAPTER, ge=1
    )
    lora_alpha: float | None = _option(None, "Update scale is lora_alpha / rank (2 * rank).", ADAPTER, gt=0)
    target_modules: str | tuple[str, ...] = _option(
        ALL_LINEAR,
        'Linear layers to adapt: names or patterns such as "q_proj,layers.0.*.v_proj", or all-linear. '
        "For retrieve: q_proj,v_proj.",
        ADAPTER,
    )
    rank_pattern: tuple[tuple[str, int], ...] | None = _option(
        None, "Rank by module, such as q_proj=8,layers.0.*.v_proj=4; the last match wins.", ADAPTER
    )
    split_pattern: tuple[tuple[str, int], ...] | None = _option(
        None, "Split by module, in the form of --rank-pattern.", ADAPTER
    )
    alpha_pattern: tuple[tuple[str, float], ...] | None = _option(
        None, "lora_alpha by module, in the form of --rank-pattern.", ADAPTER
    )
    train_factors: tuple[Factor, ...] | None = _option(
        None, "Factors that train, out of a,c,b; the default depends on the method.", ADAPTER
    )
    budget: float | None = _option(
        None,
        "Mean rank of a layer at the end: training starts with --rank, and the ranks go to the layers that need them. "
        "Units have the rank of --split. Its default: 1 for lora, lora-fa and moslora, the greatest common divisor of "
        "rank and budget for the others.",
        ADAPTER,
        gt=0,
        le=MOST_RANK,
    )
    budget_warmup: float = _option(0.1, "Part of the steps before the ranks fall.", ADAPTER, ge=0, lt=1)
    budget_final: float = _option(0.5, "Part of the steps after the ranks have fallen.", ADAPTER, gt=0, lt=1)
    pooling: Pooling | None = _option(
        None,
        "classify, regress: last_token (decoders), cls (encoders) or mean. image-classify: cls or mean.",
        ADAPTER,
    )
    dropout: float = _option(0.0, "Dropout on the inputs of adapter and head.", ADAPTER, ge=0, lt=1)

    epochs: int = _option(3, "Passes over the training rows.", OPTIMISER, ge=1, le=1000)
    learning_rate: float | None = _option(
        None,
        "Peak learning rate; it falls linearly to 0 (0.003 for lora, lora-fa and moslora, 0.01 for the others).",
        OPTIMISER,
        gt=0,
        le=10,
    )
    head_learning_rate: float | None = _option(
        None, "Learning rate of the head (that of the adapter).", OPTIMISER, gt=0, le=10
    )
    lora_plus_ratio: float | None = _option(
        None,
        "LoRA+: the learning rate of B is this many times that of A and C (16 is a usual choice).",
        OPTIMISER,
        gt=0,
        le=1000,
    )
    batch_size: int = _option(16, "Rows a step.", OPTIMISER, ge=1, le=4096)
    warmup_ratio: float = _option(0.06, "Part of the steps in which the learning rate rises.", OPTIMISER, ge=0, lt=1)
    weight_decay: float = _option(0.0, "AdamW weight decay.", OPTIMISER, ge=0, le=1)
    optimizer: Literal["adamw", "paged-adamw"] = _option(
        "adamw", "adamw, or bitsandbytes' paged AdamW, whose moments may leave a full GPU (CUDA).", OPTIMISER
    )
    select_by: SelectBy | None = _option(
        None,
        "Metric that chooses the best epoch: accuracy (classify, image-classify; micro_f1 with --multi-label), pearson "
        "(regress), f1 (token-classify), rsum (retrieve) or loss (generate).",
        OPTIMISER,
    )
    margin: float = _option(
        0.2, "retrieve: how much more similar a caption must be to its image than to any other.", OPTIMISER, gt=0, le=2
    )
    patience: int | None = _option(
        None,
        "Stop after this many evaluations in a row without a new best epoch, which is kept.",
        OPTIMISER,
        ge=1,
    )
    seed: int = _option(0, "Seed of initial values, row order and dropout.", OPTIMISER, ge=0, lt=2**32)

    device: Literal["cpu", "cuda"] = _option(
        "cpu", "Torch device. Of several GPUs the first is taken; CUDA_VISIBLE_DEVICES=1 shows the second alone.", RUN
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "dtype of the frozen base; the adapter trains in float32.", RUN
    )
    quantize: Quantize = _option(
        "none", "What the frozen base's linear layers are kept in: nf4, int8 or int4 (extra quant).", RUN
    )
    checkpoint_activations: bool = _option(
        False, "Keep the input of each block alone, and compute the rest again in the backward pass.", RUN
    )
    work_dir: Path | None = _option(None, "Folder for checkpoints (a folder beside the store).", RUN)
    resume: bool = _option(True, "Continue a killed run of the same settings and data, or start again.", RUN)
    checkpoint_seconds: float = _option(
        15.0, "Least time between checkpoints within an epoch; there is also one after each epoch.", RUN, ge=0
    )
    log_steps: int = _option(
        10, "Steps between two figures of the loss; there is also one after each epoch.", RUN, ge=1
    )
    plot: Path | None = _option(None, "PNG file for the curves of loss and metrics, drawn at the end.", RUN)
    tensorboard: Path | None = _option(
        None, "Folder for TensorBoard's events; each adapter and each set of options gets a folder in it.", RUN
    )

    @model_validator(mode="before")
    @classmethod
    def _retrieve_adapts_query_and_value(cls, values: Any) -> Any:
        # A value of its own, so that the default and "all-linear" are different runs.
        if isinstance(values, dict) and values.get("task") == "retrieve" and not values.get("init_from"):
            return {"target_modules": RETRIEVE_TARGETS} | values
        return values

    @field_validator("name", "init_from")
    @classmethod
    def _names_an_adapter(cls, value: str | None, info: ValidationInfo) -> str | None:
        try:
            if value is not None:
                (parse_adapter if info.field_name == "name" else parse_ref)(value)
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

    @field_validator("plot")
    @classmethod
    def _plot_is_a_png(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix.lower() != ".png":
            raise ValueError("curves are drawn as PNG; name a file that ends in .png")
        return value

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_a_character(cls, value: str | None) -> str | None:
        if value in ("\\t", "tab"):
            return "\t"
        if value is not None and (len(value) != 1 or value in '"\r\n' or not value.isascii()):
            raise ValueError('it must be one ASCII character other than a quote or a line end, such as ";" or "\\t"')
        return value

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, value: str | None) -> str | None:
        try:
            # An encoding of bytes, such as hex, is refused too.
            "\n".encode(value or "utf-8")
            known = codecs.lookup(value or "utf-8").name
            if known in _ENCODINGS_OF_NAMES:
                raise LookupError(known)
        except LookupError as error:
            raise ValueError(
                "it is no encoding of text that Python knows; take one such as utf-8, utf-16, cp1252 or latin1"
            ) from error
        if known in _ENCODINGS_OF_HALVES:
            raise ValueError("it can write half of a surrogate pair, which is no text; save the file as UTF-8")
        return value

    @field_validator(*PATTERN_OPTIONS, mode="before")
    @classmethod
    def _pattern(cls, value: Any, info: ValidationInfo) -> Any:
        return parse_pattern(str(info.field_name), value)

    @model_validator(mode="after")
    def _options_agree(self) -> TrainSettings:
        self._check_task_options()
        if self.eval and self.eval_fraction and "eval_fraction" in self.model_fields_set:
            raise ValueError("--eval-fraction holds a part of --train out without --eval; leave one of the two out")
        # A folder of images may have a part for evaluation.
        has_none = not (self.eval or self.eval_fraction or self.task == "image-classify")
        if has_none and (option := self.needs_evaluations) is not None:
            raise ValueError(f"{flag(option)} needs evaluations; give --eval or an --eval-fraction above 0")
        if self.patience is not None and self.budget is not None:
            raise ValueError("--patience cannot end a run early whose ranks fall to --budget; leave one of the two out")
        if self.optimizer == "paged-adamw" and self.device == "cpu":
            raise ValueError("--optimizer paged-adamw pages to and from a GPU, and --device is cpu; take adamw")
        if self.task == "generate":
            self._check_format()
            if self.messages_column and (self.prompt_column or self.completion_column):
                raise ValueError("--messages-column excludes --prompt-column and --completion-column; give one kind")
            if self.prompt_column and not self.completion_column:
                raise ValueError("--prompt-column needs --completion-column: the text to learn to write")
            # A completion alone is a plain text.
            if self.chat_template and self.completion_column is not None and self.prompt_column is None:
                raise ValueError("--chat-template needs a question for each answer; give --prompt-column too")
        if self.task == "retrieve" and self.batch_size < 2:
            raise ValueError("--batch-size 1 leaves an image no other caption to be told from; take at least 2")
        if self.spans_column is not None and self.has_words:
            raise ValueError("--spans-column excludes --tokens-column and --tags-column; give one kind")
        if self.text_column != "text" and self.has_words:
            raise ValueError("--text-column is not read beside --tokens-column and --tags-column; leave it out")
        if self.label_separator != "|" and not self.multi_label:
            raise ValueError("--label-separator is for --multi-label; give it too, or leave the separator out")
        if self.init_from is None:
            self._check_method()
        elif given := self._given(KEPT_BY_INIT):
            raise ValueError(f"--init-from keeps what {flag(given[0])} says; leave {flag(given[0])} out")
        if self.budget is None and (given := self._given(_ALLOCATION)):
            raise ValueError(f"{flag(given[0])} belongs to --budget; give --budget too, or leave it out")
        if self.budget_warmup + self.budget_final >= 1:
            raise ValueError("--budget-warmup and --budget-final leave no step between them; their sum must be below 1")
        return self

    def _given(self, fields: Iterable[str]) -> list[str]:
        """Those of the fields that were given. In a file, null is the default of a field, as if it were left out."""
        return [field for field in fields if field in self.model_fields_set and getattr(self, field) is not None]

    def _check_format(self) -> None:
        if self.format is None:
            return
        given = [name for name in ("prompt_column", "completion_column", "messages_column") if getattr(self, name)]
        for name in given:
            if name not in FORMAT_COLUMNS[self.format]:
                raise ValueError(f"{flag(name)} is not for --format {self.format}; leave one of them out")
        if self.format == "prompt-completion" and len(given) == 1:
            raise ValueError("--format prompt-completion needs both --prompt-column and --completion-column, or none")
        if self.format == "text" and self.chat_template:
            raise ValueError("--chat-template needs a question for each answer, which --format text has not")

    def _check_task_options(self) -> None:
        for field in options_of_others(self.task):
            if getattr(self, field) != type(self).model_fields[field].default:
                tasks = [task for task, fields in TASK_OPTIONS.items() if field in fields]
                word = "task" if len(tasks) == 1 else "tasks"
                raise ValueError(f"{flag(field)} is for {word} {', '.join(tasks)}; leave it out for {self.task}")
        metrics = self.metrics
        if self.select_by not in (None, *metrics):
            raise ValueError(
                f"--select-by {self.select_by} is no metric of task {self.task}; take {', '.join(metrics)}"
            )

    def _check_method(self) -> None:
        method = METHODS[self.method]
        if not method.adapts and self.task in ("generate", "retrieve"):
            raise ValueError(f"method head-only has no head to train for task {self.task}; choose sera or lora")
        if not method.adapts and (given := self._given(_ADAPTER_SHAPE)):
            raise ValueError(f"{flag(given[0])} has no meaning for method head-only; leave it out")
        try:
            if method.adapts:
                self.check_shape(self.rank, self.split_of(self.rank))
                # It refuses a split that does not divide the rank.
                self.adapter_config()
            self.check_use(method, self.train_factors or method.train_factors)
        except InvalidConfiguration as error:
            raise ValueError(error.message) from error

    def check_use(self, method: MethodPreset, trained: tuple[Factor, ...]) -> None:
        """Refuse options that have no meaning for a method with these trained factors.

        Raises:
            InvalidConfiguration: The message names the option.
        """
        fault, param = None, "lora_plus_ratio"
        if not method.adapts:
            given = self._given((*_ALLOCATION, "lora_plus_ratio"))
            if self.augment:
                fault, param = "--augment is not for method head-only, which reads each image once", "augment"
            elif given:
                fault, param = f"{flag(given[0])} has no meaning for method head-only", given[0]
            elif self.head_learning_rate is not None and self.learning_rate is not None:
                fault = "--learning-rate is not read by method head-only beside --head-learning-rate"
                param = "learning_rate"
        elif self.lora_plus_ratio is not None and "b" not in trained:
            fault = "--lora-plus-ratio sets the learning rate of B, and B does not train"
        if fault is not None:
            raise InvalidConfiguration(f"{fault}; leave it out", param=param)

    def check_shape(self, rank: int, split: int) -> None:
        """Refuse a rank and a split that belong to another method.

        Raises:
            InvalidConfiguration: The message names the method that the values describe.
        """
        method = METHODS[self.method]
        if method.splits and split == 1 < rank and self.split is None and self.budget is not None:
            raise InvalidConfiguration(
                f"split 1 of rank {rank} does not belong to this method; without --split it is the greatest common "
                f"divisor of the rank and --budget {self.budget:g}: give --split, or another --budget"
            )
        method.check(rank, split, self.train_factors)

    def split_of(self, rank: int) -> int:
        """`split`, or the method's default for a layer of this rank."""
        if self.split or not METHODS[self.method].splits:
            return self.split or 1
        # Units of rank allocation have the rank of the split. Equal shares of the budget are then whole units.
        return rank if self.budget is None else math.gcd(rank, math.floor(self.budget))

    @property
    def stored_method(self) -> StoredMethod:
        """The method that the bundle names."""
        return METHODS[self.method].stored or cast(StoredMethod, self.method)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the method's default."""
        return self.learning_rate or METHODS[self.method].learning_rate

    @property
    def augment_seed(self) -> int | None:
        """Seed of crops and flips of the training images; None for none."""
        return self.seed if self.augment else None

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """(prompt, completion) columns of task generate, with defaults; (None, None) for chat rows and for alpaca."""
        if self.chat_column or self.format == "alpaca":
            return None, None
        if self.format == "text":
            return None, self.completion_column or "text"
        if self.completion_column is None:
            return "prompt", "completion"
        return self.prompt_column, self.completion_column

    @property
    def needs_evaluations(self) -> str | None:
        """The option that was given and has no meaning without evaluations; None where there is none."""
        return next(iter(self._given(("patience", "select_by"))), None)

    @property
    def has_words(self) -> bool:
        """Whether the rows of token-classify are words and their tags, not a text and its spans."""
        return self.tokens_column is not None or self.tags_column is not None

    @property
    def metrics(self) -> tuple[SelectBy, ...]:
        """The metrics of the task; the first is the default of `select_by`."""
        return MULTI_LABEL_METRICS if self.multi_label else TASK_METRICS[self.task]

    @property
    def chat_column(self) -> str | None:
        """The column with the turns of a chat, or None for other rows."""
        if self.format in CHAT_COLUMNS:
            return self.messages_column or CHAT_COLUMNS[self.format]
        return self.messages_column

    @property
    def best_metric(self) -> SelectBy:
        """The metric that chooses the best epoch."""
        return self.select_by or self.metrics[0]

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
            split=self.split_of(self.rank),
            lora_alpha=self.lora_alpha or 2.0 * self.rank,
            target_modules=cast(Any, self.target_modules),
            use_mixer=method.use_mixer,
            dropout=self.dropout,
            train_factors=self.train_factors or method.train_factors,
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides the result, as JSON values: settings, and the schedule of the learning rate by its name.

        Equal identities and data give equal adapters.
        """
        left_out = _NOT_IDENTITY.union(options_of_others(self.task))
        return self.model_dump(mode="json", exclude=left_out) | {"schedule": SCHEDULE}

    def default_work_dir(self) -> Path:
        """Return the folder for checkpoints of this adapter: by default beside the store, never inside it."""
        return self.work_dir or self.folder_beside_store / self.name

    @property
    def folder_beside_store(self) -> Path:
        """What training keeps of unfinished runs is here, unless `work_dir` is given."""
        # The store may be given as `.` or `..`. A link to it is not followed.
        return Path(f"{os.path.abspath(self.store)}.training")  # noqa: PTH100


def load_options(config: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Read settings from a YAML file and from flags. A given flag wins over the file.

    Args:
        config: YAML file with the names of the fields as keys, or None.
        flags: Values by name of the field; None means that the flag was not given.

    Raises:
        InvalidConfiguration: The file cannot be read, or an option is unknown, missing or has an impossible value.
    """
    options: dict[str, Any] = {}
    if config is not None and (value := read_yaml(config, "--config", "config")) is not None:
        options = check_options(value, f"--config {config}", "config", TrainSettings.model_fields)
    options |= {name: value for name, value in flags.items() if value is not None}
    try:
        return TrainSettings.model_validate(options)
    except ValidationError as error:
        raise InvalidConfiguration(readable(error), param=param_of(error)) from error
