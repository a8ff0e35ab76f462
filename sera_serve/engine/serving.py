"""The serving engine: takes requests that name adapters, and answers them from one frozen base."""

from __future__ import annotations

import asyncio

import torch

from adapters_store import AdapterBundle, AdapterStore, check_base
from sera_kernels import warm_up
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine.classification import ClassifyBatch, ClassifyResult
from sera_serve.engine.generating import Generating
from sera_serve.engine.generation import GenerateParams, GenerationStream, Priority
from sera_serve.engine.inputs import Inputs
from sera_serve.engine.prompts import ClassifyTokens
from sera_serve.engine.reception import Reception
from sera_serve.errors import EngineUnavailable, UnsupportedTask
from sera_serve.layers import AdapterContext, attach_serving, find_shared_inputs
from sera_serve.residency import AdapterResidency, DevicePool, HostCache, ResidencyStats

MEBIBYTE = 1 << 20


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
        self._unsound: str | None = None
        self._reception = Reception(settings, self.residency)
        groups = find_shared_inputs(base.model)
        warm_up(base.device, base.dtype)
        cpu_threads = settings.cpu_threads or torch.get_num_threads()
        classify_base = base.share_weights()
        classify_context = AdapterContext(pool.data, pool.tables)
        attach_serving(classify_base.model, classify_context, groups)
        self._classify = ClassifyBatch(
            classify_base,
            classify_context,
            pool,
            max_rows=settings.classify_max_batch,
            max_tokens=settings.max_batch_tokens,
            max_wait_s=settings.classify_max_wait_ms / 1000,
            cpu_threads=cpu_threads,
        )
        self._inputs = Inputs(self._classify, ClassifyTokens(base), base.max_length, store, self._reception, settings)
        self._generating: Generating | None = None
        if base.kind == "decoder":
            generate_base = base.share_weights()
            context = AdapterContext(pool.data, pool.tables)
            attach_serving(generate_base.model, context, groups)
            self._generating = Generating(generate_base, context, store, self._reception, settings, cpu_threads)

    def start(self) -> None:
        """Start the engine's threads."""
        self._classify.start()
        if self._generating is not None:
            self._generating.batch.start()

    def stop(self) -> None:
        """Stop at once: requests under way are told so."""
        self._reception.close()
        if self._generating is not None:
            self._generating.batch.stop()
        self._classify.stop()
        self.residency.close()

    def failure(self) -> str | None:
        """Why the engine cannot serve, or None while it can."""
        failure = self._unsound or self._classify.failure()
        if failure is None and self._generating is not None:
            failure = self._generating.batch.failure()
        return failure

    def health(self) -> None:
        """Raise EngineUnavailable with the reason when the engine cannot serve."""
        failure = self.failure()
        if failure is not None:
            raise EngineUnavailable(failure)

    def ready(self) -> None:
        """`health`, and when nothing is under way a check of the books of the adapters' memory.

        Where these do not balance an answer might come from wrong weights: the engine serves no more.
        """
        self.health()
        try:
            self.residency.idle_check()
        except RuntimeError as error:
            self._unsound = f"the adapters' memory is not sound: {error}; restart the server"
            self.health()

    def mark_deleted(self, digest: str) -> None:
        """Give back the memory of a bundle that was deleted, once no request uses it."""
        self.residency.forget(digest)

    async def pin(self, digest: str) -> None:
        """Bring an adapter to the device and keep it there; raises CannotPin, or why it cannot be loaded."""
        await asyncio.wrap_future(self.residency.pin(digest))

    def unpin(self, digest: str) -> None:
        """Let an adapter leave the device again. Idempotent."""
        self.residency.unpin(digest)

    def in_flight(self) -> int:
        """How many requests are under way, waiting or running."""
        return self._reception.inside()

    def waiting(self) -> int:
        """How many sequences, and parts of classifications, wait for their turn."""
        return self._reception.waiting()

    def running(self) -> int:
        """How many of these are in a batch."""
        return self._reception.running()

    def stats(self) -> ResidencyStats:
        """Figures of the adapters' memory."""
        return self.residency.stats()

    async def generate(self, params: GenerateParams) -> GenerationStream:
        """Let a request wait for its turn and for its adapter, and put it into the batch.

        Every refusal is raised here, before the first delta.

        Raises:
            UnsupportedTask: An encoder base, or a classifier adapter.
            PromptTooLong: Prompt and new tokens exceed the context.
            InvalidRequest: An empty prompt, or a token id outside the vocabulary.
            TenantOverloaded: The tenant has too many requests under way.
            Overloaded: All tenants together have, or the request did not get its turn in time.
            DeadlineExceeded: `params.timeout_s` was over before it got its turn.
            EngineUnavailable: The engine is not running.
            StoreError: The adapter does not exist, or does not fit the base.
        """
        self.health()
        if self._generating is None:
            raise UnsupportedTask("this base is an encoder; it serves classify, not generate", param="adapter")
        return await self._generating.generate(params)

    async def classify(
        self, adapter: str, inputs: list[str], priority: Priority = "normal", timeout_s: float | None = None
    ) -> ClassifyResult:
        """Classify each input with the adapter's head; priority and timeout are those of `GenerateParams`.

        Raises:
            UnsupportedTask: The adapter has no head.
            InvalidRequest: An input has no tokens.
            TenantOverloaded, Overloaded, DeadlineExceeded, EngineUnavailable, StoreError: As in `generate`.
        """
        self.health()
        return await self._inputs.classify(adapter, inputs, priority, timeout_s)

    def _load_bundle(self, digest: str) -> AdapterBundle:
        bundle = self.store.load(digest)
        check_base(bundle.config, self.base.info, self._shapes)
        return bundle
