"""Classification and embeddings: rows of different adapters in one pass, each under its own head, or pooled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store import ResolvedAdapter
from sera_kernels import NO_ADAPTER
from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.config import ServeSettings
from sera_serve.engine.memory import free_memory, step_failed
from sera_serve.engine.overflow import OverflowReporter, RowGauge
from sera_serve.engine.request import ClassificationRequest, EmbeddingSpec, FinishReason, classes_of
from sera_serve.engine.results import HeadResult, RowKind, RowResult, head_result, row_numbers, to_host
from sera_serve.engine.scheduler import Scheduler
from sera_serve.engine.tasks.pass_graphs import PassGraphs
from sera_serve.engine.tasks.passes import PassStates, run_pass
from sera_serve.engine.tasks.runner import TaskRunner, logger
from sera_serve.layers import AdapterContext
from sera_serve.residency import DevicePool, Lease, head_logits

# Passes' worth of rows in the batch: enough to find rows of like length among, few enough to let others in soon.
_PASSES = 4
# Padding may be a fifth of a pass, or as many tokens as cost less than another pass.
_PADDING_SHARE = 0.2
_PADDING_OF_NO_ACCOUNT = 128


@dataclass(frozen=True, kw_only=True)
class RowTimes:
    """What a call of rows waited for.

    Attributes:
        waited_s: Seconds from the call's arrival until its first rows ran.
        load_began: When an adapter first began to load for it (`time.monotonic`); None if none had to.
        load_s: Seconds that this took.
    """

    waited_s: float = 0.0
    load_began: float | None = None
    load_s: float = 0.0


@dataclass(frozen=True)
class ClassifyResult(RowTimes):
    """The outcome of one call, in the order of its inputs.

    Attributes:
        version: Of the adapter; None for a combination.
        prompt_tokens: Tokens of all inputs.
    """

    adapter: str
    version: int | None
    results: list[HeadResult]
    prompt_tokens: int = 0


@dataclass(frozen=True)
class EmbedResult(RowTimes):
    """The vectors of one call, in the order of its inputs.

    Attributes:
        adapter: None is the base model.
        version: Of the adapter; None for a combination and the base model.
        vectors: Of each input, float32 (hidden,).
        prompt_tokens: Tokens of each input.
    """

    adapter: str | None
    version: int | None
    vectors: list[NDArray[np.float32]]
    prompt_tokens: list[int]


@dataclass(frozen=True)
class RowGroup:
    """The rows of one call under one adapter; None is the base model."""

    adapter: ResolvedAdapter | None
    rows: list[ModelInputs]


@dataclass(eq=False)
class _Row:
    """One input in the batch."""

    request: ClassificationRequest
    index: int
    entered: float

    @property
    def inputs(self) -> ModelInputs:
        return self.request.rows[self.index]


class ClassificationRunner(TaskRunner[ClassificationRequest]):
    """Runs rows of all requests through the base together, those to classify and those to embed.

    A pass takes rows of like length, all texts or all images, whatever their adapters and label sets. A pass never
    waits for more rows: while the device is busy rows gather, and the next pass takes the fullest bucket. A row that
    has waited `classify_max_wait_ms` goes first, with rows of its length. So a row is passed over for that time at
    most, and then by older rows alone.

    Beside generation on the same base, the operating system or the driver shares the device between the two threads.
    A pass has no more tokens than a step of generation, so that neither delays the other for long.
    """

    task = "classify"

    def __init__(
        self,
        base: FrozenBase,
        context: AdapterContext,
        device_pool: DevicePool,
        scheduler: Scheduler[ClassificationRequest],
        settings: ServeSettings,
    ) -> None:
        """Set up without starting.

        Args:
            base: With serving layers attached, for this object's use alone.
            context: The serving layers' context.
            device_pool: Where the heads are.
            scheduler: This runner's own from now on.
            settings: The server's. A pass has at most `classify_max_batch` rows and `batch_tokens` tokens, padding
                included; a longer row goes alone.
        """
        super().__init__(scheduler, base.device, settings.cpu_threads)
        self._base = base
        self._context = context
        self._pool = device_pool
        self._max_rows = settings.classify_max_batch
        self._max_tokens = settings.batch_tokens
        # After it, a row is not passed over any more.
        self._max_wait_s = settings.classify_max_wait_ms / 1000
        self._gauge = RowGauge(base.model)
        self._overflows = OverflowReporter()
        # In the order in which they entered the batch.
        self._rows: list[_Row] = []
        self._requests: list[ClassificationRequest] = []
        self.graphs: PassGraphs | None = None
        """Runs short passes where it is set."""
        if base.device.type == "cuda" and settings.cuda_graphs:
            self._capture()

    def _capture(self) -> None:
        # What was allocated so far was cleared on another stream.
        torch.cuda.synchronize(self._base.device)
        try:
            with torch.inference_mode(), self.on_stream():
                graphs = PassGraphs(self._base, self._context, self._max_rows, self._max_tokens)
                graphs.capture_first()
        except RuntimeError as error:
            free_memory(error)
            reason = str(error).partition("\n")[0]
            logger.warning("classification runs without CUDA graphs, which is slower for short texts: %s", reason)
        else:
            self.graphs = graphs

    def in_batch(self) -> list[ClassificationRequest]:
        """The requests in the batch."""
        return list(self._requests)

    def remove(self, request: ClassificationRequest) -> None:
        """Take a running request out of the batch; its rows that have not run do not run."""
        self._requests.remove(request)
        self._rows = [row for row in self._rows if row.request is not request]

    def settle(self) -> None:
        """Wait until no pass runs on the device."""
        # Its error, if any, is that of the device, which has ended the loop.
        with suppress(Exception):
            self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def step(self) -> bool:
        """Let requests in, run the rows of one pass, and finish the requests whose rows all have their results."""
        self._admit()
        self.scheduler.hint_new()
        if not self._rows:
            return False
        rows = self._take_rows()
        requests = dict.fromkeys(row.request for row in rows)
        try:
            results = self._classify(rows)
        except Exception as error:  # noqa: BLE001 - it is told to every request of this pass
            logger.error("a pass of %d rows failed", len(rows), exc_info=error)
            free_memory(error)
            # What was launched before it failed reads adapters still, which the end of a lease lets others overwrite.
            self._wait()
            for request in requests:
                self.end(request, FinishReason.FAILED, step_failed(error))
            return True
        overflowed = dict.fromkeys(row.request for row, result in zip(rows, results, strict=True) if result is None)
        for row, result in zip(rows, results, strict=True):
            row.request.results[row.index] = result
        for request in requests:
            if request in overflowed:
                self.end(request, FinishReason.FAILED, self._overflows.error(request))
            elif all(result is not None for result in request.results):
                self.end(request, FinishReason.COMPLETED)
        return True

    def _admit(self) -> None:
        while (request := self.scheduler.first()) is not None and self._fits(request):
            if self.scheduler.start(request):
                self._requests.append(request)
                now = time.monotonic()
                self._rows += [_Row(request, index, now) for index in range(len(request.rows))]

    def _fits(self, request: ClassificationRequest) -> bool:
        """Whether a request may enter the batch; one that is larger than the whole batch may enter an empty one."""
        taken = sum(other.num_rows for other in self._requests)
        return not taken or taken + request.num_rows <= _PASSES * self._max_rows

    def _take_rows(self) -> list[_Row]:
        late = time.monotonic() - self._rows[0].entered >= self._max_wait_s
        # By kind, in the order of arrival: the first row is of the first kind.
        kinds: dict[bool, list[int]] = {}
        for position, row in enumerate(self._rows):
            kinds.setdefault(row.inputs.is_image, []).append(position)
        best: list[int] = []
        for positions in kinds.values():
            lengths = [len(self._rows[position].inputs) for position in positions]
            must = 0 if late else None
            found = [positions[row] for row in choose_rows(lengths, self._max_rows, self._max_tokens, must)]
            if must is not None:
                best = found
                break
            if (-len(found), found[0]) < (-len(best), min(best, default=0)):
                best = found
        taken = [self._rows[position] for position in best]
        for position in reversed(best):
            del self._rows[position]
        return taken

    def _classify(self, rows: list[_Row]) -> list[RowResult | None]:
        """The result of each row; None where its adapter overflows.

        The host waits for the device once, for all results: a wait for each adapter would leave the device idle.
        """
        groups: dict[tuple[int, EmbeddingSpec | None], list[_Row]] = {}
        for row in rows:
            lease = row.request.lease
            groups.setdefault((lease.slot if lease else NO_ADAPTER, row.request.embedding), []).append(row)
        # Rows of one adapter are side by side in the pass, so that slices find them.
        ordered = [row for group in groups.values() for row in group]
        row_slots = [slot for (slot, _), group in groups.items() for _ in group]
        adapters = [row.request.lease.placement.adapter for row in ordered if row.request.lease]
        must_watch = self._gauge.must_watch(adapter.stretch for adapter in adapters)
        watching = self._gauge.watching(len(rows), self._base.device) if must_watch else nullcontext()
        # Of this pass alone, as in a step of generation: other tenants' adapters change no launch of it.
        classes = classes_of(row.request for row in ordered)
        inputs = [row.inputs for row in ordered]
        embeds = any(embedding is not None for _, embedding in groups)
        with watching as norms:
            outcome = self.graphs.run(inputs, row_slots, classes, embeds) if self.graphs and norms is None else None
            if outcome is None:
                outcome = run_pass(self._base, self._context, inputs, row_slots, classes, embeds)
        kinds: dict[RowKind, tuple[list[_Row], list[Tensor]]] = {}
        end = 0
        for (_, embedding), group in groups.items():
            begin, end = end, end + len(group)
            kind, found = self._read(outcome, slice(begin, end), group[0].request.lease, embedding)
            own_rows, parts = kinds.setdefault(kind, ([], []))
            own_rows += group
            parts.append(found)
        on_device = [row_numbers(kind, torch.cat(parts)) for kind, (_, parts) in kinds.items()]
        brought = to_host(on_device if norms is None else [*on_device, norms])
        results: dict[_Row, RowResult | None] = {}
        for (own_rows, _), numbers in zip(kinds.values(), brought[: len(kinds)], strict=True):
            results.update((row, _result(row, own)) for row, own in zip(own_rows, numbers, strict=True))
        if norms is not None:
            sound = np.isfinite(brought[-1])
            results.update((row, None) for row, is_sound in zip(ordered, sound, strict=True) if not is_sound)
        return [results[row] for row in rows]

    def _read(
        self, outcome: PassStates, rows: slice, lease: Lease | None, embedding: EmbeddingSpec | None
    ) -> tuple[RowKind, Tensor]:
        """What an adapter's head says of its rows of a pass, float32, or their pooled states; and their kind."""
        adapter = lease.placement.adapter if lease else None
        if embedding is not None:
            pooling = embedding.pooling or (adapter.config.pooling if adapter else None)
            pooled = outcome.embedded(pooling or self._base.default_pooling)[rows].float()
            return RowKind(None, pooled.shape[1], normalize=embedding.normalize), pooled
        assert lease is not None and adapter is not None and adapter.head is not None
        states = outcome.for_head(adapter.config, self._base.default_pooling)[rows]
        logits = head_logits(states, self._pool.head(lease.placement), adapter.head.activation).float()
        return RowKind(adapter.config.task, logits.shape[-1], adapter.config.multi_label), logits


def _result(row: _Row, numbers: NDArray[np.float32]) -> RowResult | None:
    if row.request.embedding is not None:
        # A copy: else each vector would keep the numbers of the whole pass.
        return None if np.isnan(numbers[0]) else numbers.copy()
    assert row.request.lease is not None
    return head_result(row.request.lease.placement.adapter.config, numbers, row.inputs)


def split_call(
    call: ClassificationRequest, groups: Sequence[RowGroup], max_rows: int, max_tokens: int
) -> list[ClassificationRequest]:
    """The parts of a call: each has one adapter and what one pass may take; others may run between two parts.

    Within an adapter the parts go by ascending length. The rows' places in the call count through all groups.
    """
    parts = []
    first = 0
    for group in groups:
        for positions in _passes(group.rows, max_rows, max_tokens):
            rows = [group.rows[position] for position in positions]
            parts.append(
                ClassificationRequest(
                    principal=call.principal,
                    id=call.id,
                    priority=call.priority,
                    prompt_tokens=sum(map(len, rows)),
                    num_rows=len(rows),
                    adapter=group.adapter,
                    parent=call,
                    reader=call.reader,
                    arrived=call.arrived,
                    rows=rows,
                    positions=[first + position for position in positions],
                    embedding=call.embedding,
                )
            )
        first += len(group.rows)
    return parts


def _passes(rows: Sequence[ModelInputs], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Positions of rows by ascending length, in groups of what one forward pass may take; a longer row goes alone.

    Texts come before images, and no group has both.
    """
    group: list[int] = []
    for position in sorted(range(len(rows)), key=lambda row: (rows[row].is_image, len(rows[row]))):
        is_full = len(group) == max_rows or (len(group) + 1) * len(rows[position]) > max_tokens
        if group and (is_full or rows[group[0]].is_image != rows[position].is_image):
            yield group
            group = []
        group.append(position)
    yield group


def choose_rows(lengths: Sequence[int], max_rows: int, max_tokens: int, must: int | None = None) -> list[int]:
    """Choose the rows of the next pass: as many as fit, and among equally many the earliest.

    Args:
        lengths: Tokens of each waiting row, in the order of their arrival.
        max_rows: The most rows of a pass.
        max_tokens: The most tokens of a pass, padding included; one row may have more.
        must: A row that has to be among them, or None.

    Returns:
        Positions in `lengths`, ascending; at least one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    best: list[int] = []
    start = total = 0
    # Windows over the rows by length: each ends at the longest row of its pass.
    for end, row in enumerate(order):
        total += lengths[row]
        while start < end and not _fits(end + 1 - start, lengths[row], total, max_rows, max_tokens):
            total -= lengths[order[start]]
            start += 1
        window = order[start : end + 1]
        if (must is None or must in window) and (-len(window), min(window)) < (-len(best), min(best, default=0)):
            best = window
    return sorted(best)


def _fits(rows: int, longest: int, tokens: int, max_rows: int, max_tokens: int) -> bool:
    padded = rows * longest
    padding = padded - tokens
    return (
        rows <= max_rows
        and padded <= max_tokens
        and (padding <= _PADDING_OF_NO_ACCOUNT or padding <= _PADDING_SHARE * padded)
    )
