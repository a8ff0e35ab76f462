"""Runs a planned step: packs its tokens, runs the model, samples. Tables by row spare most work for each request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch
from sera_serve.engine.loop.attention import Part, StepContext, decode_parts
from sera_serve.engine.loop.captures import NotCaptured
from sera_serve.engine.loop.choice import ChosenTokens, TokenChooser, rows_of, take_prompt_logprobs
from sera_serve.engine.loop.hugging_face import ServedDecoder
from sera_serve.engine.loop.pages import PAGE_SIZE, SCRATCH
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.loop.row_tables import RowTables, to_device
from sera_serve.engine.loop.static_step import StaticBatch, StaticLaunch, StaticSteps
from sera_serve.engine.memory import free_memory, step_failed
from sera_serve.engine.request import GenerationRequest, classes_of
from sera_serve.engine.sampling import NO_TOKEN

logger = logging.getLogger("sera_serve.engine")
# Keys that the tokens of prompts read in a static step: each token reads its own, 4 KiB a layer in Llama-3-8B.
_MOST_KEYS = 1 << 18


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        tokens: The new token of each request that has one.
        overflowed: Those whose logits are infinite or not a number. They get no token, and their pages are not sound.
        failures: Those that get no token for a reason of their own, or of their part of the step, with what their
            clients are told.
        postponed: Those whose last token has to run again, because they get the token after it in a later step.
    """

    tokens: dict[GenerationRequest, int] = field(default_factory=dict)
    overflowed: set[GenerationRequest] = field(default_factory=set)
    failures: dict[GenerationRequest, Exception] = field(default_factory=dict)
    postponed: set[GenerationRequest] = field(default_factory=set)


@dataclass(frozen=True)
class Launch:
    """A step that the device runs, or has run.

    Attributes:
        wait: Waits for it.
        on_device: Whether it needs nothing of the host any more, so that the next step can be launched too.
    """

    wait: Callable[[], StepOutcome]
    on_device: bool


class PackedStep:
    """The tokens of a step, sequence after sequence: decodes first, then chunks of prompts.

    Attributes:
        ids, positions, places: int64 arrays, to be joined: each token, its place in its sequence, and in the pool.
        slots: int32 arrays, likewise: each token's adapter.
        sides: bool arrays, likewise: whether a token's sequence is beyond the rotary threshold.
        parts: What attention does, in the order of the tokens.
        keep: Tokens whose logits are wanted.
        ends: All requests, in the order of the logits of each one's last token of the step. The logits after a chunk
            that does not end its prompt are looked at too: they are finite only if its keys and values are.
        unfinished: Those whose prompt goes on in a later step; they get no token.
        prompts: Requests that want log-probabilities of their prompt, with the first of their logits and how many.
    """

    def __init__(self, tables: RowTables, compiled: bool) -> None:
        self._tables, self._compiled = tables, compiled
        self.ids: list[NDArray[np.int64]] = []
        self.positions: list[NDArray[np.int64]] = []
        self.places: list[NDArray[np.int64]] = []
        self.slots: list[NDArray[np.int32]] = []
        self.sides: list[NDArray[np.bool_]] = []
        self.parts: list[Part] = []
        self.keep: list[int] = []
        self.ends: list[GenerationRequest] = []
        self.unfinished: set[GenerationRequest] = set()
        self.prompts: list[tuple[GenerationRequest, int, int]] = []
        self._total = 0

    def add_decodes(self, requests: list[GenerationRequest]) -> None:
        """Add one token of each request, by ascending length; before any chunk."""
        if not requests:
            return
        tables = self._tables
        rows = np.array([request.row for request in requests], np.int64)
        order = np.argsort(tables.computed[rows], kind="stable")
        rows = rows[order]
        at = tables.computed[rows]
        # Only the pages of the longest: a table is as wide as the context is long.
        pages = tables.pages[rows, : int(at[-1]) // PAGE_SIZE + 1]
        page = np.take_along_axis(pages, (at // PAGE_SIZE)[:, None], 1)[:, 0]
        self._add(tables.next_token[rows], at, tables.slots_at(rows, at), page, tables.is_long[rows])
        self.parts += decode_parts(at + 1, pages, self._compiled)
        self.ends += [requests[place] for place in order.tolist()]
        self.keep += range(len(requests))

    def add_chunk(self, request: GenerationRequest, count: int) -> None:
        """Add the next tokens of a request; chunks of one length that begin a prompt come one after the other."""
        start, end, first = request.computed, request.computed + count, self._total
        at, pages = np.arange(start, end), self._tables.pages[request.row]
        slots = self._tables.slots_at(request.row, at)
        side = np.full(count, request.rotary_side > 0)
        self._add(np.array(request.tokens[start:end], np.int64), at, slots, pages[at // PAGE_SIZE], side)
        last = self.parts[-1] if self.parts else None
        if start:
            self.parts.append(Part(count, np.array([end]), pages[None, : -(-end // PAGE_SIZE)]))
        elif last is not None and last.table is None and last.new == count:
            last.lengths = np.append(last.lengths, count)
        else:
            self.parts.append(Part(count, np.array([count])))
        if request.wants_prompt_logprobs:
            self.prompts.append((request, len(self.keep), count))
            self.keep += range(first, first + count)
        else:
            self.keep.append(first + count - 1)
        self.ends.append(request)
        if end < len(request.tokens):
            self.unfinished.add(request)

    def add_padding(self) -> None:
        """Add one token of no request: it uses no adapter and writes to the scratch page."""
        zero = np.zeros(1, np.int64)
        self._add(zero, zero, np.full(1, NO_ADAPTER, np.int32), np.full(1, SCRATCH), np.zeros(1, bool))
        self.parts.append(Part(1, np.array([1])))

    def _add(
        self,
        ids: NDArray[np.int64],
        at: NDArray[np.int64],
        slots: NDArray[np.int32],
        pages: NDArray[np.int64],
        sides: NDArray[np.bool_],
    ) -> None:
        self.ids.append(ids)
        self.positions.append(at)
        self.slots.append(slots)
        self.places.append(pages * PAGE_SIZE + at % PAGE_SIZE)
        self.sides.append(sides)
        self._total += len(ids)


class StepRunner:
    """Runs steps on one decoder; the loop's thread alone uses it."""

    def __init__(self, decoder: ServedDecoder, rows: int, max_pages: int) -> None:
        """Set up for at most so many requests, of at most so many pages each."""
        self.decoder = decoder
        self.tables = RowTables(rows, max_pages)
        self.static: StaticSteps | None = None
        """Runs decodes and short prompts where it is set: on static buffers, as a graph does."""
        self.chooser = TokenChooser(self.tables, decoder.model.vocabulary)
        self._compiled = decoder.pool.has_paged_decode

    def launch(self, plan: StepPlan, ahead: int = 0) -> Launch:
        """Start a step. Nothing of the requests is changed but their log-probabilities.

        Without static steps, the step has ended when this returns.

        Args:
            plan: The step.
            ahead: 1 if the decodes' tokens are those of the step before, which has not been waited for; else 0. Only
                for plans of which `runs_on_device` is true.

        Raises:
            NotCaptured: It would have been launched ahead, and cannot be.
        """
        self._enter(plan)
        self.chooser.begin([*plan.decodes, *(request for request, count in plan.chunks if _ends(request, count))])
        while True:
            batch = self._static_batch(plan)
            try:
                return self._launch(plan, batch, ahead)
            except NotCaptured:
                # From now on the batch is another one. A launch ahead is left to the turn of its step.
                if ahead:
                    raise

    def _launch(self, plan: StepPlan, batch: StaticBatch, ahead: int) -> Launch:
        """Start a step, of which `batch` is static."""
        requests = batch.requests
        static = set(requests)
        decodes = [request for request in plan.decodes if request not in static]
        chunks = [chunk for chunk in plan.chunks if chunk[0] not in static]
        chosen = [request for request in requests if request.needs_logits]
        if ahead and (decodes or chunks or chosen):
            # The host does not know their tokens yet.
            raise NotCaptured
        if self.static is None or not static:
            rest = self._run_packed(decodes, chunks)
            return Launch(lambda: rest, on_device=False)
        # First: the device runs it while the host is busy with the rest.
        launched = self.static.launch(batch, ahead)
        parts: list[StepOutcome] = []
        if chosen:
            parts.append(self._run_apart(chosen, lambda: self._choose(launched, requests, chosen)))
        if chunks:
            # The decodes of a step are static all together, or none is.
            packed = [request for request, _ in chunks]
            parts.append(self._run_apart(packed, lambda: self._run_packed([], chunks)))

        def wait() -> StepOutcome:
            return _joined([_static_outcome(requests, launched.wait(), set(chosen)), *parts])

        return Launch(wait, on_device=not parts)

    def _choose(
        self, launched: StaticLaunch, requests: list[GenerationRequest], chosen: list[GenerationRequest]
    ) -> StepOutcome:
        """Choose the tokens of some requests of a static step from its logits; waits for the step."""
        wanted = set(chosen)
        places = [place for place, request in enumerate(requests) if request in wanted]
        logits = rows_of(launched.logits, places)
        return _outcome(chosen, self.chooser.choose(logits, chosen, set()), set(), set())

    def _run_apart(self, requests: list[GenerationRequest], work: Callable[[], StepOutcome]) -> StepOutcome:
        """Run a part of a step. Its failure is that of its own requests, unless the device itself has failed."""
        try:
            return work()
        except Exception as error:
            logger.error("the part of a step with %d requests failed", len(requests), exc_info=error)
            free_memory(error)
            self.probe()
            return StepOutcome(failures=dict.fromkeys(requests, step_failed(error)))

    def runs_static(self, plan: StepPlan) -> bool:
        """Whether all of a step would run on static buffers."""
        return len(self._static_batch(plan).requests) == len(plan.decodes) + len(plan.chunks)

    def runs_on_device(self, plan: StepPlan) -> bool:
        """Whether the step would need nothing of the host once it is launched."""
        return self.runs_static(plan) and not any(request.needs_logits for request in plan.requests())

    def _static_batch(self, plan: StepPlan) -> StaticBatch:
        """What static steps run of a plan: the decodes, and all prompts or none.

        A prompt costs less where others are computed packed anyway, and where it is long: packed tokens share the keys
        that they read.
        """
        if self.static is None:
            return StaticBatch()
        batch = self._wanted_batch(plan, self.static)
        if not batch.requests or self.static.can_run(batch):
            return batch
        decodes_alone = StaticBatch(batch.decodes)
        is_other = batch.prompts and batch.decodes and self.static.can_run(decodes_alone)
        return decodes_alone if is_other else StaticBatch()

    def _wanted_batch(self, plan: StepPlan, static: StaticSteps) -> StaticBatch:
        prompts = [request for request, count in plan.chunks if _ends_plainly(request, count)]
        if not prompts or len(prompts) < len(plan.chunks):
            return StaticBatch(plan.decodes)
        keys = sum(count * len(request.tokens) for request, count in plan.chunks)
        batch = StaticBatch(plan.decodes, prompts)
        fits = batch.tokens <= static.most_tokens and keys <= _MOST_KEYS
        return batch if fits else StaticBatch(plan.decodes)

    def _run_packed(self, decodes: list[GenerationRequest], chunks: list[tuple[GenerationRequest, int]]) -> StepOutcome:
        packed = PackedStep(self.tables, self._compiled)
        packed.add_decodes(decodes)
        # Prompts of one length that begin here are attended in one call.
        for request, count in sorted(chunks, key=lambda chunk: (chunk[0].computed > 0, chunk[1])):
            packed.add_chunk(request, count)
        logits = self._forward(packed, packed.keep if chunks else None)
        overflowed: set[GenerationRequest] = set()
        if packed.prompts:
            logits = take_prompt_logprobs(logits, packed.prompts, overflowed)
        chosen = self.chooser.choose(logits, packed.ends, packed.unfinished)
        return _outcome(packed.ends, chosen, packed.unfinished, overflowed)

    def probe(self) -> Tensor:
        """Run one token of the base model on the scratch page, and wait for the device.

        Returns:
            (1, vocabulary), the logits; raises what the forward pass raises.
        """
        packed = PackedStep(self.tables, self._compiled)
        packed.add_padding()
        logits = self._forward(packed, None)
        # What a page holds must be finite: see `KeyValuePool.clear`.
        self.decoder.pool.clear([SCRATCH])
        logits.argmax(-1).tolist()
        return logits

    def _enter(self, plan: StepPlan) -> None:
        for request in plan.entered:
            self.tables.enter(request)
        for request in plan.grown:
            self.tables.grow(request)
        pool = self.decoder.pool
        if not pool.backend.reads_padding:
            return
        # Of a request's pages only the last is read beyond the request's end.
        partial = [request.pages[-1] for request in plan.grown]
        partial += [request.pages[-1] for request in plan.entered if len(request.tokens) % PAGE_SIZE]
        if partial:
            pool.clear(partial)

    def _forward(self, packed: PackedStep, keep: list[int] | None) -> Tensor:
        """Logits (kept tokens, vocabulary), as the model gives them; with `keep` None, of all tokens."""
        decoder, device = self.decoder, self.decoder.model.device
        base_only = all((slots == NO_ADAPTER).all() for slots in packed.slots)
        # Not waited for: the device may be busy with a static step, beside which the host launches this one.
        ids, positions, slots, places = (
            to_device(np.concatenate(arrays), device)
            for arrays in (packed.ids, packed.positions, packed.slots, packed.places)
        )
        # An empty list would make an index of another dtype.
        kept = 0 if keep is None else to_device(np.array(keep, np.int64), device)
        adapters = None if base_only else AdapterBatch(slots, classes_of(packed.ends))
        long_tokens = None if decoder.rotary is None else to_device(np.concatenate(packed.sides), device)
        step = StepContext(decoder.pool, places, packed.parts)
        return decoder.logits(ids, positions, step, kept, adapters, long_tokens)


def _outcome(
    ends: list[GenerationRequest],
    chosen: ChosenTokens,
    unfinished: set[GenerationRequest],
    overflowed: set[GenerationRequest],
) -> StepOutcome:
    """Sort requests into those with a token, those without a sound one, and those that get one in a later step."""
    tokens, failures, postponed = chosen.tokens, chosen.failures, chosen.postponed
    if NO_TOKEN in tokens:
        overflowed.update(request for request, token in zip(ends, tokens, strict=True) if token == NO_TOKEN)
        overflowed.difference_update(failures)
    without = overflowed | unfinished | failures.keys() | postponed
    given = {request: token for request, token in zip(ends, tokens, strict=True) if request not in without}
    return StepOutcome(given, overflowed, failures, postponed)


def _static_outcome(
    requests: list[GenerationRequest], tokens: list[int], chosen: set[GenerationRequest]
) -> StepOutcome:
    """What a static step gave its requests; the tokens of `chosen` are chosen elsewhere."""
    own = {request: token for request, token in zip(requests, tokens, strict=True) if request not in chosen}
    return _outcome(list(own), ChosenTokens(list(own.values())), set(), set())


def _joined(parts: list[StepOutcome]) -> StepOutcome:
    whole = StepOutcome()
    for part in parts:
        whole.tokens.update(part.tokens)
        whole.overflowed.update(part.overflowed)
        whole.failures.update(part.failures)
        whole.postponed.update(part.postponed)
    return whole


def _ends_plainly(request: GenerationRequest, count: int) -> bool:
    """Whether so many tokens end a request's prompt, and of them only the logits after the last one are wanted.

    Of a sequence beyond the base's rotary threshold that is not so: its first tokens have the frequencies of the last.
    """
    return _ends(request, count) and not (request.wants_prompt_logprobs or request.rotary_side)


def _ends(request: GenerationRequest, count: int) -> bool:
    """Whether so many tokens are the last of a request's prompt."""
    return request.computed + count == len(request.tokens)
