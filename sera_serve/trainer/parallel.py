"""One run on several processes, as `accelerate launch --num_processes N` or `torchrun` starts them.

Every process has the whole base, the same rows and the same order. Each takes its share of the rows of a batch, and the
gradients are averaged. Losses are means, and shares differ in rows and learned tokens, so each process weighs its mean
by its part of the batch's items: the sum is the mean that one process would have computed, up to the order in which
floating-point numbers are added. Dropout draws other numbers than one process does.

The first process alone writes checkpoints and publishes. A process that fails ends, and the launcher ends the others.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.model import IGNORED

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of this run.

    Attributes:
        index: Number of this process; 0 is the main process.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and publishes."""
        return self.index == 0

    def from_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, and return its result in all of them. The result must be picklable."""
        if self.count == 1:
            return work()
        values: list[Any] = [work() if self.is_main else None]
        broadcast_object_list(values)
        result: T = values[0]
        return result

    def total(self, number: Tensor) -> Tensor:
        """Return the sum of a number over the processes."""
        if self.count > 1:
            number = number.clone()
            torch.distributed.all_reduce(number)
        return number


def join_processes(device: str) -> Processes:
    """Find the other processes of this run. Without a launcher, there are none.

    Args:
        device: Torch device of the run; on a CPU the processes talk through gloo.
    """
    # Launchers tell by environment variables, which accelerate reads.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes)


def end_process(processes: Processes) -> None:
    """End a process that has others beside it, once its run is complete; returns where there are no others.

    Threads of the libraries may abort a process at its end ("terminate called without an active exception"). The
    launcher would end the other processes, and call the run a failure. So nothing that comes at an end is waited for.
    """
    if processes.count > 1:
        PartialState().destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class ShareOfBatches(Sampler[list[tuple[int, bool]]]):
    """The rows of each batch that one process takes: every `count`-th, from `index` on.

    An item is a row's number, and whether the row counts. A process without a row in a short batch takes the first one,
    which does not count, because every process must take part in every step.
    """

    def __init__(self, order: Sampler[int], batch_size: int, processes: Processes) -> None:
        self._order = order
        self._batch_size = batch_size
        self._processes = processes

    def __len__(self) -> int:
        rows = len(self._order)  # type: ignore[arg-type]
        return int(-(-rows // self._batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        rows = list(self._order)
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            share = batch[self._processes.index :: self._processes.count]
            yield [(row, True) for row in share] or [(batch[0], False)]


class CountedRows(Dataset[tuple[Any, bool]]):
    """Rows that are looked up by the items of `ShareOfBatches`."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Any, bool]:
        row, counts = item
        return self._rows[row], counts

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to rows that depend on it, such as images with augmentation. It counts from 0."""
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)


def counted_batch(
    collate: Callable[[Sequence[Any]], dict[str, Tensor]], task: str, pairs: Sequence[tuple[Any, bool]]
) -> dict[str, Tensor]:
    """Collate a share, and add `loss_items`: the number of rows or tokens that its mean loss stands for.

    Raises:
        InvalidConfiguration: The task's loss is no mean over rows or tokens.
    """
    batch = collate([row for row, _ in pairs])
    if "labels" not in batch:
        raise InvalidConfiguration(
            f"the loss of task {task} compares all rows of a batch; run it in one process", param="task"
        )
    items = _loss_items(task, batch) if all(counts for _, counts in pairs) else 0
    return {**batch, "loss_items": torch.tensor(float(items))}


def _loss_items(task: str, batch: Mapping[str, Tensor]) -> int:
    labels = batch["labels"]
    if task == "generate":
        # The first token of a row is never predicted.
        labels = labels[:, 1:]
    if labels.dim() == 1 or labels.is_floating_point():
        return len(labels)
    return int((labels != IGNORED).sum())


def may_leave_out(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether a trained parameter may have no part in the loss of a batch: one of a pooler, or of an expert.

    torch must then look for such parameters in each step. Where there are none, it warns that it looks for nothing.

    Args:
        model: Returns its loss under `loss`.
        batch: Its keyword arguments, on any device. Only what the experts of a mixture compute depends on the batch.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any("expert" in name for name in trained):
        return True
    device = next(iter(trained.values())).device
    with torch.enable_grad():
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return any(gradient is None for gradient in gradients)


class SeedEachStep(TrainerCallback):  # type: ignore[misc]
    """Seeds the generators of dropout by run, step and process.

    A checkpoint holds the generators of the main process only. With a seed for each step, a resumed run draws what an
    unbroken one draws in every process.
    """

    def __init__(self, seed: int, processes: Processes) -> None:
        self._seed = seed
        self._processes = processes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed the generators for this step."""
        text = f"{self._seed} {state.global_step} {self._processes.index}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
