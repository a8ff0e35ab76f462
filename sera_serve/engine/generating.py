"""Generation requests on their way through queue, batch and stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from functools import partial

from adapters_store import AdapterStore, ResolvedAdapter
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine.admission import Room, Visit
from sera_serve.engine.continuous import PAGE_SIZE, ContinuousBatch
from sera_serve.engine.detokenizer import Detokenizer
from sera_serve.engine.generation import PRIORITIES, GenerateParams, GenerationStream
from sera_serve.engine.mailbox import Mailbox
from sera_serve.engine.prompts import end_tokens, is_long, prompt_tokens
from sera_serve.engine.reception import Reception, deadline_after
from sera_serve.engine.request import Request
from sera_serve.engine.sequences import SequenceOptions, SequenceUpdate
from sera_serve.errors import EngineUnavailable, UnsupportedTask
from sera_serve.layers import AdapterContext
from sera_serve.residency import Lease


@dataclass(eq=False)
class _Sequence:
    """A sequence in the batch: its request, who listens to it, and how many of its tokens are charged."""

    request: Request
    stream: GenerationStream
    mailbox: Mailbox
    counted: int = 0


class Generating:
    """Generates on a decoder: one continuous batch, whose waiting requests are held here, in the fair order.

    The batch serves first come, first served. Its own queue stays short, because a request enters only if it has a
    place, its pages of the cache to its last token, and no more than a step's prompts before it.
    """

    def __init__(
        self,
        base: FrozenBase,
        context: AdapterContext,
        store: AdapterStore,
        reception: Reception,
        settings: ServeSettings,
        cpu_threads: int,
    ) -> None:
        """Set up without starting.

        Args:
            base: A decoder with serving layers attached, for this object's use alone.
            context: The serving layers' context.
            store: Resolves the names of adapters.
            reception: Where requests wait.
            settings: Sizes of batch and cache.
            cpu_threads: Threads of a forward pass on a CPU.
        """
        self._base = base
        self._store = store
        self._reception = reception
        self._context_tokens = min(base.max_length, settings.kv_cache_tokens)
        # Twice a step's prompts: what the step under way computes, and what the next one takes up without a gap.
        room = Room(settings.max_sequences, _in_pages(settings.kv_cache_tokens), 2 * settings.max_batch_tokens)
        self._queue = reception.open_queue(room)
        self._sequences: dict[str, _Sequence] = {}
        self._mailbox: Mailbox | None = None
        # This turns truncation off for good; after it, calls from several threads leave the tokenizer as it is.
        base.tokenizer("")
        self.batch = ContinuousBatch(
            base.model,
            context,
            self,
            kv_cache_tokens=settings.kv_cache_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            max_sequences=settings.max_sequences,
            cpu_threads=cpu_threads,
        )

    async def generate(self, params: GenerateParams) -> GenerationStream:
        """Let a request wait for its turn and its adapter, and put it into the batch; see `ServingEngine.generate`."""
        deadline = deadline_after(params.timeout_s)
        visit = self._reception.enter(params.adapter)
        try:
            if is_long(params):
                tokens = await asyncio.to_thread(prompt_tokens, self._base, params, self._context_tokens)
            else:
                tokens = prompt_tokens(self._base, params, self._context_tokens)
            resolved = None
            if params.adapter is not None:
                resolved = await asyncio.to_thread(self._store.resolve, params.adapter)
            stream, request = self._sequence(params, tokens, resolved, visit)
            self._queue.submit(request)
        except BaseException:
            self._reception.leave(visit)
            raise
        try:
            await self._reception.turn(request, deadline)
        except BaseException:
            if not self._queue.withdraw(request):
                # It may be on its way into the batch right now, which has to have it before it can lose it.
                request.begun.add_done_callback(lambda _: self.batch.cancel(stream.id))
            raise
        if deadline is not None:
            stream.end_at(deadline)
        return stream

    def _sequence(
        self, params: GenerateParams, tokens: list[int], resolved: ResolvedAdapter | None, visit: Visit
    ) -> tuple[GenerationStream, Request]:
        request_id = f"gen-{secrets.token_hex(8)}"
        ends = end_tokens(self._base)
        mailbox = self._mailbox_here()
        stream = GenerationStream(
            request_id,
            resolved.adapter if resolved else None,
            resolved.version if resolved else None,
            len(tokens),
            frozenset(ends),
            Detokenizer(self._base.tokenizer, tokens, params.stop),
            lambda: self.batch.cancel(request_id),
        )

        def begin(lease: Lease | None) -> None:
            if lease is not None and lease.placement.adapter.config.task != "generate":
                raise wrong_task(params.adapter, lease.placement.adapter.config.task)
            stream.waited_s = time.monotonic() - visit.arrived
            options = SequenceOptions(
                adapter_slot=lease.slot if lease else SequenceOptions.adapter_slot,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=secrets.randbits(31) if params.seed is None else params.seed,
                # Two tenants may have published the same bundle: its weights are shared, what was asked of it is not.
                prefix_key=f"{visit.tenant}/{resolved.digest}" if resolved else None,
            )
            self._sequences[request_id] = _Sequence(request, stream, mailbox)
            try:
                self.batch.submit(request_id, tokens, params.max_new_tokens, ends, options)
            except RuntimeError as error:
                del self._sequences[request_id]
                raise EngineUnavailable(str(error)) from error

        request = Request(
            tenant=visit.tenant,
            prompt_tokens=len(tokens),
            priority=PRIORITIES.index(params.priority),
            cache_tokens=_in_pages(len(tokens) + params.max_new_tokens),
            visit=visit,
            digest=resolved.digest if resolved else None,
            begin=begin,
            ended=partial(self._reception.leave, visit),
        )
        return stream, request

    def _mailbox_here(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = Mailbox(loop)
        return mailbox

    def on_update(self, update: SequenceUpdate) -> None:
        """On the engine's thread: charge the tenant, pass on what an ended sequence held, and tell its listener."""
        sequence = self._sequences.get(update.request_id)
        if sequence is None:
            return
        new = len(update.tokens) - sequence.counted
        if new > 0:
            if not sequence.counted:
                sequence.stream.first_token_s = time.monotonic() - sequence.request.visit.arrived
            sequence.counted += new
            self._queue.progress(sequence.request, new)
        if update.ended:
            del self._sequences[update.request_id]
            self._queue.finish(sequence.request, served=update.error is None)
        delivered = sequence.mailbox.post(sequence.stream, update)
        if not delivered and not update.ended:
            self.batch.cancel(update.request_id)

    def on_prefix(self, request_id: str, cached_tokens: int) -> None:
        """On the engine's thread, before the sequence's first token: note what it did not have to compute."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.stream.cached_tokens = cached_tokens


def wrong_task(adapter: str | None, task: str) -> UnsupportedTask:
    """The refusal of an adapter that is for something else."""
    return UnsupportedTask(f"adapter {adapter!r} is for {task}; send it to /v1/{task}", param="adapter")


def _in_pages(tokens: int) -> int:
    """The tokens of the whole pages of the cache that so many tokens take."""
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE
