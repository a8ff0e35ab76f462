"""Batched classification: rows of different adapters in one forward pass, each under its own head."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch
from sera_serve.base import FrozenBase, pool_states
from sera_serve.engine.bucketing import choose_rows
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
    """The outcome of one request, in the order of its inputs.

    Attributes:
        waited_s: Seconds from the request's arrival until its first rows were handed to the device.
    """

    adapter: str
    version: int
    results: list[LabelScores]
    waited_s: float = 0.0


@dataclass(eq=False)
class ClassifyRow:
    """One input under way, under its request's lease."""

    lease: Lease
    tokens: list[int]
    came: float = field(default_factory=time.monotonic)
    scores: Future[LabelScores] = field(default_factory=Future)


class ClassifyBatch:
    """Runs rows of all requests through the base together, on a thread of its own.

    A pass takes rows of like length, whatever their adapters and label sets. It never waits for company: while
    the device is busy rows gather, and the next pass takes the fullest bucket. A row that has waited `max_wait_s` goes
    first, with those of its length; so nothing is passed over for longer than that and the passes of older rows.

    Beside generation on the same base the two threads share the device as the operating system, or the driver, lets
    them; a pass has no more tokens than a step of generation, so that neither holds the other up for long.
    """

    def __init__(
        self,
        base: FrozenBase,
        context: AdapterContext,
        device_pool: DevicePool,
        *,
        max_rows: int,
        max_tokens: int,
        max_wait_s: float,
        cpu_threads: int,
    ) -> None:
        """Set up without starting.

        Args:
            base: With serving layers attached, for this object's use alone.
            context: The serving layers' context.
            device_pool: Where the heads are.
            max_rows: The most rows of one forward pass.
            max_tokens: The most tokens of one forward pass, padding included; a longer row goes alone.
            max_wait_s: Seconds after which a row is not passed over any more.
            cpu_threads: Threads of a forward pass on a CPU.
        """
        self._base = base
        self._context = context
        self._pool = device_pool
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._cpu_threads = cpu_threads
        # In order of arrival; the caller's admission keeps it short.
        self._rows: list[ClassifyRow] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="classify", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the rows under way, fail those that wait, and end the thread."""
        with self._changed:
            self._stopping = True
            rows, self._rows = self._rows, []
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        for row in rows:
            if row.scores.set_running_or_notify_cancel():
                row.scores.set_exception(EngineUnavailable("the engine is stopping"))

    def failure(self) -> str | None:
        """Why the thread is not running, or None while it is."""
        return None if self._thread.is_alive() else "the classification thread is not running"

    def submit(self, lease: Lease, inputs: list[list[int]], done: Callable[[], None]) -> list[Future[LabelScores]]:
        """Add tokenized inputs for an adapter with a head.

        Args:
            lease: Held by the caller until `done`.
            inputs: Token ids of each row.
            done: Called once, when every row is classified, failed or cancelled.

        Raises:
            EngineUnavailable: The batch is stopping.
        """
        rows = [ClassifyRow(lease, tokens) for tokens in inputs]
        left = itertools.count(len(rows) - 1, -1)

        def after_last(_: Future[LabelScores]) -> None:
            if next(left) == 0:
                done()

        with self._changed:
            if self._stopping:
                raise EngineUnavailable("the engine is stopping")
            self._rows += rows
            self._changed.notify()
        for row in rows:
            row.scores.add_done_callback(after_last)
        return [row.scores for row in rows]

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)
        while rows := self._next_rows():
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

    def _next_rows(self) -> list[ClassifyRow]:
        """Wait for rows and take those of the next pass; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._stopping)
            if self._stopping:
                return []
            late = time.monotonic() - self._rows[0].came >= self._max_wait_s
            lengths = [len(row.tokens) for row in self._rows]
            chosen = choose_rows(lengths, self._max_rows, self._max_tokens, must=0 if late else None)
            taken = [self._rows[position] for position in chosen]
            for position in reversed(chosen):
                del self._rows[position]
            return taken

    @torch.inference_mode()
    def _classify(self, rows: list[ClassifyRow]) -> list[LabelScores]:
        input_ids, mask = self._pad([row.tokens for row in rows])
        slots = torch.tensor([row.lease.slot for row in rows], dtype=torch.int32, device=input_ids.device)
        token_slots = torch.where(mask.bool(), slots.unsqueeze(1), NO_ADAPTER).flatten().to(torch.int32)
        with self._context.run(AdapterBatch(token_slots)):
            states = self._base.hidden_states(input_ids, mask)
        scores: dict[int, LabelScores] = {}
        by_slot: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_slot.setdefault(row.lease.slot, []).append(index)
        for indices in by_slot.values():
            placement = rows[indices[0]].lease.placement
            config = placement.adapter.config
            pooled = pool_states(states[indices], mask[indices], config.pooling or self._base.default_pooling)
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
