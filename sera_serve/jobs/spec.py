"""What a job trains: resolved when the job is made, kept with it, and turned into the trainer's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from adapters_store import AdapterConfig, BaseInfo, ModuleSpec
from sera_serve.base import Quantize
from sera_serve.errors import InvalidConfiguration
from sera_serve.jobs.rows import RowKind
from sera_serve.layers import ALL_LINEAR, near_names, pattern_matches
from sera_serve.trainer.initial import check_initial
from sera_serve.trainer.settings import TrainSettings, load_options

TRAINING_NAME, VALIDATION_NAME = "training_file.jsonl", "validation_file.jsonl"
"""What a job's own directory calls its two files. Messages of the trainer show these names."""
BYTES_A_NUMBER = 4
"""The trainer keeps adapters in float32."""
# Steps whose loss becomes an event, at most about.
_MOST_POINTS = 300
_CHECKPOINT_S = 10.0
# A classifier has no fewer.
_FEWEST_LABELS = 2
# Options of the trainer's command line, as a job's body names them. The longer ones come first.
_WORDS = (
    ("lower --learning-rate", "lower learning_rate_multiplier: this is the rate"),
    (" and run again with --no-resume", ""),
    ("--messages-column", "messages"),
    ("--eval-fraction 0", "more rows"),
    ("--target-modules", "adapter.target_modules"),
    ("--label-column", "the labels"),
    ("--eval", "validation_file"),
    ("--train", "training_file"),
    ("--init-from", "model"),
    ("--method", "adapter.method"),
    ("--split", "adapter.split"),
    ("--rank", "adapter.rank"),
    ("--task", "adapter.task"),
)


@dataclass(frozen=True)
class JobSpec:
    """One training run, without anything that its result does not depend on.

    Attributes:
        model: The base's name, or the reference that the client sent.
        adapter: `tenant/name` that the result is published as.
        kind: What the rows of the files have.
        task: `classify` or `generate`.
        epochs: Passes over the rows.
        batch_size: Rows a step.
        learning_rate_multiplier: Factor of the method's own learning rate.
        seed: Of everything that is drawn.
        rows: Number of training rows.
        suffix: What the client wants to see in the adapter's name, or None.
        init_from: `tenant/name@vN` to go on from, or None. It decides the shape then.
        method, rank, split, target_modules: The shape; None is the trainer's own choice.
    """

    model: str
    adapter: str
    kind: RowKind
    task: Literal["classify", "generate"]
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
        self, base: str, store: Path, run: Path, *, device: str, dtype: str, quantize: Quantize = "none"
    ) -> dict[str, Any]:
        """Return the fields of `TrainSettings`, as JSON values.

        Args:
            base: As the server loads it.
            store: Directory of the store.
            run: Directory of the job. It is the process's working directory.
            device: Torch device.
            dtype: dtype of the base.
            quantize: What the base's linear layers are kept in.
        """
        chosen = {
            "method": self.method,
            "rank": self.rank,
            "split": self.split,
            "target_modules": self.target_modules,
            "init_from": self.init_from,
        }
        if self.kind == "messages":
            chosen["messages_column"] = "messages"
        elif self.kind == "pair":
            chosen["text_pair_column"] = "text_pair"
        return {
            "base": base,
            "store": str(store),
            "name": self.adapter,
            "task": self.task,
            "train": TRAINING_NAME,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": device,
            "dtype": dtype,
            "quantize": quantize,
            "work_dir": str(run / "work"),
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
    initial: AdapterConfig | None,
) -> AdapterConfig:
    """Refuse now what the trainer would refuse when the job runs.

    Args:
        spec: A job that is not made yet.
        base: The base that it trains on.
        module_shapes: (d_in, d_out) of each linear layer of the base, by path.
        labels: Different labels of the training rows, as far as is known.
        initial: The adapter to go on from, which decides the shape, or None.

    Returns:
        An adapter of the task and the shape of the one that the job will make. Its labels, pooling and length are
        others.

    Raises:
        InvalidConfiguration: The message names fields of a job's body.
    """
    folder = Path("jobs")
    try:
        settings = load_options(None, spec.train_settings("base", folder, folder, device="cpu", dtype="auto"))
        if initial is not None:
            check_initial(spec.model, initial, settings)
            return initial
        modules = _modules(settings, module_shapes)
    except InvalidConfiguration as error:
        field = error.param
        if initial is not None:
            raise InvalidConfiguration(in_words(error.message), param="model") from error
        if field not in ("rank", "split", "target_modules"):
            # The settings do not always say which of their fields is at fault.
            field = "split" if "split" in error.message else "method"
        raise InvalidConfiguration(in_words(error.message), param=f"adapter.{field}") from error
    fields: dict[str, Any] = {}
    if spec.task == "classify":
        names = [str(label) for label in range(max(labels, _FEWEST_LABELS))]
        fields = {"labels": names, "pooling": "mean", "max_length": 1}
    return AdapterConfig(task=spec.task, method=settings.stored_method, base=base, modules=modules, **fields)


def in_words(message: str) -> str:
    """A message of the trainer, without the options of its command line."""
    for option, words in _WORDS:
        message = message.replace(option, words)
    return message


def _modules(settings: TrainSettings, module_shapes: Mapping[str, tuple[int, int]]) -> dict[str, ModuleSpec]:
    config = settings.adapter_config()
    if config is None:
        return {}
    patterns = ("*",) if config.target_modules == ALL_LINEAR else config.target_modules
    for pattern in patterns:
        if not any(pattern_matches(pattern, path) for path in module_shapes):
            raise InvalidConfiguration(
                f"target_modules has {pattern!r}, which no linear layer of the base has; it has "
                f"{near_names(pattern, module_shapes)}",
                param="target_modules",
            )
    modules = {}
    for path, (d_in, d_out) in module_shapes.items():
        if any(pattern_matches(pattern, path) for pattern in patterns):
            config.check_fits(path, d_in, d_out)
            modules[path] = ModuleSpec(
                d_in=d_in,
                d_out=d_out,
                rank=config.rank,
                split=config.split,
                use_mixer=config.use_mixer,
                scaling=config.scaling,
            )
    return modules
