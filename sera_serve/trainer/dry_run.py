"""A dry run: what a training run will read, hold and take. It trains a few steps, and keeps and publishes nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor, nn

from adapters_store import ModuleSpec
from sera_serve.base import FrozenBase
from sera_serve.layers import adapter_tensors, module_specs
from sera_serve.trainer.data.image_batches import take_rows
from sera_serve.trainer.data.packing import packed_tokens
from sera_serve.trainer.order import LengthGroupedOrder
from sera_serve.trainer.run import TrainingRun, build_task, with_run
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TrainingTask, row_counts

_PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)
_BINS = 12
# Batches that are timed: the quantiles of their sizes. The first step of all warms up. The largest tells the memory.
_PROBES = (0.1, 0.5, 1.0)
_TIMED_ROWS = 64
# Rows of the first batch that memory is measured with; a loss of pairs needs two.
_FEW_ROWS = 2
# Gradient and AdamW's two moments, float32, for each trained number.
_OPTIMISER_BYTES = 12
# What a CPU's backward pass and malloc hold beside the kept tensors, as a share of them: three shapes on the embedded
# base had 0.3 to 0.6 (benchmarks/dry_run.py).
_CPU_SHARE = 0.6


@dataclass(frozen=True)
class Lengths:
    """Lengths of the training rows in tokens, after cutting.

    Attributes:
        percentiles: Length by percentile.
        edges: Borders of the bins, from the shortest row to the longest; one more than `counts`.
        counts: Rows in each bin.
        tokens: Tokens of all training rows.
        padded_tokens: Tokens of one epoch's batches with their padding; of packed sequences with `--packing`.
    """

    percentiles: dict[str, int]
    edges: list[int]
    counts: list[int]
    tokens: int
    padded_tokens: int


@dataclass(frozen=True)
class KindOfLayer:
    """Adapted layers of one name: their count, and the numbers that the adapter keeps for them."""

    layers: int
    parameters: int


@dataclass(frozen=True)
class Memory:
    """An estimate of the memory of the largest training step, in bytes.

    Attributes:
        weights: The base, and the adapter with its head.
        optimiser: Gradients, and the moments of AdamW.
        activations: What the forward pass keeps for the backward pass, at the largest batch.
        backward: What the backward pass holds beside it at one time: on a GPU twice the largest kept tensor, on a CPU
            0.6 of all kept tensors, what malloc does not give back included.
        rest: What the process holds already beside the weights: libraries, data, buffers; 0 on a GPU.
        peak: All of it together, and at least what loading the base has needed and what was measured.
        measured: What the timed steps have reached, the largest batch among them; None where no step was run.
        free: What the device has left now.
    """

    weights: int
    optimiser: int
    activations: int
    backward: int
    rest: int
    peak: int
    measured: int | None
    free: int


@dataclass(frozen=True)
class Duration:
    """An estimate of the time of a run, in seconds, from a few timed steps.

    Attributes:
        step: The mean step.
        epoch: One pass over the training rows.
        evaluation: One evaluation.
        total: All epochs, with their evaluations and the last ones. Checkpoints and publishing come on top.
    """

    step: float
    epoch: float
    evaluation: float
    total: float


@dataclass(frozen=True)
class DryRun:
    """What a training run will do.

    Attributes:
        rows: Rows by use. All of them were read and checked.
        lengths: None where rows have no tokens, as in head-only training.
        notes: What would be cut or split.
        kinds: Adapted layers by name.
        trained: Numbers that train, head included.
        head: Numbers of the head.
        base: Numbers of the frozen base.
        steps: Optimiser steps of the whole run.
        memory: See `Memory`.
        time: None where the largest batch would not fit into what is free.
    """

    rows: dict[str, int]
    lengths: Lengths | None
    notes: list[str]
    kinds: dict[str, KindOfLayer]
    trained: int
    head: int
    base: int
    steps: int
    memory: Memory
    time: Duration | None


def dry_run(settings: TrainSettings, *, base: FrozenBase | None = None, console: Console | None = None) -> DryRun:
    """Read and check all rows, load the base, time a few steps, and tell what the run will need.

    Nothing is written: no store is made, no checkpoint, no version.

    Args:
        settings: Options of the run.
        base: A base that is already loaded. Afterwards it has no adapter attached.
        console: Shows the progress.

    Raises:
        AdapterNotFound, InvalidData, InvalidConfiguration: As of `train_adapter`.
    """
    return with_run(settings, _measure, base=base, console=console)


def _measure(run: TrainingRun) -> DryRun:
    task, settings = build_task(run), run.settings
    # The timed evaluation of an untrained model may add notes on a run that has not been.
    notes = list(task.notes)
    batches = list(_batches(task, settings))
    sizes = [_padded_tokens(task, settings, batch) for batch in batches]
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    largest = int(np.argmax(sizes))
    memory = _memory(task, _even_rows(task, batches[largest], sizes[largest]), trained)
    duration = None
    if memory.free > memory.peak - _held(task.base):
        duration = _duration(task, settings, batches, sizes)
        measured = _past_peak(task.base)
        memory = replace(memory, measured=measured, peak=max(memory.peak, measured))
    adapter = sum(tensor.numel() for tensor in adapter_tensors(task.base.model).values())
    return DryRun(
        rows=row_counts(task),
        lengths=_lengths(task, sum(sizes)),
        notes=notes,
        kinds=_kinds(task.base.model),
        trained=trained,
        head=task.model.head_parameters,
        base=sum(p.numel() for p in task.base.model.parameters()) - adapter,
        steps=settings.epochs * len(batches),
        memory=memory,
        time=duration,
    )


def _batches(task: TrainingTask, settings: TrainSettings) -> Iterator[list[int]]:
    order = list(LengthGroupedOrder(task.lengths, settings.batch_size, settings.seed, lambda: 0))
    for start in range(0, len(order), settings.batch_size):
        yield order[start : start + settings.batch_size]


def _padded_tokens(task: TrainingTask, settings: TrainSettings, batch: Sequence[int]) -> int:
    lengths = [task.lengths[i] for i in batch]
    return packed_tokens(task.base, lengths) if settings.packing else len(batch) * max(lengths)


def _even_rows(task: TrainingTask, batch: Sequence[int], size: int) -> list[int]:
    """The rows of a batch, the longest first. Of a packed batch: copies of the longest row that are as many tokens.

    No two copies share a sequence, so their number tells that of the sequences.
    """
    rows = sorted(batch, key=lambda i: -task.lengths[i])
    count = size // task.lengths[rows[0]]
    return rows if count == len(rows) else rows[:1] * count


def _lengths(task: TrainingTask, padded: int) -> Lengths | None:
    lengths = np.asarray(task.lengths)
    if lengths.max() <= 1:
        return None
    edges = np.unique(np.linspace(lengths.min(), lengths.max(), _BINS + 1).round().astype(int))
    if len(edges) == 1:
        # All rows are of one length, which is a bin.
        edges = np.repeat(edges, 2)
    counts, _ = np.histogram(lengths, edges)
    values = np.percentile(lengths, _PERCENTILES, method="higher")
    return Lengths(
        percentiles={str(place): int(value) for place, value in zip(_PERCENTILES, values, strict=True)},
        edges=edges.tolist(),
        counts=counts.tolist(),
        tokens=int(lengths.sum()),
        padded_tokens=padded,
    )


def _kinds(model: nn.Module) -> dict[str, KindOfLayer]:
    found: dict[str, list[int]] = {}
    for path, shape in module_specs(model).items():
        found.setdefault(path.rpartition(".")[2], []).append(ModuleSpec(**shape).parameters)
    return {name: KindOfLayer(len(counts), sum(counts)) for name, counts in found.items()}


def _memory(task: TrainingTask, rows: Sequence[int], trained: int) -> Memory:
    # What rows of one padded length keep grows evenly with their number, so small batches tell what the largest keeps.
    few = min(len(rows), _FEW_ROWS)
    activations, widest = _kept(task, rows[:few])
    backward = 2 * widest * len(rows) // few
    if len(rows) > few:
        more = min(len(rows), 2 * few)
        activations += (_kept(task, rows[:more])[0] - activations) * (len(rows) - few) // (more - few)
    if task.base.device.type != "cuda":
        backward = int(_CPU_SHARE * activations)
    weights = _nbytes([*task.base.model.parameters(), *task.base.model.buffers(), *task.model.parameters()])
    optimiser = _OPTIMISER_BYTES * trained
    held = _held(task.base)
    peak = max(held + optimiser + activations + backward, _past_peak(task.base))
    free = torch.cuda.mem_get_info()[0] if task.base.device.type == "cuda" else psutil.virtual_memory().available
    return Memory(weights, optimiser, activations, backward, max(held - weights, 0), peak, None, free)


def _kept(task: TrainingTask, rows: Sequence[int]) -> tuple[int, int]:
    """Bytes that a forward pass keeps for its backward pass, weights aside, and bytes of the largest kept tensor."""
    own = {t.untyped_storage().data_ptr() for t in [*task.base.model.parameters(), *task.base.model.buffers()]}
    own |= {parameter.untyped_storage().data_ptr() for parameter in task.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    task.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(task, rows)
    del loss
    return sum(kept.values()), max(kept.values(), default=0)


def _loss(task: TrainingTask, rows: Sequence[int]) -> Tensor:
    inputs = task.collate([task.train_rows[i] for i in rows])
    loss: Tensor = task.model(**{name: tensor.to(task.base.device) for name, tensor in inputs.items()})["loss"]
    return loss


def _nbytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _held(base: FrozenBase) -> int:
    if base.device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _past_peak(base: FrozenBase) -> int:
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(
    task: TrainingTask, settings: TrainSettings, batches: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Duration:
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.0)

    def step(batch: Sequence[int]) -> None:
        task.model.train()
        _loss(task, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    probes = sorted({order[int(place * (len(order) - 1))] for place in _PROBES}, key=lambda i: sizes[i])
    step(batches[probes[0]])
    seconds = [min(_timed(task.base, partial(step, batches[i])) for _ in range(2)) for i in probes]
    epoch = float(_by_size(np.asarray(sizes), [sizes[i] for i in probes], seconds).sum())
    evaluation, test = (_evaluation(task, rows) for rows in (task.eval_rows, task.test_rows))
    # The kept epoch is evaluated once more at the end.
    total = settings.epochs * (epoch + evaluation) + evaluation + test
    return Duration(epoch / len(batches), epoch, evaluation, total)


def _by_size(sizes: Any, known: Sequence[int], seconds: Sequence[float]) -> Any:
    """Seconds of batches of these sizes: linear between known ones, in proportion to the nearest one outside."""
    inside = np.interp(sizes, known, seconds)
    return inside * np.maximum(sizes / known[-1], 1.0) * np.minimum(sizes / known[0], 1.0)


def _evaluation(task: TrainingTask, rows: Sequence[Any]) -> float:
    if not rows:
        return 0.0
    count = min(len(rows), _TIMED_ROWS)
    places = [i * len(rows) // count for i in range(count)]
    chosen = take_rows(rows, places)
    return _timed(task.base, lambda: task.evaluate(chosen)) * len(rows) / len(chosen)


def _timed(base: FrozenBase, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
