"""Runs a fixed set of sequences through continuous batching and times it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch

from adapters_store import AdapterBundle
from sera_kernels import AdapterTables
from sera_serve.base import FrozenBase
from sera_serve.engine.continuous import ContinuousBatch
from sera_serve.engine.sequences import SequenceOptions, SequenceUpdate
from sera_serve.layers import AdapterContext, attach_serving, find_shared_inputs
from sera_serve.residency import AdapterResidency, DevicePool, HostCache


@dataclass(frozen=True)
class Run:
    """Outcome of one batch: tokens of each sequence, and the wall time of all."""

    outputs: list[list[int]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all sequences together."""
        return sum(map(len, self.outputs)) / self.seconds


class BatchDriver:
    """One engine over a base: bare, or with serving layers and adapters on the device."""

    def __init__(self, base: FrozenBase, adapters: list[AdapterBundle] | None, max_sequences: int) -> None:
        """Start an engine; with `adapters` None its model is the unmodified base."""
        self._done = threading.Event()
        self._outputs: dict[str, list[int]] = {}
        self._left = 0
        self._count = 0
        model = base.share_weights().model
        shapes = base.module_shapes()
        self._residency: AdapterResidency | None = None
        self.slots: list[int] = []
        context = AdapterContext(self._pool(base, 1).data, AdapterTables.empty(1, 1))
        if adapters is not None:
            pool = self._pool(base, sum(bundle.nbytes for bundle in adapters) * 2 + (1 << 20))
            context = AdapterContext(pool.data, pool.tables)
            attach_serving(model, context, find_shared_inputs(base.model))
            by_digest = {bundle.digest: bundle for bundle in adapters}
            index = {path: row for row, path in enumerate(shapes)}
            self._residency = AdapterResidency(by_digest.__getitem__, pool, HostCache(0), index)
            self.slots = [self._residency.acquire(bundle.digest).result().slot for bundle in adapters]
        self._batch = ContinuousBatch(
            model,
            context,
            self,
            kv_cache_tokens=max_sequences * 512,
            max_batch_tokens=4096,
            max_sequences=max_sequences,
            cpu_threads=torch.get_num_threads(),
        )
        self._batch.start()

    @staticmethod
    def _pool(base: FrozenBase, nbytes: int) -> DevicePool:
        return DevicePool(nbytes, len(base.module_shapes()), 64, base.dtype, base.device)

    def run(self, prompts: list[list[int]], slots: list[int], new_tokens: int) -> Run:
        """Submit all sequences at once and wait for the last one."""
        self._done.clear()
        self._outputs.clear()
        self._left = len(prompts)
        names = []
        start = time.perf_counter()
        for prompt, slot in zip(prompts, slots, strict=True):
            self._count += 1
            names.append(f"s{self._count}")
            self._batch.submit(names[-1], prompt, new_tokens, [], SequenceOptions(adapter_slot=slot))
        if not self._done.wait(600):
            raise TimeoutError(f"the engine did not finish: {self._batch.failure()}")
        seconds = time.perf_counter() - start
        return Run([self._outputs[name] for name in names], seconds)

    def close(self) -> None:
        """Stop the engine."""
        self._batch.stop()
        if self._residency is not None:
            self._residency.close()

    def on_update(self, update: SequenceUpdate) -> None:
        """On the engine's thread: keep the outcome, and wake `run` after the last."""
        if update.ended:
            self._outputs[update.request_id] = update.tokens
            self._left -= 1
            if not self._left:
                self._done.set()

    def on_prefix(self, request_id: str, cached_tokens: int) -> None:
        """Of no interest: a sequence without a key finds only what it has computed itself."""
