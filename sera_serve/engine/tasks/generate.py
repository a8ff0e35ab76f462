"""Generation: the step loop over a decoder, its paged cache, and what each step hands on."""

from __future__ import annotations

import time

import torch

from sera_serve.base import FrozenBase
from sera_serve.engine.loop.attention import KeyValuePool
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE, PagePool
from sera_serve.engine.loop.plan import StepPlan, StepPlanner
from sera_serve.engine.loop.runner import StepRunner
from sera_serve.engine.overflow import OverflowReporter, expose_overflows
from sera_serve.engine.request import FinishReason, GenerationRequest
from sera_serve.engine.scheduler import Scheduler
from sera_serve.engine.tasks.runner import RunnerLoad, TaskRunner, logger
from sera_serve.errors import EngineUnavailable
from sera_serve.layers import AdapterContext


class GenerationRunner(TaskRunner[GenerationRequest]):
    """Generates on a decoder by continuous batching: requests enter and leave the batch between two steps."""

    task = "generate"

    def __init__(
        self,
        base: FrozenBase,
        context: AdapterContext,
        scheduler: Scheduler[GenerationRequest],
        *,
        kv_cache_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        cpu_threads: int,
    ) -> None:
        """Allocate the cache, without starting.

        Args:
            base: A decoder with serving layers attached, for this object's use alone.
            context: The serving layers' context.
            scheduler: This runner's own from now on.
            kv_cache_tokens: Size of the paged cache.
            max_batch_tokens: The most tokens of one forward pass; longer prompts are prefilled in chunks.
            max_sequences: The most requests of one forward pass.
            cpu_threads: Threads of a forward pass on a CPU.

        Raises:
            InvalidConfiguration: The base's architecture cannot be served.
        """
        super().__init__(scheduler, cpu_threads)
        pages = max(1, -(-kv_cache_tokens // PAGE_SIZE))
        paged = PagedModel(base.model)
        pool = KeyValuePool(paged.shapes, pages, paged.dtype, paged.device)
        self.planner = StepPlanner(
            PagePool(pages),
            scheduler,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            rotary_side=base.rotary.side if base.rotary_context is not None else None,
        )
        max_pages = min(pages, -(-base.max_length // PAGE_SIZE))
        self.runner = StepRunner(paged, context, pool, self.planner.num_rows, max_pages, base.rotary_context)
        self.steps = 0
        self._overflows = OverflowReporter()
        # A base that cannot be served is refused now, not in its first step.
        with torch.inference_mode():
            expose_overflows(base.model, self.runner.probe)
            self.runner.probe()

    def load(self) -> RunnerLoad:
        """What there is to do, and the pages in use."""
        pages, scheduler = self.planner.pages, self.scheduler
        in_use = pages.count - pages.available()
        return RunnerLoad(scheduler.waiting(), scheduler.running(), scheduler.preemptions, (in_use, pages.count))

    def in_batch(self) -> list[GenerationRequest]:
        """The requests in the batch."""
        return list(self.planner.running)

    def remove(self, request: GenerationRequest) -> None:
        """Take a running request out of the batch, and give its row and pages back."""
        self.planner.remove(request)

    def step(self) -> bool:
        """Plan a step, run it, hand on what it gave."""
        plan = self.planner.plan()
        self.scheduler.hint_new()
        if plan is None:
            return False
        self.steps += 1
        try:
            outcome = self.runner.run(plan)
        except Exception as error:  # noqa: BLE001 - it is told to every request of the step
            self._fail(plan, error)
            return True
        if outcome.overflowed:
            # Before their pages are published: these hold keys and values that are not finite.
            for request in outcome.overflowed:
                self.end(request, FinishReason.FAILED, self._overflows.error(request))
            plan.remove(outcome.overflowed)
        for request in plan.decodes:
            self.planner.advance(request, 1)
        for request, count in plan.chunks:
            self.planner.advance(request, count)
            if request.computed < len(request.tokens):
                self.runner.tables.advance(request)
        self.scheduler.charge(outcome.requests)
        for request, token in zip(outcome.requests, outcome.tokens, strict=True):
            self._hand_on(request, token)
        return True

    def _hand_on(self, request: GenerationRequest, token: int) -> None:
        request.tokens.append(token)
        if request.first_token_s is None:
            request.first_token_s = time.monotonic() - request.arrived
        if token in request.end_tokens:
            self.end(request, FinishReason.STOP)
        elif len(request.tokens) == request.limit:
            self.end(request, FinishReason.LENGTH)
        else:
            self.runner.tables.advance(request)
            if not request.notify():
                self.end(request, FinishReason.CANCELLED)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End the requests of a failed step, and nothing else; raise where the model itself has failed."""
        logger.error("a step of %d requests failed", len(plan.requests()), exc_info=error)
        # Before the leases end: the probe waits for the device, which may still use their slots.
        self.runner.probe()
        for request in plan.requests():
            self.end(request, FinishReason.FAILED, EngineUnavailable(str(error)))
