"""Generation: the step loop over a decoder, its paged cache, and what each step hands on."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine.loop.attention import KeyValuePool
from sera_serve.engine.loop.attention_backend import choose_backend
from sera_serve.engine.loop.captures import NotCaptured
from sera_serve.engine.loop.fused_attention import fuse_attention
from sera_serve.engine.loop.fused_layer import fuse_layers
from sera_serve.engine.loop.graphs import NotCapturable, StepGraphs
from sera_serve.engine.loop.hugging_face import PagedModel, ServedDecoder
from sera_serve.engine.loop.masks import constraint_failed, ends_too_early
from sera_serve.engine.loop.pages import PAGE_SIZE, PagePool
from sera_serve.engine.loop.plan import StepPlan, StepPlanner
from sera_serve.engine.loop.runner import Launch, StepRunner
from sera_serve.engine.memory import DecoderSizes, DeviceMemory, free_memory, memory_of, step_failed
from sera_serve.engine.overflow import OverflowReporter, expose_overflows
from sera_serve.engine.request import FinishReason, GenerationRequest
from sera_serve.engine.scheduler import Scheduler
from sera_serve.engine.tasks.runner import RunnerLoad, TaskRunner, logger
from sera_serve.engine.tenant_memory import too_many_logprobs
from sera_serve.layers import AdapterContext


@dataclass(eq=False)
class _LaunchedStep:
    """A step that the device runs, or has run.

    Attributes:
        plan: What it runs.
        launch: How it was launched.
        leaving: Its requests that end once it has run: no lease, row or page that it uses is given back before.
    """

    plan: StepPlan
    launch: Launch
    leaving: dict[GenerationRequest, tuple[FinishReason, Exception | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.requests = frozenset(self.plan.requests())


class GenerationRunner(TaskRunner[GenerationRequest]):
    """Generates on a decoder by continuous batching: requests enter and leave the batch between two steps."""

    task = "generate"

    def __init__(
        self,
        base: FrozenBase,
        context: AdapterContext,
        scheduler: Scheduler[GenerationRequest],
        memory: DeviceMemory,
        settings: ServeSettings,
    ) -> None:
        """Allocate the cache, without starting.

        Args:
            base: A decoder with serving layers attached, for this object's use alone.
            context: The serving layers' context.
            scheduler: This runner's own from now on.
            memory: Says how large the paged cache may be.
            settings: The server's: what bounds a forward pass and computes attention, and whether there are graphs.

        Raises:
            InvalidConfiguration: The base's architecture cannot be served, or there is no such attention.
        """
        super().__init__(scheduler, base.device, settings.cpu_threads)
        paged = PagedModel(base.model)
        backend = choose_backend(settings.attention, paged.device)
        widest = max((max(shape) for shape in base.module_shapes().values()), default=base.hidden_size)
        by_layer = paged.layer_bytes
        sizes = DecoderSizes(sum(by_layer), max(by_layer), widest, paged.vocabulary, context=base.max_length)
        self.cache_tokens = memory.cache_tokens(sizes)
        pages = max(1, -(-self.cache_tokens // PAGE_SIZE))
        with memory_of("the KV cache", "kv_cache_tokens"):
            pool = KeyValuePool(paged.shapes, pages, paged.dtype, paged.device, backend)
        self._cache_bytes = pool.nbytes
        self.planner = StepPlanner(
            PagePool(pages),
            scheduler,
            max_batch_tokens=settings.batch_tokens,
            max_sequences=settings.max_sequences,
            rotary_side=base.rotary.side if base.rotary_context is not None else None,
        )
        max_pages = min(pages, -(-base.max_length // PAGE_SIZE))
        decoder = ServedDecoder(paged, context, pool, base.rotary_context)
        self.runner = StepRunner(decoder, self.planner.num_rows, max_pages)
        self.steps = 0
        self._next: _LaunchedStep | None = None
        self._overflows = OverflowReporter()
        # What was allocated so far was cleared on another stream.
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        with torch.inference_mode(), self.on_stream():
            if backend.has_paged_decode:
                # Imported here, because a CPU needs no Triton.
                from sera_kernels.norm import add_norm
                from sera_kernels.rotary import rotate_and_write

                fuse_attention(paged, backend, rotate_and_write)
                fuse_layers(paged, backend, add_norm)
            # A base that cannot be served is refused now, not in its first step.
            expose_overflows(base.model, self.runner.probe)
            self.runner.probe()
            if base.device.type == "cuda" and settings.cuda_graphs:
                try:
                    with memory_of("what CUDA graphs of steps need", "kv_cache_tokens", "max_sequences"):
                        graphs = StepGraphs(decoder, self.runner.tables)
                        graphs.capture_all()
                except NotCapturable as error:
                    logger.warning("steps run without CUDA graphs, which is slower: %s", error)
                else:
                    self.runner.static = graphs

    def start(self) -> None:
        """Start the threads."""
        self.runner.chooser.start()
        super().start()

    def load(self) -> RunnerLoad:
        """What there is to do, and the pages in use."""
        pages, scheduler = self.planner.pages, self.scheduler
        in_use = pages.count - pages.available()
        return RunnerLoad(scheduler.waiting(), scheduler.running(), scheduler.preemptions, (in_use, pages.count))

    def device_bytes(self) -> dict[str, int]:
        """The paged cache."""
        return {"KV cache": self._cache_bytes}

    def in_batch(self) -> list[GenerationRequest]:
        """The requests in the batch."""
        return list(self.planner.running)

    def remove(self, request: GenerationRequest) -> None:
        """Take a running request out of the batch, and give its row and pages back."""
        self.planner.remove(request)
        self.runner.chooser.forget_left()

    def step(self) -> bool:
        """Launch a step and hand on what it gave; launch the next one meanwhile, where the device runs alone."""
        step, self._next = self._next, None
        if step is None:
            plan = self.planner.plan(self.runner.runs_static)
            self.scheduler.hint_new()
            if plan is None:
                return False
            self.steps += 1
            try:
                step = _LaunchedStep(plan, self.runner.launch(plan))
            except Exception as error:  # noqa: BLE001 - it is told to every request of the step
                self._fail(plan, error)
                return True
        self._launch_ahead(step)
        self._finish(step)
        return True

    def end(self, request: GenerationRequest, reason: FinishReason, error: Exception | None = None) -> None:
        """Finish a running request: now, or after the step under way, which reads its adapter and writes its pages."""
        if self._next is not None and request in self._next.requests:
            self._next.leaving.setdefault(request, (reason, error))
        else:
            super().end(request, reason, error)

    def stop(self) -> None:
        """Stop after the step under way; the requests that wait or run end with an error."""
        super().stop()
        self.runner.chooser.close()

    def settle(self) -> None:
        """Wait for the step under way, and end the requests that were to end after it."""
        step, self._next = self._next, None
        if step is not None:
            # Its error, if any, is that of the device, which the next step or the probe meets too.
            with suppress(Exception):
                step.launch.wait()
            for request, (reason, error) in step.leaving.items():
                self.end(request, reason, error)

    def _launch_ahead(self, step: _LaunchedStep) -> None:
        """Launch the step after `step` before its tokens are known, if nothing has to come between the two."""
        if self._stopping or self._cancelled or not step.launch.on_device:
            return
        plan = self.planner.plan_ahead(step.plan, step.leaving, self.runner.runs_on_device)
        self.scheduler.hint_new()
        if plan is None:
            return
        try:
            self._next = _LaunchedStep(plan, self.runner.launch(plan, ahead=1))
            self.steps += 1
        except NotCaptured:
            pass  # the next plan has its requests
        except Exception:  # noqa: BLE001 - it is met again, and told to the requests, when the step's turn comes
            logger.exception("a step could not be launched ahead; it is tried again after the step under way")

    def _finish(self, step: _LaunchedStep) -> None:
        """Wait for a step, and hand on what it gave."""
        plan = step.plan
        try:
            outcome = step.launch.wait()
        except Exception as error:  # noqa: BLE001 - it is told to every request of the step
            self.settle()
            self._fail(plan, error)
            return
        for request, (reason, cause) in step.leaving.items():
            self.end(request, reason, cause)
        # Before their pages are published: these hold keys and values that are not finite.
        for request in outcome.overflowed:
            if request not in step.leaving:
                self.end(request, FinishReason.FAILED, self._overflows.error(request))
        for request, cause in outcome.failures.items():
            if request not in step.leaving:
                self.end(request, FinishReason.FAILED, cause)
        if outcome.overflowed or outcome.failures or step.leaving:
            plan.remove([*outcome.overflowed, *outcome.failures, *step.leaving])
        # What is postponed runs its last token again. It took part in this step, and its tenant is charged for that.
        postponed = outcome.postponed
        for request in plan.decodes:
            self.planner.advance(request, 0 if request in postponed else 1)
        for request, count in plan.chunks:
            self.planner.advance(request, count - 1 if request in postponed else count)
            if request.computed < len(request.tokens):
                self.runner.tables.advance(request)
        given = {request: token for request, token in outcome.tokens.items() if request not in step.leaving}
        self.scheduler.charge([*given, *(postponed - step.leaving.keys())])
        for request, token in given.items():
            self._hand_on(request, token)

    def _hand_on(self, request: GenerationRequest, token: int) -> None:
        request.tokens.append(token)
        if (
            request.logprob_room is not None
            and request.params.logprobs is not None
            and not request.logprob_room.take(1 + request.params.logprobs)
        ):
            self.end(request, FinishReason.FAILED, too_many_logprobs("logprobs"))
            return
        if request.first_token_s is None:
            request.first_token_s = time.monotonic() - request.arrived
        try:
            ended = token in request.end_tokens or _completes_constraint(request, token)
        except Exception as error:  # noqa: BLE001 - it is told to the one request whose constraint failed
            self.end(request, FinishReason.FAILED, constraint_failed(request, error))
            return
        if ended:
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
        free_memory(error)
        # Before the leases end: the probe waits for the device, which may still use their slots.
        self.runner.probe()
        for request in plan.requests():
            if not request.is_finished:
                self.end(request, FinishReason.FAILED, step_failed(error))


def _completes_constraint(request: GenerationRequest, token: int) -> bool:
    """Note a generated token with the request's constraint; whether nothing but an end may follow.

    Raises:
        ConstraintUnsatisfiable: Nothing else may follow, and `min_tokens` asks for more.
    """
    if request.constraint is None:
        return False
    request.constraint.accept(token)
    if not request.constraint.is_ended():
        return False
    if request.bars_end:
        raise ends_too_early(request)
    return True
