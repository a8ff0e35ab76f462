"""The training loop: transformers' `Trainer` with checkpoints of the adapter only and an exact resume."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers
from sera_serve.trainer.allocation import AllocateRanks, RankAllocator, SettlesRanks
from sera_serve.trainer.checkpoint import (
    delete_others,
    load_generators,
    load_optimiser,
    load_part,
    save_checkpoint,
)
from sera_serve.trainer.loss_scale import LossScale, needs_loss_scale
from sera_serve.trainer.order import LengthGroupedOrder
from sera_serve.trainer.parallel import (
    CountedRows,
    Processes,
    SeedEachStep,
    ShareOfBatches,
    counted_batch,
    may_leave_out,
)
from sera_serve.trainer.schedule import rate_factors
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.task_options import LOWER_IS_BETTER
from sera_serve.trainer.tasks import TrainingTask


class OneDeviceArguments(TrainingArguments):  # type: ignore[misc]
    """transformers' arguments for one device a process, however many GPUs the machine has.

    With several in sight, Trainer would copy the model to each of them, and take the batch size for each.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, for which Trainer multiplies the batch size."""
        return min(1, int(super().n_gpu))


def training_arguments(
    settings: TrainSettings,
    run_dir: Path,
    *,
    evaluates: bool,
    processes: Processes,
    leaves_out: bool | None,
) -> TrainingArguments:
    """Translate `settings` into transformers' arguments, without reports to any service.

    `leaves_out`, of several processes, is whether a step may leave parameters out; see `may_leave_out`. It is None of
    one process.
    """
    metric = settings.best_metric
    return OneDeviceArguments(
        output_dir=str(run_dir),
        use_cpu=settings.device == "cpu",
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=max(1, settings.batch_size // processes.count),
        learning_rate=settings.peak_learning_rate,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch",
        load_best_model_at_end=evaluates,
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=(metric not in LOWER_IS_BETTER) if evaluates else None,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device != "cpu",
        skip_memory_metrics=True,
        ddp_find_unused_parameters=leaves_out,
    )


def optimiser_class(settings: TrainSettings) -> Any:
    """The class of the optimiser.

    Raises:
        InvalidConfiguration: It is paged, and bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as error:
        raise InvalidConfiguration(
            f'optimizer paged-adamw needs bitsandbytes, which cannot be imported ({error}): pip install "sera-serve'
            '[quant]"',
            param="optimizer",
        ) from error
    return PagedAdamW32bit


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains a task's model. Its checkpoints hold tensors of the adapter, the head and the optimiser only."""

    # Trainer, which is untyped here, sets these.
    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainSettings,
        run_dir: Path,
        callbacks: list[TrainerCallback],
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.task = task
        self.settings = settings
        self.run_dir = run_dir
        self.allocation = _allocation(task, settings)
        self.loss_scale = LossScale() if needs_loss_scale(task.model) else None
        # What a checkpoint keeps beside the adapter and the optimiser.
        self._states: dict[str, RankAllocator | LossScale] = {}
        if self.allocation is not None:
            self._states["allocation"] = self.allocation.allocator
        if self.loss_scale is not None:
            self._states["loss_scale"] = self.loss_scale
        own = [SaveByTheClock(settings.checkpoint_seconds), StopOnNonFiniteLoss()]
        if self.allocation is not None:
            own.append(self.allocation)
        leaves_out: bool | None = None
        if processes.count > 1:
            # What this draws does not count: the generators are seeded in each step.
            own.append(SeedEachStep(settings.seed, processes))
            batch = counted_batch(task.collate, settings.task, [(task.train_rows[0], True)])
            del batch["loss_items"]
            leaves_out = may_leave_out(task.model, batch)
        self._settling = [callback for callback in (*own, *callbacks) if isinstance(callback, SettlesRanks)]
        evaluates = bool(task.eval_rows)
        super().__init__(
            model=task.model,
            args=training_arguments(settings, run_dir, evaluates=evaluates, processes=processes, leaves_out=leaves_out),
            data_collator=task.collate,
            train_dataset=task.train_rows,
            eval_dataset=task.eval_rows or None,
            callbacks=[*own, *callbacks],
        )
        # This callback writes to stdout, where only the result belongs.
        self.remove_callback(PrinterCallback)
        self.steps_per_epoch = -(-len(task.train_rows) // settings.batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # A checkpoint restores the step count, so the epoch is right after a restart too.
        return LengthGroupedOrder(
            self.task.lengths,
            self.settings.batch_size,
            self.settings.seed,
            lambda: int(self.state.global_step) // self.steps_per_epoch,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches, or this process's share of each batch."""
        if self.processes.count == 1:
            alone: DataLoader[Any] = super().get_train_dataloader()
            return alone
        # Not prepared by accelerate, which would fill up a short last batch with rows of the first. Yet of its class:
        # transformers tells a plain DataLoader no epoch, and rows with augmentation would be the same in each.
        share: DataLoader[Any] = DataLoaderShard(
            CountedRows(self.task.train_rows),
            batch_sampler=ShareOfBatches(self._get_train_sampler(), self.settings.batch_size, self.processes),
            collate_fn=partial(counted_batch, self.task.collate, self.settings.task),
        )
        return share

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, scaled for a float16 base.

        With several processes, the mean of their results is the loss of the whole batch.
        """
        items = inputs.pop("loss_items", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.loss_scale is not None:
            loss = loss * self.loss_scale.scale
        if items is None:
            return loss
        return loss * (items * self.processes.count / self.processes.total(items).clamp(min=1))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a batch and the gradients, again where the scale of the loss was too large for them.

        What is computed again draws its dropout anew. Processes that train together have the same gradients, and so
        compute again together.
        """
        while True:
            loss: Tensor = super().training_step(model, dict(inputs), *args, **kwargs)
            self.complete_gradients()
            if self.loss_scale is None:
                return loss
            loss = loss / self.loss_scale.scale
            if self.loss_scale.unscale(model.parameters()):
                return loss

    def complete_gradients(self) -> None:
        """Wait for the gradients of the base where other runs share its passes. A run that trains alone has them."""

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create AdamW over the trained parameters, in the groups of `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings)
            self.optimizer = optimiser_class(self.settings)(groups, weight_decay=self.settings.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of the learning rate; see `sera_serve.trainer.schedule`."""
        if self.lr_scheduler is None:
            factors = rate_factors(self.settings.warmup_ratio, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factors)
        return self.lr_scheduler

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as the task does, and prefix the metrics' names."""
        rows = self.task.eval_rows if eval_dataset is None else eval_dataset
        found = self.processes.from_main(lambda: self.task.evaluate(rows))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Let the lower loss decide between equal scores, which are common on small evaluation sets.

        An epoch whose ranks are above the budget is not the best.
        """
        if any(self.state.global_step < callback.settled_step for callback in self._settling):
            return False
        if super()._determine_best_metric(metrics, trial):
            return True
        if metrics[self.args.metric_for_best_model] != self.state.best_metric:
            return False
        past = (entry for entry in self.state.log_history if entry["step"] == self.state.best_global_step)
        if metrics["eval_loss"] >= next(entry["eval_loss"] for entry in past if "eval_loss" in entry):
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        best_step = self.state.best_global_step
        if best_step:
            self.state.best_model_checkpoint = str(self.run_dir / f"checkpoint-{best_step}")
        if not self.processes.is_main:
            return
        saved = save_checkpoint(
            self.run_dir,
            self.state.global_step,
            {"adapter": self.task.model.stored_tensors(), **{name: own.state() for name, own in self._states.items()}},
            self.optimizer,
            self.lr_scheduler,
            self.state,
        )
        # Not earlier: after a kill, the run continues from the checkpoints that are there.
        delete_others(self.run_dir, {saved, Path(self.state.best_model_checkpoint or saved)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.task.model.load_stored_tensors(load_part(Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        # The main process has written it by then.
        self.processes.from_main(lambda: None)
        self.task.model.load_stored_tensors(load_part(Path(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimiser(Path(checkpoint), self.optimizer, self.lr_scheduler)
            for name, own in self._states.items():
                # A checkpoint of an older release may lack it.
                if tensors := load_part(Path(checkpoint), name):
                    own.load_state(tensors)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_generators(Path(checkpoint))


def _allocation(task: TrainingTask, settings: TrainSettings) -> AllocateRanks | None:
    if settings.budget is None:
        return None
    allocator = RankAllocator(attached_layers(task.base.model), settings.budget)
    return AllocateRanks(allocator, settings.budget_warmup, settings.budget_final)


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the optimiser's groups: the adapter, its B with `lora_plus_ratio`, and the head, each with its rate.

    LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354) trains B at a multiple of A's rate, because the step
    of A that keeps the output's change bounded shrinks with the width, and that of B does not. C is rank x rank, so
    no width acts on it: it keeps the rate of A. PEFT calls the B of its methods lora_B.
    """
    rate = settings.peak_learning_rate
    rates = {
        "adapter": rate,
        "b": rate * (settings.lora_plus_ratio or 1.0),
        "head": settings.head_learning_rate or rate,
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fast = settings.lora_plus_ratio is not None and (name.endswith(".sera_b") or ".lora_B." in name)
            members["head" if name.startswith("head.") else "b" if fast else "adapter"].append(parameter)
    return [{"params": members[group], "lr": rates[group]} for group in rates if members[group]]


class SaveByTheClock(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint within an epoch when the last checkpoint is `seconds` old.

    Saving draws no random numbers, so the time of a save does not change the result. At the last step of an epoch the
    loop saves after the evaluation. A checkpoint before the evaluation would skip this evaluation on resume.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint if it is time."""
        steps_per_epoch = state.max_steps // args.num_train_epochs
        if state.global_step % steps_per_epoch and time.monotonic() - self._last >= self._seconds:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock."""
        self._last = time.monotonic()


class DivergedTraining(ArithmeticError):
    """The training loss became NaN or infinite."""


class StopOnNonFiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stops a run as soon as its loss is NaN or infinite."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for the loss of the steps since the last figure: in a short epoch, these are all of them."""
        control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Raise `DivergedTraining` if the loss is NaN or infinite."""
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedTraining(f"the loss is {loss} at step {state.global_step}")


def evaluations_since_best(state: Any) -> int:
    """Count the evaluations after the one of the best epoch.

    Args:
        state: transformers' `TrainerState`. Its history and its best step are in every checkpoint.
    """
    best = state.best_global_step or 0
    return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


class StopWithoutGain(TrainerCallback):  # type: ignore[misc]
    """Ends training after `patience` evaluations in a row without a new best epoch. A resumed run repeats it exactly.

    transformers' `EarlyStoppingCallback` counts before the trainer decides which epoch is the best one, so it does not
    see that a lower loss decides between equal scores. Its counter is a state of its own.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for the end. The save of an epoch comes after its evaluation."""
        if evaluations_since_best(state) >= self._patience:
            control.should_training_stop = True
        return control
