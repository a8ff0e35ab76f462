"""Runs a fixed set of requests through the engine's step loop and times it."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from adapters_store import AdapterBundle, ResolvedAdapter
from sera_kernels import AdapterTables
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.memory import DeviceMemory
from sera_serve.engine.request import BASE_PRINCIPAL, FinishReason, GenerationRequest
from sera_serve.engine.scheduler import Scheduler
from sera_serve.engine.tasks import GenerationRunner
from sera_serve.layers import AdapterContext, attach_serving, find_shared_inputs
from sera_serve.residency import AdapterResidency, DevicePool, HostCache


@dataclass(frozen=True)
class Run:
    """Outcome of one batch: tokens of each request, and the wall time of all."""

    outputs: list[list[int]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all requests together."""
        return sum(map(len, self.outputs)) / self.seconds


class BatchDriver:
    """One engine over a base: unmodified, or with serving layers and adapters on the device.

    An adapter is named by its place among `adapters`; None is the base model.
    """

    def __init__(
        self,
        base: FrozenBase,
        adapters: list[AdapterBundle] | None,
        max_sequences: int,
        kv_cache_tokens: int | None = None,
        max_batch_tokens: int = 4096,
    ) -> None:
        """Start an engine; with `adapters` None its model is the unmodified base."""
        self._done = threading.Event()
        self._left: set[int] = set()
        self.most_running = 0
        """The most requests that ran at a time, noted at each token."""
        served = base.share_weights()
        bundles = adapters or []
        pool = DevicePool(
            sum(bundle.nbytes for bundle in bundles) * 2 + (1 << 20),
            len(base.module_shapes()),
            max(64, len(bundles)),
            base.dtype,
            base.device,
        )
        index = {path: row for row, path in enumerate(base.module_shapes())}
        by_digest = {bundle.digest: nullcontext(bundle) for bundle in bundles}
        self._residency = AdapterResidency(by_digest.__getitem__, pool, HostCache(0), index)
        context = AdapterContext(pool.data, pool.tables if adapters is not None else AdapterTables.empty(1, 1))
        if adapters is not None:
            attach_serving(served.model, context, find_shared_inputs(base.model))
        self._adapters = [
            ResolvedAdapter(
                adapter=f"bench/a{number}",
                version=1,
                digest=bundle.digest,
                task=bundle.config.task,
                labels=None,
                base=bundle.config.base,
                max_length=None,
            )
            for number, bundle in enumerate(bundles)
        ]
        for bundle in bundles:
            self._residency.acquire(bundle.digest).result().release()
        settings = ServeSettings(
            kv_cache_tokens=kv_cache_tokens or max_sequences * 512,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
        scheduler = Scheduler(AdmissionController(1 << 20, 1 << 20), self._residency, 32)
        memory = DeviceMemory(settings, base.device)
        self.runner = GenerationRunner(served, context, scheduler, memory, settings)
        self.runner.start()

    def run(
        self,
        prompts: list[list[int]],
        adapters: list[int | None],
        new_tokens: int | list[int],
        asked: int | None = None,
        **fields: Any,
    ) -> Run:
        """Submit all requests at once and wait for the last one.

        Args:
            prompts: Tokens of each request.
            adapters: Adapter of each request.
            new_tokens: After how many new tokens each request ends.
            asked: How many it asks for: where more, its client ends it, as at a stop string. None: as many as it gets.
            fields: Those of `GenerationRequest`.
        """
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        requests = [
            GenerationRequest(
                principal=BASE_PRINCIPAL,
                id=f"s{number}",
                tokens=list(prompt),
                prompt_tokens=len(prompt),
                limit=len(prompt) + (asked or count),
                adapter=None if adapter is None else self._adapters[adapter],
                reader=_Client(self, number, count),
                **fields,
            )
            for number, (prompt, adapter, count) in enumerate(zip(prompts, adapters, counts, strict=True))
        ]
        for request in requests:
            request.reader.request = request  # type: ignore[union-attr]
        self._done.clear()
        self._left = set(range(len(requests)))
        start = time.perf_counter()
        self.runner.scheduler.submit(requests)
        if not self._done.wait(600):
            raise TimeoutError(f"the engine did not finish: {self.runner.failure()}")
        seconds = time.perf_counter() - start
        for request in requests:
            if request.error is not None:
                raise request.error
        outputs = [request.tokens[request.prompt_tokens :] for request in requests]
        return Run([output[:count] for output, count in zip(outputs, counts, strict=True)], seconds)

    def close(self) -> None:
        """Stop the engine."""
        self.runner.stop()
        self._residency.close()

    def finished(self, number: int) -> None:
        """On the engine's thread: one request is finished; wake `run` after the last."""
        self._left.discard(number)
        if not self._left:
            self._done.set()


class _Client:
    """Reader of one request: ends it when it has enough tokens, and notes its end."""

    request: GenerationRequest | None = None

    def __init__(self, driver: BatchDriver, number: int, count: int) -> None:
        self._driver, self._number, self._count = driver, number, count

    def notify(self) -> bool:
        """On the engine's thread, after each token."""
        request = self.request
        self._driver.most_running = max(self._driver.most_running, self._driver.runner.scheduler.running())
        if request is not None and request.is_finished:
            self._driver.finished(self._number)
        elif request is not None and len(request.tokens) == request.prompt_tokens + self._count:
            self._driver.runner.cancel(request, FinishReason.STOP)
        return True
