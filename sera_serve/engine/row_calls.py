"""The engine's calls whose rows go into shared passes: classifications and embeddings."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from adapters_store import ResolvedAdapter
from sera_serve.base import LONG_CHARACTERS, ImageInput, ModelInputs, Pooling
from sera_serve.config import ServeSettings
from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.image_rows import ImageRowMaker
from sera_serve.engine.request import (
    PRIORITIES,
    AdapterChoice,
    ClassificationRequest,
    EmbeddingSpec,
    FinishReason,
    Principal,
    Priority,
    Request,
    Task,
)
from sera_serve.engine.results import HeadResult, RowResult, joined_windows
from sera_serve.engine.rows import EmbeddingInputs, Inputs, RowMaker, TextsOrTokens
from sera_serve.engine.stream import EventReader, Mailbox, deadline_exceeded
from sera_serve.engine.tasks import TaskRunner
from sera_serve.engine.tasks.classify import ClassifyResult, EmbedResult, RowGroup, RowTimes, split_call
from sera_serve.engine.tenant_memory import Reservation, TenantMemory
from sera_serve.errors import InvalidRequest
from sera_serve.random_bytes import random_hex
from sera_serve.threads import BoundedExecutor

# Rows, or parts of a call, that the event loop handles at once without waiting for a turn.
_FEW = 16
# Parts of one tenant's calls that wait. The garbage collector visits some 12 objects of each: 65,536 parts stopped all
# threads for 0.17 s.
_MAX_PARTS = 1 << 14
# Results that are not counted: to reserve is to look at all reservations.
_SMALL_ANSWER = 1 << 16
R = TypeVar("R")
Charge = Callable[[int], None]
"""Is told how many tokens a call has had computed, once."""


@dataclass(frozen=True)
class TimeLimits:
    """Times of the running event loop.

    Attributes:
        latest_start: The request must have been started.
        deadline: The request must be finished; None is never.
    """

    latest_start: float
    deadline: float | None

    @property
    def first(self) -> float:
        """When a request that is not started ends."""
        return self.latest_start if self.deadline is None else min(self.latest_start, self.deadline)


class RowCalls(ABC):
    """The part of `ServingEngine` for calls of several rows. The engine has what every call needs.

    A call is admitted once. Its parts are queued, each of what one pass may take under one adapter.
    """

    settings: ServeSettings
    _images: ImageRowMaker
    _row_maker: RowMaker
    _admission: AdmissionController
    _answer_memory: TenantMemory
    _resolving: BoundedExecutor
    _tokenizing: BoundedExecutor

    async def classify(
        self,
        adapter: AdapterChoice,
        inputs: Inputs,
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Charge | None = None,
        counted: ExitStack | None = None,
    ) -> ClassifyResult:
        """Put each input, a text, a sentence pair or an image, through the adapter's head.

        Each result is of the adapter's task.

        Priority and time limits are those of `generate`. `charge` is told the tokens of all rows that entered a batch,
        also where the call fails or is given up. With `counted`, an answered call stays in flight until that is closed:
        so a tenant has no more answers that are not written yet than it may have calls.

        Raises:
            UnsupportedTask: The adapter has no head, or takes other inputs.
            InvalidRequest: There is no input, an input has no tokens, inputs times labels or tokens to tag are too
                many, or an adapter that finds spans gets a sentence pair or has no offsets from the tokenizer.
            InvalidImage, ImageTooLarge: An image cannot be decoded, or is too large; `param` names it.
            TenantOverloaded, Overloaded, DeadlineExceeded, EngineUnavailable, StoreError: As in `generate`.
        """
        resolve = partial(self._row_maker.classifier, adapter, len(inputs))
        (result,) = await self._classify(resolve, inputs, principal, priority, timeout_s, received_at, charge, counted)
        return result

    async def classify_each(
        self,
        adapters: Sequence[str],
        inputs: Inputs,
        principal: Principal,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Charge | None = None,
        counted: ExitStack | None = None,
    ) -> list[ClassifyResult]:
        """Classify each input with each of several adapters: one result an adapter, in their order.

        Each input is tokenized once. The call is counted once by admission, as one with one adapter is: it has no more
        rows than that may have. `charge` is as in `classify`, and so is `counted`: the tokens of a row count for each
        adapter.

        Raises:
            UnsupportedTask, InvalidRequest, StoreError: As in `classify`; `param` names the adapter.
            TenantOverloaded, Overloaded, DeadlineExceeded, EngineUnavailable: As in `classify`.
        """
        if not adapters:
            raise InvalidRequest("adapters is empty; name at least one", param="adapters")
        resolve = partial(self._row_maker.classifiers, adapters, len(inputs))
        return await self._classify(resolve, inputs, principal, priority, timeout_s, received_at, charge, counted)

    async def embed(
        self,
        adapter: AdapterChoice | None,
        inputs: EmbeddingInputs,
        principal: Principal,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        priority: Priority = "normal",
        timeout_s: float | None = None,
        received_at: float | None = None,
        charge: Charge | None = None,
        counted: ExitStack | None = None,
    ) -> EmbedResult:
        """Make one vector of each input: the pooled last hidden states of the base with an adapter of any task.

        Args:
            adapter: None is the base model alone.
            inputs: Texts and images, or all lists of tokens, which are taken as they are. None is cut, but texts for
                an adapter of retrieval, as in its training.
            principal: Who asks.
            pooling: None is that of a classifier's adapter, and else the base's own.
            normalize: Scale each vector to length 1.
            priority: As in `generate`, like the time limits.
            timeout_s: Likewise.
            received_at: Likewise.
            charge: As in `classify`, like `counted`.
            counted: Likewise.

        Raises:
            PromptTooLong: An input is longer than the base's context; `param` names it.
            InvalidRequest: There is no input, an input has no tokens, a token is outside the vocabulary, or the
                inputs are too many.
            UnsupportedTask: The base takes no images, or no texts.
            AdapterOverflow, BaseOverflow: A vector is infinite or not a number.
            TenantOverloaded, Overloaded, DeadlineExceeded, EngineUnavailable, StoreError: As in `generate`.
        """
        call = self._row_call("emb", inputs, principal, priority)
        call.embedding = EmbeddingSpec(pooling, normalize)
        resolve = partial(self._row_maker.embedder, adapter, len(inputs), pooling)
        images = self._images.check(inputs)
        self._row_maker.check_embedded(inputs)
        texts = [value for value in inputs if not isinstance(value, ImageInput)]

        async def groups(held: Reservation) -> list[RowGroup]:
            if not images:
                is_long = sum(map(len, texts)) > LONG_CHARACTERS
                return await self._resolved_and_tokenized(
                    call.tenant, resolve, partial(self._row_maker.embedding, inputs=texts), is_long
                )
            resolved = await self._resolving.run(resolve)
            return [RowGroup(resolved, await self._mixed_rows(resolved, inputs, images, texts, held))]

        (results,), (group,), times = await self._run_rows(call, groups, timeout_s, received_at, charge, counted)
        vectors = cast(list[NDArray[np.float32]], results)
        prompt_tokens = [len(row) for row in group.rows]
        if group.adapter is None:
            return EmbedResult(None, None, vectors, prompt_tokens, **vars(times))
        named = group.adapter.adapter, group.adapter.version or None
        return EmbedResult(*named, vectors, prompt_tokens, **vars(times))

    def _row_call(
        self, kind: str, inputs: Sequence[object], principal: Principal, priority: Priority
    ) -> ClassificationRequest:
        """What admission counts for a call whose parts are queued; raises InvalidRequest for one without inputs."""
        if not inputs:
            raise InvalidRequest("inputs is empty; send at least one", param="inputs")
        return ClassificationRequest(
            principal=principal,
            id=f"{kind}-{random_hex(8)}",
            priority=PRIORITIES.index(priority),
            reader=EventReader(self._mailbox_here()),
        )

    async def _classify(
        self,
        resolve: Callable[[], list[ResolvedAdapter]],
        inputs: Inputs,
        principal: Principal,
        priority: Priority,
        timeout_s: float | None,
        received_at: float | None,
        charge: Charge | None,
        counted: ExitStack | None,
    ) -> list[ClassifyResult]:
        """Classify texts, or images, with each adapter that `resolve` gives."""
        call = self._row_call("cls", inputs, principal, priority)
        images = self._images.check(inputs)
        texts = [value for value in inputs if not isinstance(value, ImageInput)]
        if images and texts:
            raise InvalidRequest(
                f"inputs has {len(images)} images and {len(texts)} texts; send one kind in one request", param="inputs"
            )

        async def groups(held: Reservation) -> list[RowGroup]:
            if not images:
                are_long = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
                tokenize = partial(self._row_maker.classification, inputs=texts)
                return await self._resolved_and_tokenized(call.tenant, resolve, tokenize, are_long > LONG_CHARACTERS)
            adapters = await self._resolving.run(resolve)
            rows = await self._images.rows(images, self._row_maker.image_specs(adapters), held)
            return [RowGroup(adapter, own) for adapter, own in zip(adapters, rows, strict=True)]

        results, found, times = await self._run_rows(call, groups, timeout_s, received_at, charge, counted)
        return [_scores(group, own, times) for group, own in zip(found, results, strict=True)]

    async def _resolved_and_tokenized(
        self, tenant: str, resolve: Callable[[], R], tokenize: Callable[[R], list[RowGroup]], is_long: bool
    ) -> list[RowGroup]:
        if is_long:
            resolved = await self._resolving.run(resolve)
            return await self._tokenizing.run_in_turn(tenant, tokenize, resolved)
        # A short call changes threads only once.
        return await self._resolving.run(lambda: tokenize(resolve()))

    async def _mixed_rows(
        self,
        adapter: ResolvedAdapter | None,
        inputs: EmbeddingInputs,
        images: Sequence[ImageInput],
        texts: TextsOrTokens,
        held: Reservation,
    ) -> list[ModelInputs]:
        """The rows of an embedding of images and texts, in the order of the inputs."""
        (image_rows,) = await self._images.rows(images, [self._row_maker.embedding_spec(adapter)], held)
        text_rows: list[ModelInputs] = []
        if texts:
            numbers = [number for number, value in enumerate(inputs) if not isinstance(value, ImageInput)]
            embedding = self._row_maker.embedding
            (group,) = await self._tokenizing.run_in_turn(held.tenant, embedding, adapter, texts, numbers)
            text_rows = group.rows
        of_images, of_texts = iter(image_rows), iter(text_rows)
        return [next(of_images) if isinstance(value, ImageInput) else next(of_texts) for value in inputs]

    async def _run_rows(
        self,
        call: ClassificationRequest,
        make_groups: Callable[[Reservation], Awaitable[list[RowGroup]]],
        timeout_s: float | None,
        received_at: float | None,
        charge: Charge | None,
        counted: ExitStack | None,
    ) -> tuple[list[list[RowResult]], list[RowGroup], RowTimes]:
        """Run the rows of a call: the results of each group, the groups, and what the first part waited for."""
        runner = self._runner("classify")
        limits = self._time_limits(received_at, timeout_s)
        reader = cast(EventReader, call.reader)
        parts: list[ClassificationRequest] = []
        with self._admitted(call), self._images.holding(call.tenant) as held, ExitStack() as own:
            until_written = own if counted is None else counted
            try:
                async with self._time_to_start(limits):
                    groups = await make_groups(held)
                    self._reserve_answer(call, groups, until_written)
                    async with self._long_work(call.tenant, sum(len(group.rows) for group in groups)):
                        # Before the parts are made: what a refusal refers to stays until a collection.
                        self._check_parts(call, runner.scheduler.waiting(call.tenant), len(groups))
                        parts = split_call(call, groups, self.settings.classify_max_batch, self.settings.batch_tokens)
                        runner.scheduler.submit(parts)
                    await any_started(parts, reader)
                async with _in_time(limits.deadline):
                    await _finished(parts, reader)
                    results = await self._results(call.tenant, groups, parts)
            except BaseException:
                # To its end: a client that leaves may cancel this call twice.
                await asyncio.shield(asyncio.ensure_future(self._give_up(runner, call.tenant, parts)))
                raise
            finally:
                if charge is not None:
                    # Of a part that is given up while it runs, all rows: some of them are computed.
                    charge(sum(part.prompt_tokens for part in parts if part.started_at is not None))
            until_written.callback(self._admission.release, call, served=True)
        began, load_s = min(
            ((part.load_began, part.load_s) for part in parts if part.load_began is not None), default=(None, 0.0)
        )
        times = RowTimes(waited_s=min(part.waited_s for part in parts), load_began=began, load_s=load_s)
        return results, groups, times

    def _reserve_answer(
        self, call: ClassificationRequest, groups: Sequence[RowGroup], until_written: ExitStack
    ) -> None:
        """Count what the answer of a call takes until the stack is closed.

        Raises:
            TenantOverloaded: The answers to the tenant's calls would take too much memory.
        """
        nbytes = self._row_maker.answer_bytes(groups, call.embedding is not None)
        if nbytes < _SMALL_ANSWER:
            return
        held = Reservation(call.tenant)
        # One call alone is never refused for it.
        if not self._answer_memory.grow(held, nbytes, alone=True):
            raise self._admission.refusal(
                call.tenant,
                f"the answers to the requests of tenant {call.tenant!r} under way take too much memory together",
                _field_of(call, len(groups)),
            )
        until_written.callback(self._answer_memory.release, held)

    async def _results(
        self, tenant: str, groups: Sequence[RowGroup], parts: Sequence[ClassificationRequest]
    ) -> list[list[RowResult]]:
        """The results of each group, in the order of its inputs, from those of the parts of a call."""
        found: dict[int, RowResult | None] = {}
        for part in parts:
            found.update(zip(part.positions, part.results, strict=True))
        join = partial(_joined, groups, [result for _, result in sorted(found.items()) if result is not None])
        if any(row.window is not None for group in groups for row in group.rows):
            # The spans of long texts: 32,768 tokens kept the event loop for 0.05 s of processor time.
            return await self._tokenizing.run_in_turn(tenant, join)
        return join()

    def _check_parts(self, call: ClassificationRequest, waiting: int, adapters: int) -> None:
        """Refuse a call beside too many waiting parts of its tenant; raises TenantOverloaded."""
        if waiting < _MAX_PARTS:
            return
        field = _field_of(call, adapters)
        raise self._admission.refusal(
            call.tenant,
            f"{waiting} parts of calls of tenant {call.tenant!r} wait, and no call is taken beside {_MAX_PARTS}: a "
            f"part is what one pass computes with one adapter; send fewer {field}",
            field,
        )

    async def _give_up(self, runner: TaskRunner[Any], tenant: str, parts: Sequence[ClassificationRequest]) -> None:
        async with self._long_work(tenant, len(parts)):
            runner.cancel_all(parts, FinishReason.CANCELLED)

    @asynccontextmanager
    async def _long_work(self, tenant: str, things: int) -> AsyncIterator[None]:
        """Do something with each of some rows or parts in the block; with many of them, when it is the tenant's turn.

        256 calls of 128 parts each, which were given up at once, kept the event loop for two seconds.
        """
        if things <= _FEW:
            yield
            return
        async with self._mailbox_here().turns.turn(tenant):
            yield

    @abstractmethod
    def _runner(self, task: Task) -> TaskRunner[Any]: ...

    @abstractmethod
    def _admitted(self, request: Request) -> AbstractContextManager[None]: ...

    @abstractmethod
    def _time_limits(self, received_at: float | None, timeout_s: float | None) -> TimeLimits: ...

    @abstractmethod
    def _time_to_start(self, limits: TimeLimits) -> AbstractAsyncContextManager[None]: ...

    @abstractmethod
    def _mailbox_here(self) -> Mailbox: ...


def _field_of(call: ClassificationRequest, adapters: int) -> str:
    """The field that makes a call large."""
    return "adapters" if adapters > 1 else "inputs" if call.embedding is None else "input"


def _joined(groups: Sequence[RowGroup], results: Sequence[RowResult]) -> list[list[RowResult]]:
    following = iter(results)
    return [
        list(joined_windows(list(islice(following, len(group.rows))), group.rows, _labels(group))) for group in groups
    ]


def _labels(group: RowGroup) -> Sequence[str]:
    return () if group.adapter is None else group.adapter.labels or ()


def _scores(group: RowGroup, results: list[RowResult], times: RowTimes) -> ClassifyResult:
    assert group.adapter is not None
    return ClassifyResult(
        adapter=group.adapter.adapter,
        version=group.adapter.version or None,
        results=cast(list[HeadResult], results),
        prompt_tokens=sum(map(len, group.rows)),
        **vars(times),
    )


async def any_started(parts: Sequence[Request], reader: EventReader) -> None:
    """Wait until a part of a call runs, or all were cancelled by their readers; raises why one does not run."""
    while not any(part.started_at is not None for part in parts):
        for part in parts:
            if part.error is not None:
                raise part.error
        if all(part.is_finished for part in parts):
            return
        await reader.wait()


async def _finished(parts: Sequence[Request], reader: EventReader) -> None:
    """Wait until every part is served; raises the first error."""
    while True:
        # Of any part: one that has failed ends the call, and what the others would still compute.
        for part in parts:
            if part.error is not None:
                raise part.error
        if all(part.is_finished for part in parts):
            return
        await reader.wait()


@asynccontextmanager
async def _in_time(deadline: float | None) -> AsyncIterator[None]:
    """End what the block waits for at the deadline; raises DeadlineExceeded."""
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope:
            yield
    except TimeoutError:
        # A disk's own time limit, in the load of a later part, is another matter.
        if not scope.expired():
            raise
        raise deadline_exceeded() from None
    finally:
        # It refers to the task, and so to the error that ends the task. As a cycle, that would keep all rows.
        del scope
