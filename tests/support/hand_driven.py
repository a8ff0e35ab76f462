"""An engine without threads: the test runs its loops, its loads and its event loop, one piece at a time.

What other threads may do within a step, a read or a copy, the test does there, by `HandDriven.meanwhile`. So every
order of events is chosen by the test, and comes again with the same choices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from adapters_store import AdapterBundle, AdapterStore, ResolvedAdapter
from adapters_store.errors import AdapterNotFound
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey, StaticLaunch
from sera_serve.engine.memory import DeviceMemory
from sera_serve.engine.tasks import ClassificationRunner, TaskRunner
from sera_serve.residency.loader import Job
from sera_serve.threads import BoundedExecutor
from support.graph_recorder import Replayed


class TimelessLoop(asyncio.SelectorEventLoop):
    """An event loop whose time the test sets, but for rests of milliseconds, which are over at once."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, **options: Any) -> Any:
        if delay <= 0.1:
            # `LoopTurns` rests for as long as the machine worked, however busy it is.
            return self.call_soon(callback, *args, **options)
        return super().call_later(delay, callback, *args, **options)

    def turn(self, rounds: int = 1000) -> bool:
        """Run what is ready, and what that makes ready, for so many rounds; whether there was anything."""
        for number in range(rounds):
            was_ready = bool(self._ready)  # type: ignore[attr-defined]
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return was_ready or number > 0
        assert rounds < 1000, "the event loop is never done"
        return True


class ByHandLoads:
    """In place of `LoaderThreads`: jobs run when the test says so, in an order of its choice."""

    def __init__(self, small_bytes: int) -> None:
        self.small_bytes = small_bytes
        self.jobs: list[Job] = []

    def submit(self, priority: int, work: Callable[[], None], owner: Any = None, nbytes: int = 0) -> Job:
        self.jobs.append(job := Job(work, nbytes, priority))
        return job

    def withdraw(self, job: Job) -> None:
        if job in self.jobs:
            self.jobs.remove(job)

    def close(self, timeout_s: float) -> None:
        pass


class FickleStore(AdapterStore):
    """A store whose bundles are deleted, come back, and cannot be read, as the test says."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gone: set[str] = set()
        self.failing: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def resolve(self, ref: str) -> ResolvedAdapter:
        resolved = super().resolve(ref)
        self._look(resolved.digest)
        return resolved

    def load(self, digest: str) -> AdapterBundle:
        self.check(digest)
        bundle = super().load(digest)
        self.meanwhile()
        return bundle

    @contextmanager
    def loading(self, digest: str) -> Iterator[AdapterBundle]:
        self.check(digest)
        with super().loading(digest) as bundle:
            self.meanwhile()
            yield bundle
            self.meanwhile()

    def check(self, digest: str) -> None:
        self._look(digest)
        if digest in self.failing:
            raise OSError("disk on fire")

    def _look(self, digest: str) -> None:
        if digest in self.gone:
            raise AdapterNotFound(f"bundle {digest} was deleted", param="adapter")


class LateSteps(Replayed):
    """Static steps of a device that does nothing until the host waits for it; nothing is recorded."""

    def __init__(self, by_hand: HandDriven) -> None:
        super().__init__(by_hand.engine, late=True)
        self._by_hand = by_hand

    def launch(self, batch: StaticBatch, ahead: int) -> StaticLaunch:
        launched = super().launch(batch, ahead)

        def waited() -> list[int]:
            self._by_hand.interrupt()
            tokens = launched.wait()
            self._by_hand.interrupt()
            self._by_hand.fail_if_due()
            return tokens

        return replace(launched, wait=waited)

    def _run(self, key: StaticKey) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._steps[key].run()


class HereExecutor:
    """In place of the threads of masks."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def close(self) -> None:
        pass


class _NoThread:
    """In place of a runner's thread."""

    def is_alive(self) -> bool:
        return True

    def join(self, timeout: float) -> None:
        pass


class HandDriven:
    """An engine, its event loop and its loads.

    Attributes:
        meanwhile: What other threads do within the next piece of work, once.
        fails: Whether the next step, or pass, fails.
        failures: Steps and passes that have failed.
    """

    def __init__(
        self,
        base: FrozenBase,
        store: FickleStore,
        patch: pytest.MonkeyPatch,
        *,
        pool_bytes: int,
        small_loads: bool,
        late: bool,
        **settings: Any,
    ) -> None:
        patch.setattr(DeviceMemory, "pool_bytes", lambda memory: pool_bytes)
        patch.setattr(BoundedExecutor, "run", _run_here)
        patch.setattr(BoundedExecutor, "run_in_turn", lambda self, owner, work, *args: _run_here(self, work, *args))
        self.meanwhile: Callable[[], None] | None = None
        self.fails, self.failures = False, 0
        self.store = store
        store.gone, store.failing, store.meanwhile = set(), set(), self.interrupt
        self.loop = TimelessLoop()
        self.engine = ServingEngine(base, store, ServeSettings(**settings))
        self.loads = ByHandLoads(1 << 30 if small_loads else 0)
        self.engine.residency._threads = self.loads  # type: ignore[assignment]
        self.engine.residency._placement._max_bypasses = 6
        self.generation = self.engine.runners["generate"]
        self.classification = self.engine.runners["classify"]
        for runner in self.engine.runners.values():
            runner._thread = _NoThread()  # type: ignore[assignment]
        self.late = LateSteps(self) if late else None
        # No thread decides when a mask is ready.
        self.generation.runner.chooser._masks._executor = HereExecutor()  # type: ignore[assignment]
        # A pass, a packed step, a choice and a copy take time too.
        pool, steps, passes = self.engine.residency.pool, self.generation.runner, self.classification
        patch.setattr(pool, "fill", partial(self._run_interrupted, pool.fill, False))
        for name in ("_run_packed", "_choose"):
            patch.setattr(steps, name, partial(self._run_interrupted, getattr(steps, name), True))
        assert isinstance(passes, ClassificationRunner)
        patch.setattr(passes, "_classify", partial(self._run_interrupted, passes._classify, True))

    def step(self, runner: TaskRunner[Any]) -> bool:
        """One round of a runner's loop; whether there was anything to run."""
        with torch.inference_mode():
            runner._take_news()
            runner.scheduler.in_step = True
            ran = runner.step()
            runner.scheduler.in_step = False
        return ran

    def load(self, number: int) -> None:
        """Run one of the jobs that wait, of those of the first priority."""
        jobs = self.loads.jobs
        first = [job for job in jobs if job.priority == min(job.priority for job in jobs)]
        job = first[number % len(first)]
        jobs.remove(job)
        job.work()

    def close(self) -> None:
        self.loop.turn()
        self.engine.stop()
        self.loop.close()

    def interrupt(self) -> None:
        """Do what other threads do now."""
        work, self.meanwhile = self.meanwhile, None
        if work is not None:
            # The other thread has modes of its own.
            with torch.inference_mode(False):
                work()

    def _run_interrupted(self, work: Callable[..., Any], may_fail: bool, *args: Any) -> Any:
        self.interrupt()
        result = work(*args)
        self.interrupt()
        if may_fail:
            self.fail_if_due()
        return result

    def fail_if_due(self) -> None:
        """Raise as a device that has failed."""
        if self.fails:
            self.fails = False
            self.failures += 1
            raise RuntimeError("an illegal memory access was encountered")

    def check(self) -> None:
        """Between two pieces of work: the parts agree on who holds what."""
        engine = self.engine
        engine.residency.check_invariants()
        requests = []
        for runner in engine.runners.values():
            runner.scheduler.check_invariants()
            scheduler = runner.scheduler
            requests += [*scheduler._queue.requests(), *scheduler._running]
            assert set(runner.in_batch()) == scheduler._running
        self.generation.planner.check_invariants()
        entries = engine.residency._table.entries.values()
        leases = sum(request.lease is not None for request in requests)
        assert engine.residency.leases() == leases, "a lease is held for nobody"
        assert sum(entry.hints for entry in entries) == sum(request.hint is not None for request in requests)
        loading = sum(request.loading is not None for request in requests)
        pins = sum(claims[None] for claims in (entry.claims for entry in entries))
        assert sum(len(entry.waiters) for entry in entries) == loading + pins

    def check_nothing_held(self) -> None:
        """After all calls: nothing is counted, queued, leased or in use; what is deleted leaves the memory."""
        engine, pages = self.engine, self.generation.planner.pages
        assert (engine.in_flight(), engine.waiting(), engine.running()) == (0, 0, 0)
        assert not engine._admission._by_tenant
        assert not any(runner._cancelled for runner in engine.runners.values())
        assert pages.available() == pages.count
        residency = engine.residency
        for digest in residency.digests():
            engine.mark_deleted(digest)
        assert (residency.pool.used, residency.host_cache.used, residency.digests()) == (0, 0, [])


async def _run_here(executor: BoundedExecutor, work: Callable[..., Any], *args: Any) -> Any:
    await asyncio.sleep(0)
    result = work(*args)
    await asyncio.sleep(0)
    return result
