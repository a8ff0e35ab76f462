"""Classification requests on their way through queue and batch, in parts of one forward pass each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial

from adapters_store import AdapterStore, ResolvedAdapter
from sera_serve.config import ServeSettings
from sera_serve.engine.admission import Room, Visit
from sera_serve.engine.classification import ClassifyBatch, ClassifyResult, LabelScores
from sera_serve.engine.generating import wrong_task
from sera_serve.engine.generation import PRIORITIES, Priority
from sera_serve.engine.prompts import ClassifyTokens
from sera_serve.engine.reception import Reception, deadline_after, finish_by
from sera_serve.engine.request import Request
from sera_serve.errors import UnsupportedTask
from sera_serve.residency import Lease

# Passes' worth of rows in the batch: enough to find rows of like length among, few enough to let others in soon.
_PASSES = 4


@dataclass(frozen=True)
class _Part:
    """Rows of one request that go into the batch together: as many as one pass may take.

    Attributes:
        positions: Of the rows in the request.
        scores: Of the rows; empty until the part is in the batch.
    """

    request: Request
    positions: list[int]
    scores: list[Future[LabelScores]]


class Inputs:
    """Classifies by batches of rows. A request of many rows waits in parts, so that others come in between."""

    def __init__(
        self,
        batch: ClassifyBatch,
        tokens: ClassifyTokens,
        base_max_length: int,
        store: AdapterStore,
        reception: Reception,
        settings: ServeSettings,
    ) -> None:
        """Set up.

        Args:
            batch: Runs the rows.
            tokens: Tokenizes the inputs.
            base_max_length: The most tokens of an input, unless its adapter says less.
            store: Resolves the names of adapters.
            reception: Where requests wait.
            settings: Sizes of a pass.
        """
        self._batch = batch
        self._tokens = tokens
        self._base_max_length = base_max_length
        self._store = store
        self._reception = reception
        self._queue = reception.open_queue(Room(_PASSES * settings.classify_max_batch))
        self._max_rows, self._max_tokens = settings.classify_max_batch, settings.max_batch_tokens
        # A digest's content never changes.
        self._task_of = lru_cache(maxsize=1 << 16)(self._read_task)

    async def classify(
        self, adapter: str, inputs: list[str], priority: Priority, timeout_s: float | None
    ) -> ClassifyResult:
        """Classify each input with the adapter's head; see `ServingEngine.classify`."""
        deadline = deadline_after(timeout_s)
        visit = self._reception.enter(adapter)
        parts: list[_Part] = []
        results: dict[int, LabelScores] = {}
        try:
            resolved, rows = await asyncio.to_thread(self._read, adapter, inputs)
            for positions in _passes(rows, self._max_rows, self._max_tokens):
                parts.append(self._part(visit, resolved.digest, positions, rows, PRIORITIES.index(priority)))
                self._queue.submit(parts[-1].request)
            await self._reception.turn(parts[0].request, deadline)
            waited = time.monotonic() - visit.arrived
            for part in parts:
                await finish_by(deadline, asyncio.wrap_future(part.request.begun))
                scores = await finish_by(deadline, asyncio.gather(*map(asyncio.wrap_future, part.scores)))
                results.update(zip(part.positions, scores, strict=True))
        finally:
            for part in parts:
                if not self._queue.withdraw(part.request):
                    part.request.begun.add_done_callback(partial(_cancel_all, part.scores))
            self._reception.leave(visit, served=bool(results) and len(results) == len(inputs))
        return ClassifyResult(resolved.adapter, resolved.version, [results[i] for i in range(len(inputs))], waited)

    def _part(self, visit: Visit, digest: str, positions: list[int], rows: list[list[int]], priority: int) -> _Part:
        own = [rows[position] for position in positions]
        scores: list[Future[LabelScores]] = []

        def begin(lease: Lease | None) -> None:
            if lease is None:
                raise UnsupportedTask("the bare base has no head; name a classifier", param="adapter")
            scores.extend(self._batch.submit(lease, own, partial(self._queue.finish, request)))

        request = Request(
            tenant=visit.tenant,
            prompt_tokens=sum(map(len, own)),
            priority=priority,
            places=len(own),
            visit=visit,
            digest=digest,
            begin=begin,
        )
        return _Part(request, positions, scores)

    def _read(self, adapter: str, inputs: list[str]) -> tuple[ResolvedAdapter, list[list[int]]]:
        resolved = self._store.resolve(adapter)
        task, max_length = self._task_of(resolved.digest)
        if task != "classify":
            raise wrong_task(adapter, task)
        return resolved, self._tokens(inputs, max_length or self._base_max_length)

    def _read_task(self, digest: str) -> tuple[str, int | None]:
        config = self._store.config(digest)
        return config.task, config.max_length


def _passes(rows: list[list[int]], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Positions of rows by ascending length, in groups of what one forward pass may take; a longer row goes alone."""
    group: list[int] = []
    for position in sorted(range(len(rows)), key=lambda row: len(rows[row])):
        if group and (len(group) == max_rows or (len(group) + 1) * len(rows[position]) > max_tokens):
            yield group
            group = []
        group.append(position)
    yield group


def _cancel_all(futures: list[Future[LabelScores]], _: object) -> None:
    for future in futures:
        future.cancel()
