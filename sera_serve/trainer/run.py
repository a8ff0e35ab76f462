"""A whole training run: reads the data, trains, evaluates, and publishes the adapter to the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, set_seed

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, ModuleSpec, Published
from sera_serve.base import FrozenBase, Pooling, load_base
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.layers import attach_adapter, attached_layers, detach_adapter, module_specs
from sera_serve.trainer.checkpoint import last_checkpoint, run_digest, run_folder
from sera_serve.trainer.data import ClassifyData, GenerateData, load_classify_data, load_generate_data
from sera_serve.trainer.initial import InitialAdapter, load_initial
from sera_serve.trainer.loop import AdapterTrainer, DivergedTraining, RichProgress
from sera_serve.trainer.model import AdapterModel
from sera_serve.trainer.settings import KEPT_BY_INIT, TrainSettings
from sera_serve.trainer.tasks import ClassifyTask, GenerateTask, TrainingTask

_DEFAULT_MAX_LENGTH = 512


class TrainingFailed(SeraServeError):
    """Training ended without a usable adapter."""

    code = "training_failed"
    status = 422


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        adapter: tenant/name.
        version: The published version.
        digest: Digest of the bundle.
        parameters: Number of trained parameters of the adapter, without the head.
        head_parameters: Number of parameters of the head; 0 for a generator.
        metrics: Scores of the chosen epoch on the evaluation rows; `test_...` on the test rows.
        train_seconds: Wall time of this process's training, evaluations included.
        store: Folder of the store.
        resumed_from: The step from which a killed run continued, or None.
        trained_tokens: Tokens of the training rows, times the epochs.
        notes: Changes that were made to the data: rows truncated, texts split.
    """

    adapter: str
    version: int
    digest: str
    parameters: int
    head_parameters: int
    metrics: dict[str, float]
    train_seconds: float
    store: str
    resumed_from: int | None
    trained_tokens: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)


Publish = Callable[[AdapterBundle, str], Published]
"""Publishes a bundle as the next version of an adapter `tenant/name`."""


def train_adapter(
    settings: TrainSettings,
    *,
    base: FrozenBase | None = None,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    publish: Publish | None = None,
) -> TrainResult:
    """Train an adapter and publish it.

    A killed run continues from its last checkpoint when it is started again with the same settings and data. Its
    tensors are those of an undisturbed run.

    Args:
        settings: Options of the run.
        base: A base that is already loaded from `settings.base`. Afterwards it has no adapter attached.
        console: Shows the progress; with None nothing is shown.
        callbacks: Told of each step, loss and evaluation, as transformers does it.
        publish: Publishes the result, in place of the store's own method. What it raises is raised.

    Raises:
        AdapterNotFound: `settings.init_from` names no adapter of the store.
        InvalidData: A file or some of its rows cannot be used.
        InvalidConfiguration: The base and the settings do not fit each other.
        RunInProgress: Another process is training the same run.
        TrainingFailed: The loss became NaN or infinite.
        StoreError: The version could not be published.
    """
    quiet = console or Console(quiet=True)
    store = AdapterStore(settings.store, create=True)
    initial = load_initial(settings, store)
    if initial is not None:
        settings = initial.settings(settings)
    data: ClassifyData | GenerateData
    if settings.task == "classify":
        data = load_classify_data(settings, initial.labels if initial is not None else None)
    else:
        data = load_generate_data(settings, initial.chat_template if initial is not None else None)
    if base is None:
        quiet.print(f"loading base {settings.base}", highlight=False)
        base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    if attached_layers(base.model):
        raise InvalidConfiguration("the base has an adapter attached; detach it first", param="base")
    max_length = _max_length(settings, base)
    try:
        run = _Run(settings, base, data, max_length, initial, quiet, callbacks)
        return _train_on(run, publish or store.publish)
    finally:
        detach_adapter(base.model)


@dataclass(frozen=True)
class _Run:
    """What a run works with."""

    settings: TrainSettings
    base: FrozenBase
    data: ClassifyData | GenerateData
    max_length: int
    initial: InitialAdapter | None
    console: Console
    callbacks: Sequence[TrainerCallback]


def _train_on(run: _Run, publish: Publish) -> TrainResult:
    settings, base, data, console = run.settings, run.base, run.data, run.console
    # Before adapter and head draw their initial values.
    set_seed(settings.seed)
    _attach(run)
    task = _task(settings, base, data, run.max_length)
    if run.initial is not None:
        task.model.load_stored_tensors(run.initial.bundle.tensors)
    for note in task.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    identity: dict[str, Any] = {"settings": settings.identity(), "data": data.digests, "base": base.info.model_dump()}
    if run.initial is not None:
        identity["init_from"] = run.initial.digest
    begun = time.monotonic()
    with run_folder(settings.default_work_dir(), run_digest(identity), resume=settings.resume) as folder:
        resumed_from, best_step = _fit(task, run, folder)
        metrics = task.evaluate(task.eval_rows) if task.eval_rows else {}
        if task.test_rows:
            metrics |= {f"test_{name}": value for name, value in task.evaluate(task.test_rows).items()}
        seconds = time.monotonic() - begun
        bundle = build_bundle(
            settings,
            base,
            task.model,
            labels=data.labels if isinstance(data, ClassifyData) else None,
            pooling=task.pooling if isinstance(task, ClassifyTask) else None,
            max_length=run.max_length if settings.task == "classify" else None,
            chat_template=data.chat_template if isinstance(data, GenerateData) else None,
            record=_record(run, task, metrics, best_step),
        )
        # Inside the block, so that the checkpoints stay until the version is durable. A second publishing adds nothing.
        published = publish(bundle, settings.name)
    return TrainResult(
        adapter=published.adapter,
        version=published.version,
        digest=published.digest,
        parameters=sum(
            p.numel() for n, p in task.model.named_parameters() if p.requires_grad and not n.startswith("head.")
        ),
        head_parameters=sum(p.numel() for p in task.model.head.parameters()) if task.model.head else 0,
        metrics=metrics,
        train_seconds=round(seconds, 3),
        store=str(settings.store),
        resumed_from=resumed_from,
        trained_tokens=settings.epochs * task.train_tokens,
        notes=task.notes,
    )


def _attach(run: _Run) -> None:
    if run.initial is not None:
        run.initial.attach(run.base, run.settings.dropout)
    elif (shape := run.settings.adapter_config()) is not None:
        attach_adapter(run.base.model, shape)


def _task(
    settings: TrainSettings, base: FrozenBase, data: ClassifyData | GenerateData, max_length: int
) -> TrainingTask:
    if isinstance(data, GenerateData):
        return GenerateTask(base, data, max_length=max_length)
    return ClassifyTask(
        base,
        data,
        pooling=settings.pooling or base.default_pooling,
        max_length=max_length,
        dropout=settings.dropout,
        adapted=settings.adapter_config() is not None,
    )


def _fit(task: TrainingTask, run: _Run, folder: Path) -> tuple[int | None, int]:
    """Train to the end. Return (the step of the checkpoint resumed from or None, the step of the kept tensors)."""
    settings, console = run.settings, run.console
    checkpoint = last_checkpoint(folder, task.model.stored_tensors())
    progress = RichProgress(console)
    trainer = AdapterTrainer(task, settings, folder, [progress, *run.callbacks])
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint.name} in {folder}", highlight=False, soft_wrap=True)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except DivergedTraining as error:
        raise TrainingFailed(
            f"{error}; lower --learning-rate (now {settings.peak_learning_rate}) and run again with --no-resume",
            param="learning_rate",
        ) from error
    finally:
        progress.close()
    resumed_from = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else None
    return resumed_from, int(trainer.state.best_global_step or trainer.state.global_step)


def _max_length(settings: TrainSettings, base: FrozenBase) -> int:
    if settings.max_length is None:
        return min(base.max_length, _DEFAULT_MAX_LENGTH)
    if settings.max_length > base.max_length:
        raise InvalidConfiguration(
            f"--max-length {settings.max_length} exceeds the {base.max_length} tokens that base {base.name} "
            "was made for",
            param="max_length",
        )
    return settings.max_length


def _record(run: _Run, task: TrainingTask, metrics: dict[str, float], best_step: int) -> dict[str, Any]:
    """Describe how the version was trained. Equal settings give equal records, or the bundle's digest would change."""
    settings = run.settings
    told = ("base", "name", "task", "method", *(KEPT_BY_INIT if run.initial is not None else ()))
    record = {
        "settings": {k: v for k, v in settings.identity().items() if k not in told},
        "learning_rate": settings.peak_learning_rate,
        "rows": {"train": len(task.train_rows), "eval": len(task.eval_rows), "test": len(task.test_rows)},
        "data_sha256": run.data.digests,
        "metrics": metrics,
        "chosen_step": best_step,
        "trained_tokens": settings.epochs * task.train_tokens,
        "notes": task.notes,
    }
    if run.initial is not None:
        record["init_from"] = {"adapter": run.initial.reference, "digest": run.initial.digest}
    return record | ({"description": settings.description} if settings.description else {})


def build_bundle(
    settings: TrainSettings,
    base: FrozenBase,
    model: AdapterModel,
    *,
    labels: list[str] | None,
    pooling: Pooling | None,
    max_length: int | None,
    record: dict[str, Any],
    chat_template: str | None = None,
) -> AdapterBundle:
    """Build the bundle that the store keeps.

    Args:
        settings: Options of the run.
        base: The base that the adapter was trained on.
        model: The trained model.
        labels: Labels of a classifier in the order of the head's rows, or None.
        pooling: Pooling of a classifier, or None.
        max_length: The length to which the server truncates a classifier's inputs, as training did; or None.
        record: How the adapter was trained: JSON values, equal for equal settings, so without times and paths.
        chat_template: The template of the chats that a generator was trained on, or None.
    """
    modules = {path: ModuleSpec(**shape) for path, shape in module_specs(base.model).items()}
    config = AdapterConfig(
        task=settings.task,
        method=settings.method,
        base=base.info,
        modules=modules,
        labels=labels,
        pooling=pooling,
        max_length=max_length,
        training=record,
        chat_template=chat_template,
    )
    return AdapterBundle(config, model.stored_tensors())
