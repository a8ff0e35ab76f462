"""The serving engine: takes requests that name adapters, and answers them from one frozen base."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from dataclasses import dataclass

import torch

from adapters_store import AdapterBundle, AdapterStore, ResolvedAdapter, check_base
from sera_kernels import warm_up
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine.classification import ClassifyBatch, ClassifyResult
from sera_serve.engine.continuous import ContinuousBatch
from sera_serve.engine.detokenizer import Detokenizer
from sera_serve.engine.generation import GenerateParams, GenerationStream
from sera_serve.engine.prompts import classify_tokens, end_tokens, prompt_tokens
from sera_serve.engine.sequences import SequenceOptions, SequenceUpdate
from sera_serve.errors import EngineUnavailable, Overloaded, UnsupportedTask
from sera_serve.layers import AdapterContext, attach_serving, find_siblings
from sera_serve.residency import AdapterResidency, DevicePool, HostCache, Lease

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class _Sequence:
    """A submitted sequence: who listens to it, and the adapter it holds."""

    stream: GenerationStream
    loop: asyncio.AbstractEventLoop
    lease: Lease | None


class ServingEngine:
    """One base, one device pool, many adapters: generation by continuous batching, classification by row batches.

    Its coroutines may be awaited on any event loop, several at once.
    """

    def __init__(self, base: FrozenBase, store: AdapterStore, settings: ServeSettings) -> None:
        """Allocate memory and attach the serving layers, on model objects of its own: `base` is not changed."""
        self.base = base
        self.store = store
        self.settings = settings
        shapes = base.module_shapes()
        self._shapes = shapes
        pool = DevicePool(settings.pool_mib * MEBIBYTE, len(shapes), settings.max_resident, base.dtype, base.device)
        index = {path: row for row, path in enumerate(shapes)}
        self.residency = AdapterResidency(self._load_bundle, pool, HostCache(settings.host_cache_mib * MEBIBYTE), index)
        self._sequences: dict[str, _Sequence] = {}
        self._admitted = 0
        self._lock = threading.Lock()
        self._ids = itertools.count()
        siblings = find_siblings(base.model)
        warm_up(base.device, base.dtype)
        classify_base = base.share_weights()
        classify_context = AdapterContext(pool.data, pool.tables)
        attach_serving(classify_base.model, classify_context, siblings)
        cpu_threads = settings.cpu_threads or torch.get_num_threads()
        self._classify = ClassifyBatch(classify_base, classify_context, pool, settings.classify_max_batch, cpu_threads)
        self._generate: ContinuousBatch | None = None
        if base.kind == "decoder":
            model = base.share_weights().model
            context = AdapterContext(pool.data, pool.tables)
            attach_serving(model, context, siblings)
            self._generate = ContinuousBatch(
                model,
                context,
                self._on_update,
                kv_cache_tokens=settings.kv_cache_tokens,
                max_batch_tokens=settings.max_batch_tokens,
                max_sequences=settings.max_sequences,
                cpu_threads=cpu_threads,
            )

    def start(self) -> None:
        """Start the engine's threads."""
        self._classify.start()
        if self._generate is not None:
            self._generate.start()

    def stop(self) -> None:
        """Stop at once: requests under way are told so."""
        if self._generate is not None:
            self._generate.stop()
        self._classify.stop()
        self.residency.close()

    def failure(self) -> str | None:
        """Why the engine cannot serve, or None while it can."""
        failure = self._classify.failure()
        if failure is None and self._generate is not None:
            failure = self._generate.failure()
        return failure

    def health(self) -> None:
        """Raise EngineUnavailable with the reason when the engine cannot serve."""
        failure = self.failure()
        if failure is not None:
            raise EngineUnavailable(failure)

    def forget(self, digest: str) -> None:
        """Give back the memory of a bundle that was deleted, once no request uses it."""
        self.residency.forget(digest)

    def in_flight(self) -> int:
        """How many requests are admitted and unfinished."""
        return self._admitted

    async def generate(self, params: GenerateParams) -> GenerationStream:
        """Admit a request and put it into the batch once its adapter is on the device.

        Every refusal is raised here, before the first delta.

        Raises:
            UnsupportedTask: An encoder base, or a classifier adapter.
            PromptTooLong: Prompt and new tokens exceed the context.
            InvalidRequest: An empty prompt, or a token id outside the vocabulary.
            Overloaded: Too many requests are waiting, or no room for the adapter in time.
            EngineUnavailable: The engine is not running.
            StoreError: The adapter does not exist, or does not fit the base.
        """
        self.health()
        if self._generate is None:
            raise UnsupportedTask("this base is an encoder; it serves classify, not generate", param="adapter")
        tokens = prompt_tokens(self.base, params, min(self.base.max_length, self.settings.kv_cache_tokens))
        self._admit()
        lease: Lease | None = None
        try:
            resolved = None
            if params.adapter is not None:
                resolved, lease = await self._lease(params.adapter, "generate")
            stream = self._submit(self._generate, params, tokens, resolved, lease)
        except BaseException:
            if lease is not None:
                lease.release()
            self._leave()
            raise
        return stream

    async def classify(self, adapter: str, inputs: list[str]) -> ClassifyResult:
        """Classify each input with the adapter's head.

        Raises:
            UnsupportedTask: The adapter has no head.
            InvalidRequest: An input has no tokens.
            Overloaded, EngineUnavailable, StoreError: As in `generate`.
        """
        self.health()
        self._admit()
        try:
            resolved, lease = await self._lease(adapter, "classify")
            limit = lease.placement.adapter.config.max_length or self.base.max_length
            try:
                rows = await asyncio.to_thread(classify_tokens, self.base, inputs, limit)
            except BaseException:
                lease.release()
                raise
            futures = self._classify.submit(lease, rows)
            results = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            self._leave()
        return ClassifyResult(resolved.adapter, resolved.version, list(results))

    def _submit(
        self,
        batch: ContinuousBatch,
        params: GenerateParams,
        tokens: list[int],
        resolved: ResolvedAdapter | None,
        lease: Lease | None,
    ) -> GenerationStream:
        request_id = f"gen-{secrets.token_hex(8)}"
        ends = end_tokens(self.base)
        stream = GenerationStream(
            request_id,
            resolved.adapter if resolved else None,
            resolved.version if resolved else None,
            len(tokens),
            frozenset(ends),
            Detokenizer(self.base.tokenizer, tokens, params.stop),
            lambda: batch.cancel(request_id),
        )
        options = SequenceOptions(
            adapter_slot=lease.slot if lease else SequenceOptions.adapter_slot,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=secrets.randbits(31) if params.seed is None else params.seed,
            prefix_key=resolved.digest if resolved else None,
        )
        with self._lock:
            self._sequences[request_id] = _Sequence(stream, asyncio.get_running_loop(), lease)
        try:
            batch.submit(request_id, tokens, params.max_new_tokens, ends, options)
        except RuntimeError as error:
            with self._lock:
                del self._sequences[request_id]
            raise EngineUnavailable(str(error)) from error
        return stream

    def _on_update(self, update: SequenceUpdate) -> None:
        """On the engine's thread: give back what an ended sequence holds, and tell its listener."""
        with self._lock:
            sequence = self._sequences.get(update.request_id)
            if sequence is None:
                return
            if update.ended:
                del self._sequences[update.request_id]
                self._admitted -= 1
        if update.ended and sequence.lease is not None:
            sequence.lease.release()
        try:
            sequence.loop.call_soon_threadsafe(sequence.stream.deliver, update)
        except RuntimeError:  # the listener's event loop is closed: nobody waits for it any more
            if self._generate is not None and not update.ended:
                self._generate.cancel(update.request_id)

    async def _lease(self, reference: str, task: str) -> tuple[ResolvedAdapter, Lease]:
        resolved = await asyncio.to_thread(self.store.resolve, reference)
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                lease = await self.residency.lease(resolved.digest)
        except TimeoutError:
            raise Overloaded(
                f"adapter {reference!r} found no room on the device in time; send the request again",
                param="adapter",
            ) from None
        config = lease.placement.adapter.config
        if config.task != task:
            lease.release()
            raise UnsupportedTask(
                f"adapter {reference!r} is for {config.task}; send it to /v1/{config.task}", param="adapter"
            )
        return resolved, lease

    def _load_bundle(self, digest: str) -> AdapterBundle:
        bundle = self.store.load(digest)
        check_base(bundle.config, self.base.info, self._shapes)
        return bundle

    def _admit(self) -> None:
        with self._lock:
            if self._admitted >= self.settings.max_queue:
                raise Overloaded(f"{self._admitted} requests are under way, the most allowed; send it again later")
            self._admitted += 1

    def _leave(self) -> None:
        with self._lock:
            self._admitted -= 1
