"""The serving engine: takes requests that name adapters, and answers them from one frozen base model."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, PeftFiles, check_base, import_peft, parts_of
from sera_kernels import warm_up
from sera_serve.base import BaseKind, FrozenBase, check_length, check_task, import_base
from sera_serve.config import ServeSettings
from sera_serve.engine.adapter_uses import ANYONE, AdapterUses
from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.answer_tokens import AnswerTokens
from sera_serve.engine.choices import ChoiceGroup, check_logprobs, check_options, choice_requests, logprobs_of_prompts
from sera_serve.engine.constraint import ConstraintSpec, TokenConstraint
from sera_serve.engine.image_rows import ImageRowMaker
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.memory import MEBIBYTE, DeviceMemory, memory_of
from sera_serve.engine.named_adapters import AdapterActivity, AdapterNames
from sera_serve.engine.prompts import PromptMaker
from sera_serve.engine.references import AdapterReferences
from sera_serve.engine.request import FinishReason, GenerateParams, GenerationRequest, Principal, Request, Task
from sera_serve.engine.results import TokenLogprobs
from sera_serve.engine.row_calls import RowCalls, TimeLimits, any_started
from sera_serve.engine.rows import RowMaker
from sera_serve.engine.scheduler import Scheduler
from sera_serve.engine.stream import Detokenizer, EventReader, GenerationStream, Mailbox, deadline_exceeded
from sera_serve.engine.structured import StructuredOutput
from sera_serve.engine.tasks import ClassificationRunner, GenerationRunner, RunnerLoad, TaskRunner
from sera_serve.engine.tenant_memory import LogprobRoom, TenantMemory, too_many_logprobs
from sera_serve.errors import EngineUnavailable, InvalidRequest, SeraServeError, UnsupportedTask
from sera_serve.layers import AdapterContext, SideStream, attach_serving, find_shared_inputs
from sera_serve.loop_turns import LoopTurns
from sera_serve.residency import AdapterResidency, DevicePool, HostCache, Presence, ResidencyStats
from sera_serve.residency.bundle_check import check_fits, check_ranks, check_servable
from sera_serve.residency.import_probe import ImportedAdapter, compared
from sera_serve.residency.packing import packed_elements
from sera_serve.threads import BoundedExecutor

_MAX_WAITING_LEASES = 32
# The part of `request_timeout_s` for which other adapters may bypass one that waits for room.
_MAX_WAIT = 0.1
_RESOLVING_THREADS = 8
# Few, because a long text's tokens take some 150 bytes each while they are made.
_TOKENIZING_THREADS = 2
_COMPILING_THREADS = 2
# What a base serves beside generation, for messages.
_ROUTES: dict[BaseKind, str] = {
    "decoder": "send texts to /v1/classify or /v1/embeddings",
    "encoder": "send texts to /v1/classify or /v1/embeddings",
    "vision": "send images to /v1/classify or /v1/embeddings",
    "dual": "send images to /v1/classify, or images and texts to /v1/embeddings",
}


class ServingEngine(RowCalls):
    """One base, one device pool, many adapters, and a runner for each task that the base serves.

    Its coroutines may be awaited on any event loop, several at once.
    """

    def __init__(self, base: FrozenBase, store: AdapterStore, settings: ServeSettings) -> None:
        """Allocate memory and attach the serving layers, on model objects of its own: `base` is not changed.

        Raises:
            InvalidConfiguration: The base's architecture cannot be served.
        """
        self.base = base
        self.store = store
        self.settings = settings
        self._shapes = base.module_shapes()
        self._memory = DeviceMemory(settings, base.device)
        with memory_of("the adapters' pool", "pool_mib", "max_resident"):
            self._pool = DevicePool(
                self._memory.pool_bytes(), len(self._shapes), settings.max_resident, base.dtype, base.device
            )
        self._names = AdapterNames(settings.max_resident)
        self._uses = AdapterUses()
        self._references = AdapterReferences(
            store, base.info, self._shapes, self._pool.capacity, self._names, self._uses, base.dtype
        )
        self._row_maker = RowMaker(base, self._references)
        self._module_index = {path: row for row, path in enumerate(self._shapes)}
        self.residency = AdapterResidency(
            self._references.loading,
            self._pool,
            HostCache(settings.host_cache_mib * MEBIBYTE),
            self._module_index,
            size_of=self._references.load_size,
            max_wait_s=_MAX_WAIT * settings.request_timeout_s,
        )
        self._admission = AdmissionController(settings.max_queue, settings.max_queue_per_tenant)
        self._logprob_memory = TenantMemory()
        self._answer_memory = TenantMemory()
        self._unsound: str | None = None
        self._mailbox: Mailbox | None = None
        warm_up(base.device, base.dtype)
        self._groups = find_shared_inputs(base.model)
        # Every request that was admitted may wait: admission alone refuses them.
        self._resolving = BoundedExecutor("resolving", _RESOLVING_THREADS, settings.max_queue)
        self._tokenizing = BoundedExecutor("tokenizing", _TOKENIZING_THREADS, settings.max_queue)
        self._compiling = BoundedExecutor("compiling", _COMPILING_THREADS, settings.max_queue)
        self._images = ImageRowMaker(base, settings)
        # By task; a base without a runner for a task does not serve it.
        self.runners: dict[Task, TaskRunner[Any]] = {
            "classify": ClassificationRunner(*self._serving_copy(), self._pool, self._scheduler(), settings)
        }
        self.context_tokens = base.max_length
        """The most tokens of one request, prompt and answer together."""
        if base.reads_text:
            # Made here: the first request would wait for a copy of the tokenizer.
            self._preprocessor = base.preprocessor
        if base.kind == "decoder":
            self._vocabulary = int(base.model.config.get_text_config().vocab_size)
            # It reads nothing before it is used.
            end_tokens = self._preprocessor.end_tokens
            self.constraints = StructuredOutput(base.tokenizer, self._vocabulary, end_tokens)
            generation = GenerationRunner(*self._serving_copy(), self._scheduler(), self._memory, settings)
            self.runners["generate"] = generation
            self.context_tokens = min(base.max_length, generation.cache_tokens)
            self._prompts = PromptMaker(self._preprocessor, self._tokenizing, self.loop_turns, self.context_tokens)

    def start(self) -> None:
        """Start the runners' threads."""
        for runner in self.runners.values():
            runner.start()

    def stop(self) -> None:
        """Stop at once, on any thread. Every request in flight ends with EngineUnavailable. Idempotent. Blocks."""
        # First everyone is told who waits, then the threads are waited for: a step or a read may take long.
        self._resolving.close()
        self._tokenizing.close()
        self._compiling.close()
        self._images.close()
        for runner in self.runners.values():
            runner.scheduler.close()
        self.residency.close(timeout_s=0)
        for runner in self.runners.values():
            runner.stop()
        self.residency.close()

    def failure(self) -> str | None:
        """Why the engine cannot serve, or None while it can."""
        return self._unsound or next(filter(None, (runner.failure() for runner in self.runners.values())), None)

    def health(self) -> None:
        """Raise EngineUnavailable with the reason when the engine cannot serve."""
        failure = self.failure()
        if failure is not None:
            raise EngineUnavailable(failure)

    def ready(self) -> None:
        """`health`, and when nothing is in flight a check of the invariants of the adapters' memory. Blocks.

        Where an invariant is broken, an answer might come from wrong weights: the engine serves no more.
        """
        self.health()
        try:
            self.residency.idle_check()
        except RuntimeError as error:
            self._unsound = f"the adapters' memory is not sound: {error}; restart the server"
            self.health()

    def check_bundle(self, bundle: AdapterBundle) -> None:
        """Check that a bundle can be served: made for this base, not larger than the pool, no overflow. Blocks.

        Raises:
            WrongBase, UnknownModule, WrongShape: The bundle was made for another base.
            WrongTask: The base does not serve the bundle's task, or reads images of another size.
            AdapterTooLarge, AdapterOverflow: It can never be served.
        """
        self.check_config(bundle.config)
        check_servable(bundle, self._module_index, self._pool)

    def check_config(self, config: AdapterConfig) -> None:
        """Check that an adapter of this configuration can be served, without a look at its weights.

        Raises:
            WrongBase, UnknownModule, WrongShape, WrongTask: As `check_bundle`.
            AdapterTooLarge: It is larger than the pool, or a layer's rank is too high.
        """
        check_base(config, self.base.info, self._shapes)
        check_ranks(config)
        check_task(config, self.base)
        check_length(config, self.base)
        check_fits(packed_elements(config), self._pool)

    def import_checkpoint(self, files: PeftFiles) -> ImportedAdapter:
        """Make a bundle of a PEFT checkpoint, and check it as `check_bundle` does. Blocks.

        Raises:
            InvalidBundle: The checkpoint is refused, or was made for another base.
            AdapterTooLarge, AdapterOverflow, ImportMismatch: It can never be served.
        """
        base = import_base(self.base)
        # The weights may be zeros in an archive, of which a MB expands to a GB.
        imported = import_peft(files, base, partial(check_fits, pool=self._pool))
        # The comparison is in float64: what is larger than the pool would take many times its bytes.
        self.check_config(imported.bundle.config)
        adapter = compared(imported, base, self.base.dtype)
        check_servable(adapter.bundle, self._module_index, self._pool)
        return adapter

    def mark_deleted(self, digest: str) -> None:
        """Give back the memory of a bundle that was deleted, and of its combinations, once no request uses them."""
        for known in self.residency.digests():
            if any(part == digest for part, _ in parts_of(known)):
                self.residency.mark_deleted(known)
        self.residency.mark_deleted(digest)
        self._uses.forget_pins(digest)

    async def pin(self, digest: str, reference: str | None = None) -> None:
        """Bring an adapter to the device and keep it there; raises CannotPin, or why it cannot be loaded.

        `reference` is what requests will name it by, where that is known. The pin is this adapter's: the same content
        stays on the device while any adapter pins it.
        """
        if reference is not None:
            self._names.add(reference, digest)
        # Pins of deleted adapters must not take the share of the pool that pins may have.
        await self._resolving.run(self.drop_deleted_pins)
        adapter = _adapter_of(reference)
        self._uses.begin_pin(adapter, digest)
        try:
            await asyncio.wrap_future(self.residency.pin(digest))
        except BaseException:
            # The call may have been given up when the content was pinned already.
            if self._uses.end_pin(adapter, digest, has_pinned=False):
                self.residency.unpin(digest)
            raise
        self._uses.end_pin(adapter, digest, has_pinned=True)

    def unpin(self, digest: str, reference: str | None = None) -> None:
        """End an adapter's pin, with which the content may leave the device if no other adapter pins it. Idempotent."""
        if self._uses.unpin(_adapter_of(reference), digest):
            self.residency.unpin(digest)

    def drop_deleted_pins(self) -> None:
        """End the pins of what was deleted, maybe by another server: contents, and adapters that had them. Blocks."""
        for digest in self.residency.pinned_digests():
            is_stored = self.store.has(digest)
            for adapter in self._uses.holders(digest):
                if not is_stored or (adapter != ANYONE and not self.store.has_content(adapter, digest)):
                    self.unpin(digest, adapter)
            if not is_stored:
                self.mark_deleted(digest)

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Share batches by other weights from now on; a tenant without one has 1. Any thread."""
        for runner in self.runners.values():
            runner.scheduler.set_weights(weights)

    def in_flight(self, tenant: str | None = None) -> int:
        """How many calls were admitted and are not finished; those of one tenant if given."""
        return self._admission.in_flight(tenant)

    def waiting(self) -> int:
        """How many requests, and parts of classifications, wait for their turn."""
        return sum(runner.load().waiting for runner in self.runners.values())

    def running(self) -> int:
        """How many requests, and parts of classifications, are in a batch."""
        return sum(runner.load().running for runner in self.runners.values())

    def loads(self) -> dict[Task, RunnerLoad]:
        """What each runner has to do."""
        return {task: runner.load() for task, runner in self.runners.items()}

    def memory(self) -> dict[str, int]:
        """Bytes of the device's memory by what they are for."""
        sizes = {"adapters": self._pool.capacity * self.base.dtype.itemsize}
        for runner in self.runners.values():
            sizes |= runner.device_bytes()
        return sizes

    def stats(self) -> ResidencyStats:
        """Figures of the adapters' memory."""
        return self.residency.stats()

    def adapter_activity(self) -> AdapterActivity:
        """Which adapters serve and which are waited for, by the references that requests name them by."""
        return self._names.activity(*self.residency.ready_and_wanted())

    def presence(self, adapters: Sequence[tuple[str, str]]) -> list[Presence]:
        """Where each of these adapters, named by `tenant/name` and digest, is now, as far as its own requests know."""
        return self._uses.visible(adapters, self.residency.presence([digest for _, digest in adapters]))

    async def generate(
        self, params: GenerateParams, principal: Principal, received_at: float | None = None
    ) -> GenerationStream:
        """Let a request wait for its turn and for its adapter, and return when it runs.

        Every refusal is raised here, before the first delta.

        Args:
            params: What to generate.
            principal: Who asks.
            received_at: When the request's first byte came (`time.monotonic`); None is now. Time limits count from it.

        Raises:
            UnsupportedTask: An encoder base, or a classifier adapter.
            PromptTooLong: Prompt and new tokens exceed the context.
            InvalidRequest: An empty prompt, a token id outside the vocabulary, or fields that contradict each other.
            TenantOverloaded: The tenant has too many requests in flight.
            Overloaded: All tenants together have, or the request was not started in time.
            DeadlineExceeded: `params.timeout_s` was over before it was started.
            EngineUnavailable: The engine is not running.
            StoreError: The adapter does not exist, or does not fit the base.
        """
        if params.n != 1:
            raise InvalidRequest(f"n is {params.n}, and this call gives one answer; send n 1", param="n")
        (stream,) = await self.generate_choices(params, principal, received_at)
        return stream

    def check_base_serves(self, task: Task) -> None:
        """Raise UnsupportedTask where the base has no runner for a task; the message names the routes that it has."""
        if task not in self.runners:
            served = ", ".join(self.runners)
            raise UnsupportedTask(
                f"base {self.base.name!r}, of kind {self.base.kind}, serves {served}, not {task}; "
                f"{_ROUTES[self.base.kind]}, or ask a server of a decoder base",
                param="adapter",
            )

    async def generate_choices(
        self,
        params: GenerateParams,
        principal: Principal,
        received_at: float | None = None,
        submitted: Callable[[Sequence[GenerationStream]], None] | None = None,
    ) -> list[GenerationStream]:
        """`generate_prompts` for one prompt: `params.n` answers."""
        return await self.generate_prompts([params], principal, received_at, submitted)

    async def generate_prompts(
        self,
        prompts: Sequence[GenerateParams],
        principal: Principal,
        received_at: float | None = None,
        submitted: Callable[[Sequence[GenerationStream]], None] | None = None,
    ) -> list[GenerationStream]:
        """Let `n` answers to each prompt wait for their turn, and return when the first of them runs; see `generate`.

        All are admitted, or none. What is refused before any answer runs is raised here. The other answers start while
        the first ones are read, without a limit on their wait but `timeout_s`. The stream of an answer that is refused
        raises why.

        Each stream is read and closed on its own. Each answer counts as a request in flight, and takes a row of the
        batch. A prompt is computed once, but for its last page: its other answers find its pages in the prefix cache.
        Where all streams are closed before one runs, the call returns them at once: none has a result.
        Where requests like these share pages with no other, the answers to one prompt share with each other alone.

        Args:
            prompts: At least one. They differ in their prompts alone.
            principal: As in `generate`.
            received_at: Likewise.
            submitted: Called once with the streams, before any of them runs.

        Returns:
            The answers to the first prompt, then those to the next one.
        """
        runner = self._runner("generate")
        most = min(self.settings.max_queue_per_tenant, self.settings.max_queue)
        if principal.max_in_flight is not None:
            # Without any, admission refuses it.
            most = max(1, min(most, principal.max_in_flight))
        check_options(prompts[0], self._vocabulary, most, len(prompts))
        limits = self._time_limits(received_at, prompts[0].timeout_s)
        groups = [choice_requests(params, principal, self._preprocessor.end_tokens) for params in prompts]
        requests = [request for group in groups for request in group]
        with ExitStack() as admitted:
            for request in requests:
                admitted.enter_context(self._admitted(request))
            async with self._time_to_start(limits):
                await self._prepare(groups, principal)
                reader = EventReader(self._mailbox_here())
                readable = [[self._stream(request, runner) for request in group] for group in groups]
                streams = [stream for group in readable for stream in group]
                if submitted is not None:
                    submitted(streams)
                try:
                    for group in readable:
                        first = group[0].request
                        # A prompt below a page has nothing to share. Its log-probabilities are computed by one request.
                        shares = first.prompt_tokens > PAGE_SIZE or first.params.prompt_logprobs is not None
                        ChoiceGroup(group, runner.scheduler.submit, shares, reader)
                    await any_started(requests, reader)
                except BaseException:
                    runner.cancel_all(requests, FinishReason.CANCELLED)
                    raise
        if limits.deadline is not None:
            for stream in streams:
                stream.end_at(limits.deadline)
        return streams

    def _stream(self, request: GenerationRequest, runner: TaskRunner[Any]) -> GenerationStream:
        params = request.params
        return GenerationStream(
            request,
            Detokenizer(self.base.tokenizer, request.tokens, params.stop, params.min_tokens),
            self._mailbox_here(),
            partial(runner.cancel, request),
            self.settings.stream_interval,
        )

    def _runner(self, task: Task) -> TaskRunner[Any]:
        """The runner of a task; raises EngineUnavailable where the engine cannot serve, UnsupportedTask without one."""
        self.health()
        self.check_base_serves(task)
        return self.runners[task]

    @contextmanager
    def _admitted(self, request: Request) -> Iterator[None]:
        """Count a call; an error inside the block counts it no more."""
        self._admission.admit(request, self._shed)
        try:
            yield
        except BaseException:
            self._admission.release(request)
            raise

    def _shed(self, tenant: str) -> bool:
        error = self._admission.refusal(tenant)
        return any(runner.scheduler.shed(tenant, error) for runner in self.runners.values())

    def _time_limits(self, received_at: float | None, timeout_s: float | None) -> TimeLimits:
        # The clock of asyncio's event loops, and of uvloop's, is time.monotonic.
        arrived = asyncio.get_running_loop().time() if received_at is None else received_at
        return TimeLimits(
            latest_start=arrived + self.settings.request_timeout_s,
            deadline=None if timeout_s is None else arrived + timeout_s,
        )

    @asynccontextmanager
    async def _time_to_start(self, limits: TimeLimits) -> AsyncIterator[None]:
        """End whatever the block waits for where a request is not started in time; raises why."""
        scope = asyncio.timeout_at(limits.first)
        try:
            async with scope:
                yield
        except TimeoutError:
            # A disk's own time limit is another matter.
            if not scope.expired():
                raise
            if limits.deadline == limits.first:
                raise deadline_exceeded() from None
            allowed = self.settings.request_timeout_s
            raise self._admission.overloaded(f"the request was not started within {allowed:g} s") from None

    async def _prepare(self, groups: Sequence[Sequence[GenerationRequest]], principal: Principal) -> None:
        """Give the requests of one call, by prompt, their tokens, their adapter, and what constrains them."""
        params = groups[0][0].params
        prompts: list[array[int]] = []
        for index, group in enumerate(groups):
            with _placed(index if len(groups) > 1 else None):
                prompts.append(await self._prompts.tokens(group[0].params, principal.tenant))
        adapter = None
        if params.adapter is not None:
            adapter = await self._resolving.run(self._references.resolve, params.adapter, "generate")
        count = sum(map(len, groups))
        constraints: list[TokenConstraint | None] = [None] * count
        if params.constraint is not None:
            constraints = await self._constraints(params.constraint, principal.tenant, count)
        check_logprobs(params, list(map(len, prompts)), self.context_tokens)
        room: LogprobRoom | None = None
        if params.logprobs is not None or params.prompt_logprobs is not None:
            room = LogprobRoom(self._logprob_memory, principal.tenant)
            # With those of the first tokens: where a tenant has too many already, nothing begins.
            first = 0 if params.logprobs is None else (1 + params.logprobs) * count
            if not room.take(logprobs_of_prompts(params, sum(map(len, prompts))) + first):
                raise too_many_logprobs("logprobs" if params.prompt_logprobs is None else "prompt_logprobs")
        following = iter(constraints)
        for group, tokens in zip(groups, prompts, strict=True):
            limit = self.context_tokens if params.max_new_tokens is None else len(tokens) + params.max_new_tokens
            prompt_logprobs: list[TokenLogprobs] = []
            for request in group:
                request.adapter, request.constraint = adapter, next(following)
                request.prefix_key = _prefix_key(request, params.cache_salt, principal)
                if request.prefix_key is None and len(group) > 1:
                    # No tenant begins with "_", and nobody else has this name.
                    request.prefix_key = f"_choices/{group[0].id}"
                request.tokens, request.prompt_tokens, request.limit = AnswerTokens(tokens), len(tokens), limit
                request.logprob_room = room
                request.prompt_token_logprobs = prompt_logprobs

    async def _constraints(self, spec: ConstraintSpec, tenant: str, count: int) -> list[TokenConstraint | None]:
        """A constraint for each of `count` requests of one call; raises InvalidRequest."""
        found: list[TokenConstraint | None] = []
        while len(found) < count:
            # What is compiled already waits for nobody's compiling.
            constraint = self.constraints.compiled(spec, tenant)
            if constraint is None:
                constraint = await self._compiling.run_in_turn(tenant, self.constraints.compile, spec, tenant)
            found.append(constraint)
            # Each copy takes up to a millisecond, and there may be many.
            await asyncio.sleep(0)
        return found

    def loop_turns(self) -> LoopTurns:
        """Who may work for long on the running event loop."""
        return self._mailbox_here().turns

    def _mailbox_here(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = Mailbox(loop)
        return mailbox

    def _serving_copy(self) -> tuple[FrozenBase, AdapterContext]:
        """A model object over the base's weights with serving layers, for one runner: passes of two runners overlap."""
        base = self.base.share_weights()
        context = AdapterContext(self._pool.data, self._pool.tables)
        side_stream = SideStream(base.device) if base.device.type == "cuda" else None
        attach_serving(base.model, context, self._groups, side_stream)
        return base, context

    def _scheduler(self) -> Scheduler[Any]:
        # Of the device's slots, requests that wait hold a quarter at most.
        leases = min(_MAX_WAITING_LEASES, max(1, self.settings.max_resident // 4))
        return Scheduler(self._admission, self.residency, leases, self.settings.tenant_weights)


def _prefix_key(request: GenerationRequest, cache_salt: str | None, principal: Principal) -> str | None:
    """Which requests share cached pages of prompts with this one; None shares with no other."""
    if request.adapter is None and cache_salt is None and principal.key_id is None:
        # Anybody may have sent it.
        return None
    # Two tenants may have published one bundle: they share its weights, and not what was asked of it. Neither a tenant
    # nor a digest contains "/".
    key = f"{request.tenant}/{request.digest or ''}"
    return key if cache_salt is None else f"{key}/{cache_salt}"


def _adapter_of(reference: str | None) -> str:
    return ANYONE if reference is None else reference.partition("@")[0]


@contextmanager
def _placed(index: int | None) -> Iterator[None]:
    """Have an error about one of several prompts name its place, such as `prompt[3]`; None: there is one prompt."""
    try:
        yield
    except SeraServeError as error:
        if index is not None and error.param in ("prompt", "token_ids"):
            error.param += f"[{index}]"
        raise
