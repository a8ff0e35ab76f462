"""A whole training run: reads the data, trains, evaluates, and publishes the adapter to the store."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers import TrainerCallback, TrainerState, set_seed

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, ModuleSpec, Published
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.layers import attach_layers, attached_layers, detach_adapter, module_specs
from sera_serve.trainer.activations import checkpointed_activations
from sera_serve.trainer.allocation import few_steps_note
from sera_serve.trainer.checkpoint import last_checkpoint, load_part, read_state, run_digest, run_folder
from sera_serve.trainer.curves import check_plot, evaluations, plot_curves, tensorboard_callback
from sera_serve.trainer.data.labelled import Examples
from sera_serve.trainer.initial import InitialAdapter, load_initial
from sera_serve.trainer.loop import (
    AdapterTrainer,
    DivergedTraining,
    StopWithoutGain,
    evaluations_since_best,
)
from sera_serve.trainer.parallel import Processes, join_processes
from sera_serve.trainer.patterns import shapes_by_path, total_ranks
from sera_serve.trainer.progress import RichProgress
from sera_serve.trainer.settings import KEPT_BY_INIT, TrainSettings
from sera_serve.trainer.tasks import TASKS, GenerateTask, TrainingTask, check_base_of_texts, row_counts

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
        is_chat: Whether the rows were chats, as requests should be.
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
    is_chat: bool = False


Result = TypeVar("Result")
Publish = Callable[[AdapterBundle, str], Published]
"""Publishes a bundle as the next version of an adapter `tenant/name`."""
Prepare = Callable[[TrainingTask, TrainSettings], Sequence[TrainerCallback]]
"""Changes a task that was built, before it trains. It returns callbacks for the loop."""
MakeTrainer = Callable[[TrainingTask, TrainSettings, Path, list[TrainerCallback], Processes], AdapterTrainer]
"""Makes the training loop of a run; `AdapterTrainer` itself is one."""


def train_adapter(
    settings: TrainSettings,
    *,
    base: FrozenBase | None = None,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    publish: Publish | None = None,
    prepare: Prepare | None = None,
    baseline: bool = False,
    make_trainer: MakeTrainer = AdapterTrainer,
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
        prepare: Called with the task and the settings before training; see `Prepare`.
        baseline: Attach no adapter and publish nothing: `prepare` gives the task a model of another library. The
            result has version 0 and no digest.
        make_trainer: Makes the training loop.

    Raises:
        AdapterNotFound: `settings.init_from` names no adapter of the store.
        CheckpointNotWritten: The disk took no checkpoint, such as a full one.
        InvalidData: A file or some of its rows cannot be used.
        InvalidConfiguration: The base and the settings do not fit each other.
        RunInProgress: Another process is training the same run.
        TrainingFailed: The loss, or a metric of the trained adapter, is NaN or infinite.
        StoreError: The version could not be published.
    """
    processes = join_processes(settings.device)
    if processes.count > 1:
        # The main process makes the store, and the others then find it.
        processes.from_main(lambda: AdapterStore(settings.store, create=True).root)
    if settings.plot is not None and processes.is_main:
        check_plot(settings.plot)
    store = AdapterStore(settings.store, create=True)

    def train(run: TrainingRun) -> TrainResult:
        asked = replace(run, callbacks=callbacks, make_trainer=make_trainer, prepare=prepare, baseline=baseline)
        return _train_on(asked, publish or store.publish)

    return with_run(settings, train, base=base, console=console)


def with_run(
    settings: TrainSettings,
    use: Callable[[TrainingRun], Result],
    *,
    base: FrozenBase | None = None,
    console: Console | None = None,
) -> Result:
    """Read the data and load the base, call `use` with them, and detach what it attached. Nothing is written.

    Raises:
        AdapterNotFound, InvalidData, InvalidConfiguration: See `train_adapter`.
    """
    processes = join_processes(settings.device)
    quiet = console if console is not None and processes.is_main else Console(quiet=True)
    initial = load_initial(settings)
    if initial is not None:
        settings = initial.settings(settings)
    data = TASKS[settings.task].load(settings, initial.bundle.config if initial is not None else None)
    base = usable_base(settings, base, quiet)
    if not TASKS[settings.task].takes_images:
        check_base_of_texts(settings.task, base)
    max_length = _max_length(settings, base)
    try:
        run = TrainingRun(settings, base, data, max_length, initial, quiet, processes)
        with checkpointed_activations(base, settings.checkpoint_activations):
            return use(run)
    finally:
        detach_adapter(base.model)


def usable_base(settings: TrainSettings, base: FrozenBase | None, console: Console) -> FrozenBase:
    """Load the base of a run, unless `base` is it already.

    Raises:
        InvalidConfiguration: It cannot be loaded; or it is quantized otherwise, or has an adapter attached.
    """
    if base is None:
        console.print(f"loading base {settings.base}", highlight=False)
        base = load_base(settings.base, device=settings.device, dtype=settings.dtype, quantize=settings.quantize)
    if (base.quantization or "none") != settings.quantize:
        raise InvalidConfiguration(
            f"quantize is {settings.quantize}, and the loaded base is quantized to {base.quantization or 'none'}; load "
            "it with the same",
            param="quantize",
        )
    if attached_layers(base.model):
        raise InvalidConfiguration("the base has an adapter attached; detach it first", param="base")
    return base


@dataclass(frozen=True)
class TrainingRun:
    """What a run works with. The last four are arguments of `train_adapter`, which a dry run does without."""

    settings: TrainSettings
    base: FrozenBase
    data: Examples[Any]
    max_length: int
    initial: InitialAdapter | None
    console: Console
    processes: Processes
    callbacks: Sequence[TrainerCallback] = ()
    make_trainer: MakeTrainer = AdapterTrainer
    prepare: Prepare | None = None
    baseline: bool = False

    def tell(self, note: str) -> None:
        """Show a note."""
        self.console.print(f"note: {note}", highlight=False, soft_wrap=True)


def build_task(run: TrainingRun) -> TrainingTask:
    """Attach the adapter to the base, and make the task with its model and its rows."""
    # Before adapter and head draw their initial values.
    set_seed(run.settings.seed)
    if run.initial is not None:
        run.initial.attach(run.base, run.settings.dropout)
    elif not run.baseline:
        attach_layers(run.base.model, shapes_by_path(run.settings, run.base.module_shapes()))
    task = TASKS[run.settings.task].build(run.settings, run.base, run.data, run.max_length)
    if run.initial is not None:
        task.model.load_stored_tensors(run.initial.bundle.tensors)
    if run.settings.budget is not None:
        # The training loop would refuse it later, and a dry run makes no loop.
        total_ranks([layer.config for layer in attached_layers(run.base.model).values()], run.settings.budget)
        steps = run.settings.epochs * -(-len(task.train_rows) // run.settings.batch_size)
        task.notes += few_steps_note(steps, run.settings.budget_final)
    return task


def _train_on(run: TrainingRun, publish: Publish) -> TrainResult:
    settings, base, data = run.settings, run.base, run.data
    task = build_task(run)
    if run.prepare is not None:
        run = replace(run, callbacks=[*run.callbacks, *run.prepare(task, settings)])
    for note in task.notes:
        run.tell(note)
    identity: dict[str, Any] = {"settings": settings.identity(), "data": data.digests, "base": base.info.model_dump()}
    if run.initial is not None:
        identity["init_from"] = run.initial.bundle.digest
    started = time.monotonic()
    with _folder(run, run_digest(identity)) as folder:
        fitted = _fit(task, run, folder)
        metrics = run.processes.from_main(lambda: _scores(task))
        # No bundle holds such a figure, which the losses of a short run may not have shown.
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise _diverged(f"{name} of the trained adapter is {value}", settings)
        seconds = time.monotonic() - started
        published = Published(settings.name, 0, "")
        if not run.baseline:
            bundle = build_bundle(settings, task, _record(run, task, metrics, fitted))
            # Inside the block, so that the checkpoints stay until the version is durable. A second publishing adds
            # nothing.
            published = run.processes.from_main(lambda: publish(bundle, settings.name))
    if settings.plot is not None and run.processes.is_main:
        try:
            plot_curves(
                fitted.history,
                settings.plot,
                title=f"{settings.name} version {published.version}",
                metric=settings.best_metric,
                chosen_epoch=fitted.chosen_epoch,
            )
        except OSError as error:
            # The adapter is published, and its figures are still to be told.
            task.notes.append(f"the curves could not be drawn: {error}")
            run.tell(task.notes[-1])
    return TrainResult(
        adapter=published.adapter,
        version=published.version,
        digest=published.digest,
        parameters=sum(
            p.numel() for n, p in task.model.named_parameters() if p.requires_grad and not n.startswith("head.")
        ),
        head_parameters=task.model.head_parameters,
        metrics=metrics,
        train_seconds=round(seconds, 3),
        store=str(settings.store),
        resumed_from=fitted.resumed_from,
        trained_tokens=fitted.epochs * task.train_tokens,
        notes=task.notes,
        is_chat=settings.chat_column is not None or (isinstance(task, GenerateTask) and task.trains_chats),
    )


def _folder(run: TrainingRun, digest: str) -> contextlib.AbstractContextManager[Path]:
    work_dir = run.settings.default_work_dir()
    if not run.processes.is_main:
        # The main process holds the lock, and deletes the folder.
        return contextlib.nullcontext(work_dir / digest)
    # STORE.training/TENANT/NAME
    own_parents = 3 if run.settings.work_dir is None else 0
    return run_folder(work_dir, digest, resume=run.settings.resume, own_parents=own_parents)


def _scores(task: TrainingTask) -> dict[str, float]:
    metrics = task.evaluate(task.eval_rows) if task.eval_rows else {}
    if task.test_rows:
        metrics |= {f"test_{name}": value for name, value in task.evaluate(task.test_rows).items()}
    return metrics


@dataclass(frozen=True)
class _Fitted:
    """What training gave, beside the tensors of the task's model.

    Attributes:
        resumed_from: The step of the checkpoint that a killed run went on from, or None.
        best_step: The step of the kept tensors.
        chosen_epoch: The epoch of the kept tensors.
        epochs: Epochs that were trained.
        history: transformers' `log_history`.
    """

    resumed_from: int | None
    best_step: int
    chosen_epoch: int
    epochs: int
    history: list[dict[str, Any]]


def _fit(task: TrainingTask, run: TrainingRun, folder: Path) -> _Fitted:
    """Train to the end, and leave the tensors of the best epoch in the task's model."""
    settings, console = run.settings, run.console
    checkpoint = run.processes.from_main(lambda: last_checkpoint(folder, task.model.stored_tensors(), run.tell))
    resumed_from = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else None
    progress = RichProgress(console)
    callbacks = [progress, *run.callbacks]
    if settings.patience is not None:
        callbacks.append(StopWithoutGain(settings.patience))
    if settings.tensorboard is not None and run.processes.is_main:
        callbacks.append(tensorboard_callback(settings.tensorboard / settings.name / folder.name, resumed_from))
    trainer = run.make_trainer(task, settings, folder, callbacks, run.processes)
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint.name} in {folder}", highlight=False, soft_wrap=True)
    if checkpoint is not None and _is_stopped(settings, state := read_state(checkpoint)):
        # The process ended between the save of the last epoch and the end of the run. A further step would be wrong.
        trainer.state = state
        task.model.load_stored_tensors(load_part(Path(state.best_model_checkpoint)))
    else:
        _train(trainer, settings, checkpoint, progress)
    steps = int(trainer.state.best_global_step or trainer.state.global_step)
    return _Fitted(
        resumed_from=resumed_from,
        best_step=steps,
        chosen_epoch=-(-steps // trainer.steps_per_epoch),
        epochs=-(-int(trainer.state.global_step) // trainer.steps_per_epoch),
        history=trainer.state.log_history,
    )


def _is_stopped(settings: TrainSettings, state: TrainerState) -> bool:
    return settings.patience is not None and evaluations_since_best(state) >= settings.patience


def _train(trainer: AdapterTrainer, settings: TrainSettings, checkpoint: Path | None, progress: RichProgress) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except DivergedTraining as error:
        raise _diverged(str(error), settings) from error
    finally:
        progress.close()
    if trainer.allocation is not None:
        # The layers get their last shapes here, so that the metrics are those of what is published.
        trainer.allocation.allocator.compress(trainer.task.base.model)


def _diverged(what: str, settings: TrainSettings) -> TrainingFailed:
    head = settings.head_learning_rate
    of_head = "" if head is None else f" or --head-learning-rate (now {head})"
    return TrainingFailed(
        f"{what}; lower --learning-rate (now {settings.peak_learning_rate}){of_head} and run again with --no-resume",
        param="learning_rate",
    )


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


def _record(run: TrainingRun, task: TrainingTask, metrics: dict[str, float], fitted: _Fitted) -> dict[str, Any]:
    """Describe how the version was trained. Equal settings give equal records, or the bundle's digest would change."""
    settings = run.settings
    told = {"base", "name", "task", "method", *(KEPT_BY_INIT if run.initial is not None else ())}
    if settings.train_factors is not None:
        # The bundle does not tell them, and a run that goes on from this version trains the same.
        told.discard("train_factors")
    record: dict[str, Any] = {
        "settings": {k: v for k, v in settings.identity().items() if k not in told},
        "learning_rate": settings.peak_learning_rate,
        "rows": row_counts(task),
        "data_sha256": run.data.digests,
        "metrics": metrics,
        "chosen_step": fitted.best_step,
        "chosen_epoch": fitted.chosen_epoch,
        "epochs": fitted.epochs,
        "evaluations": evaluations(fitted.history),
        "trained_tokens": fitted.epochs * task.train_tokens,
        "notes": task.notes,
    }
    if settings.method != settings.stored_method:
        record["method"] = settings.method
    if run.initial is not None:
        record["init_from"] = {"adapter": run.initial.reference, "digest": run.initial.bundle.digest}
    return record | ({"description": settings.description} if settings.description else {})


def build_bundle(settings: TrainSettings, task: TrainingTask, record: dict[str, Any]) -> AdapterBundle:
    """Build the bundle that the store keeps.

    Args:
        settings: Options of the run.
        task: The trained task.
        record: How the adapter was trained: JSON values, equal for equal settings, so without times and paths.
    """
    modules = {path: ModuleSpec(**shape) for path, shape in module_specs(task.base.model).items()}
    config = AdapterConfig(
        task=settings.task,
        method=settings.stored_method,
        base=task.base.info,
        modules=modules,
        training=record,
        **task.bundle_fields(),
    )
    return AdapterBundle(config, task.model.stored_tensors())
