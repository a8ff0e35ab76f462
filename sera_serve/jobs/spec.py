"""What a job trains: resolved when the job is made, kept with it, and turned into the trainer's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from adapters_store import AdapterConfig, BaseInfo, ModuleSpec
from sera_serve.base import Quantize
from sera_serve.errors import InvalidConfiguration
from sera_serve.jobs.rows import KINDS, JobTask, RowKind
from sera_serve.trainer.initial import check_initial
from sera_serve.trainer.initial import method_of as method_of
from sera_serve.trainer.methods import DEFAULT_METHOD, METHODS, Method
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.packages import check_packages
from sera_serve.trainer.patterns import shapes_by_path, total_ranks
from sera_serve.trainer.settings import KEPT_BY_INIT, TrainSettings, load_options

TRAINING_NAME, VALIDATION_NAME = "training_file.jsonl", "validation_file.jsonl"
"""What a job's own directory calls its two files. Messages of the trainer show these names."""
BYTES_A_NUMBER = 4
"""The trainer stores float32."""
# Steps whose loss becomes an event, at most about.
_MOST_POINTS = 300
_CHECKPOINT_S = 10.0
# A classifier has no fewer.
_FEWEST_LABELS = 2
# Options of the trainer's command line, as a job's body names them, besides those of `SHAPE`.
_WORDS = (
    ("lower --learning-rate", "lower learning_rate_multiplier: this is the rate"),
    (" and run again with --no-resume", ""),
    ("--messages-column", "messages"),
    ("--eval-fraction 0", "more rows"),
    ("--label-column", "the labels"),
    ("--label-separator", "the lists of labels"),
    ("--spans-column or --tags-column", "their spans"),
    ("--eval", "validation_file"),
    ("--train", "training_file"),
    ("--init-from", "model"),
    ("--task", "adapter.task"),
)
SHAPE = (
    *("method", "rank", "split", "lora_alpha", "target_modules", "rank_pattern", "split_pattern", "alpha_pattern"),
    *("train_factors", "lora_plus_ratio", "budget", "budget_warmup", "budget_final", "pooling"),
)
"""Fields of a job's `adapter` that are options of the trainer, under the same names."""
KEPT = tuple(name for name in SHAPE if name in KEPT_BY_INIT)
"""Those of them that a job keeps of the adapter that it goes on from."""
# The longer ones come first: one may be the beginning of another.
_FLAGS = {flag(name): name for name in sorted(SHAPE, key=len, reverse=True)}


@dataclass(frozen=True)
class JobSpec:
    """One training run: everything that its result depends on.

    Attributes:
        model: The base's name, or the reference that the client sent.
        adapter: `tenant/name` that the result is published as.
        kind: What the rows of the files have.
        task: What the rows are for.
        epochs: Passes over the rows.
        batch_size: Rows a step.
        learning_rate_multiplier: Factor of the method's own learning rate.
        seed: Of everything that is drawn.
        rows: Number of training rows.
        suffix: What the client wants to see in the adapter's name, or None.
        init_from: `tenant/name@vN` to go on from, or None. It decides the shape then.
        kept_method: The method of `init_from`, or None.
        method, rank, split, target_modules: The shape; None is the trainer's own choice.
        options: The fields of `SHAPE` beside these, as JSON values, as far as they were sent.
    """

    model: str
    adapter: str
    kind: RowKind
    task: JobTask
    epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int
    rows: int
    suffix: str | None = None
    init_from: str | None = None
    method: str | None = None
    rank: int | None = None
    split: int | None = None
    target_modules: str | list[str] | None = None
    kept_method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """About so many steps. A part of the rows may be held out."""
        return self.epochs * -(-self.rows // self.batch_size)

    def as_json(self) -> str:
        """The JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """Read what `as_json` wrote."""
        return cls(**json.loads(text))

    def train_settings(
        self, base: str, store: Path, *, device: str, dtype: str, quantize: Quantize = "none"
    ) -> dict[str, Any]:
        """Return the fields of `TrainSettings`, as JSON values, for a process whose working directory is the job's.

        Args:
            base: As the server loads it.
            store: Directory of the store.
            device: Torch device.
            dtype: dtype of the base.
            quantize: What the base's linear layers are kept in.
        """
        chosen: dict[str, Any] = {
            "method": self.method,
            "rank": self.rank,
            "split": self.split,
            "target_modules": self.target_modules,
            "init_from": self.init_from,
            **self.options,
            **_columns(self.kind),
        }
        if self.learning_rate_multiplier != 1:
            preset = METHODS[cast(Method, self.method or self.kept_method or DEFAULT_METHOD)]
            chosen["learning_rate"] = preset.learning_rate * self.learning_rate_multiplier
        return {
            "base": base,
            "store": str(store),
            "name": self.adapter,
            "task": "classify" if self.task == "multi-label" else self.task,
            "train": TRAINING_NAME,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": device,
            "dtype": dtype,
            "quantize": quantize,
            "work_dir": "work",
            "checkpoint_seconds": _CHECKPOINT_S,
            "log_steps": max(1, -(-self.steps // _MOST_POINTS)),
            **{name: value for name, value in chosen.items() if value is not None},
        }


def auto_epochs(rows: int) -> int:
    """Epochs that `auto` stands for: 3, and for fewer than 1,000 rows up to 10."""
    return min(10, max(3, 3000 // max(rows, 1)))


def auto_batch_size(rows: int) -> int:
    """Batch size that `auto` stands for: a 32nd of the rows, from 4 to 16."""
    return min(16, max(4, rows // 32))


def check_spec(
    spec: JobSpec,
    base: BaseInfo,
    module_shapes: Mapping[str, tuple[int, int]],
    labels: int,
    kept: AdapterConfig | None,
) -> AdapterConfig:
    """Refuse now what the trainer would refuse when the job runs.

    Args:
        spec: A job that is not made yet.
        base: The base that it trains on.
        module_shapes: (d_in, d_out) of each linear layer of the base, by path.
        labels: Different labels of the training rows, as far as is known.
        kept: The adapter to go on from, which decides the shape, or None.

    Returns:
        An adapter of the task and the shape of the one that the job will make. Its labels, pooling and length are
        others.

    Raises:
        InvalidConfiguration: The message names fields of a job's body, or packages that training needs.
    """
    check_packages()
    try:
        settings = load_options(None, spec.train_settings("base", Path("store"), device="cpu", dtype="auto"))
        if kept is not None:
            _check_kept(spec)
            return _checked(spec, kept, settings)
        shapes = shapes_by_path(settings, module_shapes)
        if settings.budget is not None:
            total_ranks(shapes.values(), settings.budget)
    except InvalidConfiguration as error:
        field = _field_of(error)
        if field == "split" and spec.split is None and spec.rank is not None:
            # A split that nobody gave is the rank.
            field = "rank"
        param = error.param if error.param == "model" else f"adapter.{field}"
        raise InvalidConfiguration(in_words(error.message), param=param) from error
    modules = {}
    for path, shape in shapes.items():
        d_in, d_out = module_shapes[path]
        modules[path] = ModuleSpec(
            d_in=d_in,
            d_out=d_out,
            rank=shape.rank,
            split=shape.split,
            use_mixer=shape.use_mixer,
            scaling=shape.scaling,
        )
    return AdapterConfig(method=settings.stored_method, base=base, modules=modules, **_head_fields(spec.task, labels))


def _checked(spec: JobSpec, kept: AdapterConfig, settings: TrainSettings) -> AdapterConfig:
    try:
        check_initial(spec.model, kept, settings)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(error.message, param="model") from error
    return kept


def _head_fields(task: JobTask, labels: int) -> dict[str, Any]:
    """Fields of a configuration that say how large the head is."""
    if task == "generate":
        return {"task": task}
    fields: dict[str, Any] = {"task": task, "max_length": 1}
    if task != "token-classify":
        fields["pooling"] = "mean"
    if task == "multi-label":
        fields |= {"task": "classify", "multi_label": True}
    names = [str(label) for label in range(max(labels, _FEWEST_LABELS))]
    if task == "token-classify":
        fields["labels"] = ["O", *(f"{mark}-{name}" for name in names for mark in "BI")]
    elif task != "regress":
        fields["labels"] = names
    return fields


def _check_kept(spec: JobSpec) -> None:
    kept = METHODS[cast(Method, spec.kept_method or DEFAULT_METHOD)]
    for name, factor in (("lora_plus_ratio", "b"), ("budget", None)):
        if name in spec.options and (not kept.adapts or (factor is not None and factor not in kept.train_factors)):
            raise InvalidConfiguration(
                f"{flag(name)} has no meaning for {spec.kept_method}, the method that {spec.init_from} keeps; leave it "
                "out",
                param=name,
            )


def _columns(kind: RowKind) -> dict[str, Any]:
    """The options that name the fields of a kind of row."""
    found: dict[str, Any] = {}
    fields = KINDS[kind]
    if kind == "messages":
        found["messages_column"] = "messages"
    if "text_pair" in fields:
        found["text_pair_column"] = "text_pair"
    if "labels" in fields:
        found |= {"label_column": "labels", "multi_label": True}
    if "score" in fields:
        found["label_column"] = "score"
    return found


def _field_of(error: InvalidConfiguration) -> str:
    """The field of `SHAPE` that an error is about. The settings do not always say which of their fields is at fault."""
    if error.param in SHAPE:
        return error.param
    words = {**_FLAGS, **{name: name for name in SHAPE if "_" in name}}
    places = [(error.message.find(word), -len(word), name) for word, name in words.items() if word in error.message]
    if places:
        # The first that is named; of two that begin there, the longer one.
        return min(places)[2]
    return "split" if "split" in error.message else "method"


def in_words(message: str) -> str:
    """A message of the trainer, without the options of its command line."""
    for option, name in _FLAGS.items():
        message = message.replace(option, f"adapter.{name}")
    for option, words in _WORDS:
        message = message.replace(option, words)
    return message
