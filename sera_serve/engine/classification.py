"""Batched classification: rows of different adapters in one forward pass, each under its own head."""

from __future__ import annotations

import itertools
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sera_kernels import BARE_BASE, AdapterBatch
from sera_serve.base import FrozenBase, pool
from sera_serve.errors import EngineUnavailable
from sera_serve.layers import AdapterContext
from sera_serve.residency import DevicePool, Lease


@dataclass(frozen=True)
class LabelScores:
    """The likeliest label of one input, and the probability of each."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ClassifyResult:
    """The outcome of one request, in the order of its inputs."""

    adapter: str
    version: int
    results: list[LabelScores]


@dataclass(frozen=True)
class _Row:
    """One input under way, under its request's lease."""

    lease: Lease
    tokens: list[int]
    scores: Future[LabelScores] = field(default_factory=Future)


class ClassifyBatch:
    """Collects rows from all requests and runs them through the base together, on a thread of its own."""

    def __init__(
        self, base: FrozenBase, context: AdapterContext, device_pool: DevicePool, max_rows: int, cpu_threads: int
    ) -> None:
        """Set up without starting.

        Args:
            base: With serving layers attached, for this object's use alone.
            context: The serving layers' context.
            device_pool: Where the heads are.
            max_rows: The most rows of one forward pass.
            cpu_threads: Threads of a forward pass on a CPU.
        """
        self._base = base
        self._context = context
        self._pool = device_pool
        self._max_rows = max_rows
        self._cpu_threads = cpu_threads
        self._rows: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="classify", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the rows under way, fail those that wait, and end the thread."""
        if self._thread.is_alive():
            self._rows.put(None)
            self._thread.join(timeout=30)
        while True:
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                return
            if row is not None and row.scores.set_running_or_notify_cancel():
                row.scores.set_exception(EngineUnavailable("the engine is stopping"))

    def failure(self) -> str | None:
        """Why the thread is not running, or None while it is."""
        return None if self._thread.is_alive() else "the classification thread is not running"

    def submit(self, lease: Lease, inputs: list[list[int]]) -> list[Future[LabelScores]]:
        """Queue the tokenized inputs of one request, for an adapter with a head.

        The lease passes to the batch, which releases it once every row is done or cancelled.
        """
        rows = [_Row(lease, tokens) for tokens in inputs]
        left = itertools.count(len(rows) - 1, -1)

        def release_after_last(_: Future[LabelScores]) -> None:
            if next(left) == 0:
                lease.release()

        for row in rows:
            row.scores.add_done_callback(release_after_last)
            self._rows.put(row)
        return [row.scores for row in rows]

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)
        while True:
            rows = self._next_rows()
            if rows is None:
                return
            live = [row for row in rows if row.scores.set_running_or_notify_cancel()]
            if not live:
                continue
            try:
                scores = self._classify(live)
            except Exception as error:  # noqa: BLE001 - it is delivered to every request of this batch
                for row in live:
                    row.scores.set_exception(EngineUnavailable(f"classification failed: {error}"))
                continue
            for row, result in zip(live, scores, strict=True):
                row.scores.set_result(result)

    def _next_rows(self) -> list[_Row] | None:
        """Wait for one row, then take what else is there; None at the end."""
        row = self._rows.get()
        rows = []
        while row is not None:
            rows.append(row)
            if len(rows) == self._max_rows:
                return rows
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                return rows
        if rows:
            self._rows.put(None)
            return rows
        return None

    @torch.inference_mode()
    def _classify(self, rows: list[_Row]) -> list[LabelScores]:
        input_ids, mask = self._pad([row.tokens for row in rows])
        slots = torch.tensor([row.lease.slot for row in rows], dtype=torch.int32, device=input_ids.device)
        token_slots = torch.where(mask.bool(), slots.unsqueeze(1), BARE_BASE).flatten().to(torch.int32)
        with self._context.run(AdapterBatch(token_slots)):
            states = self._base.hidden_states(input_ids, mask)
        scores: dict[int, LabelScores] = {}
        by_slot: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_slot.setdefault(row.lease.slot, []).append(index)
        for indices in by_slot.values():
            placement = rows[indices[0]].lease.placement
            config = placement.adapter.config
            pooled = pool(states[indices], mask[indices], config.pooling or self._base.default_pooling)
            weight, bias = self._pool.head(placement)
            probabilities = torch.nn.functional.linear(pooled, weight, bias).float().softmax(dim=1)
            for index, row_probabilities in zip(indices, probabilities.tolist(), strict=True):
                by_label = dict(zip(config.labels or [], row_probabilities, strict=True))
                scores[index] = LabelScores(max(by_label, key=by_label.__getitem__), by_label)
        return [scores[index] for index in range(len(rows))]

    def _pad(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        padding = self._base.tokenizer.pad_token_id
        ids = [tokens + [padding] * (longest - len(tokens)) for tokens in sequences]
        mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in sequences]
        device = self._base.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
