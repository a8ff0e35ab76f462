"""The masks of constraints: which tokens may come next, computed by threads of their own while the model runs.

A usual mask takes 0.01 to 0.1 ms. With 128,000 tokens an ordinary regular expression may take 2 ms, for each request
and each token, and a hostile grammar 40 ms. So a step waits for masks no longer than half of the time that it has taken
itself. A request whose mask is not ready then gets its token in a later step, with the mask that is under way.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sera_serve.engine.constraint import TokenConstraint
from sera_serve.engine.request import GenerationRequest
from sera_serve.errors import ConstraintUnsatisfiable, EngineUnavailable, InvalidRequest, Overloaded, TenantOverloaded
from sera_serve.threads import BoundedExecutor

logger = logging.getLogger("sera_serve.engine")

# Of the time that a step has taken, and at least.
_PATIENCE = 0.5
_LEAST_PATIENCE_S = 0.001
# A step that would give no token at all waits for its first mask.
_PATIENCE_ALONE_S = 0.05
# How long the end waits for masks under way.
_LAST_MASKS_S = 1.0


@dataclass(frozen=True)
class RowMasks:
    """The constraints of a step's requests.

    Attributes:
        allowed: Of requests with a constraint: the tokens that it allows next, as of `allowed_tokens`.
        failures: Requests that get no token for a reason of their own, with what their clients are told.
        postponed: Requests that get their token in a later step, because their masks are not ready.
    """

    allowed: dict[GenerationRequest, NDArray[np.uint32]] = field(default_factory=dict)
    failures: dict[GenerationRequest, Exception] = field(default_factory=dict)
    postponed: set[GenerationRequest] = field(default_factory=set)


@dataclass(eq=False)
class _Job:
    """The next mask of a request.

    Attributes:
        request: Nothing else reads or changes its constraint until the mask is taken.
        is_started: A thread computes it, or has.
        is_left: The request has left the batch while a thread computed.
        allowed: The mask, once it is there.
        error: Why there is none.
    """

    request: GenerationRequest
    is_started: bool = False
    is_left: bool = False
    allowed: NDArray[np.uint32] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.allowed is not None or self.error is not None


class MaskThreads:
    """Computes masks for one loop, whose thread alone calls the methods.

    Tenants take turns, and a tenant's requests go in the order of their arrival. One tenant's masks leave a thread to
    the others'.

    Locking: `_changed` guards all fields, and what a job says of itself. No mask is computed under it.
    """

    def __init__(self, vocabulary: int, threads: int = 0) -> None:
        """Start no thread yet.

        Args:
            vocabulary: Number of the logits.
            threads: 0 is half of the machine's cores, from 2 to 8.
        """
        self._vocabulary = vocabulary
        self._most_threads = threads or max(2, min(8, (os.cpu_count() or 1) // 2))
        # A thread that has just found nothing to compute may still count as busy there when it is asked for again.
        self._executor = BoundedExecutor("masks", self._most_threads, max_waiting=self._most_threads)
        self._changed = threading.Condition()
        self._jobs: dict[GenerationRequest, _Job] = {}
        # What waits for a thread, by tenant; the next tenant first.
        self._waiting: dict[str, deque[_Job]] = {}
        # Threads by tenant, and all of them.
        self._working: Counter[str] = Counter()
        self._threads = 0
        self._lacks_threads = self._closed = False
        # Of the step under way: when it began, and whether no request of it gets a token without a mask.
        self._step_began = 0.0
        self._all_wait = False

    def start(self) -> None:
        """Start the first thread: masks come from now on, however many threads the system refuses later.

        Raises:
            Overloaded: No thread can be started.
        """
        self._executor.submit(lambda: None)

    def begin(self, requests: Iterable[GenerationRequest]) -> None:
        """Begin a step that gives these requests a token, and the masks of those that have a constraint."""
        self._step_began, self._all_wait = time.monotonic(), True
        new = []
        with self._changed:
            for request in requests:
                if request.constraint is None:
                    self._all_wait = False
                elif (job := self._jobs.get(request)) is not None:
                    job.is_left = False
                else:
                    new.append(request)
            for request in sorted(new, key=lambda request: request.order):
                job = self._jobs[request] = _Job(request)
                self._waiting.setdefault(request.tenant, deque()).append(job)
            # Also for masks that found no thread before.
            waiting = sum(map(len, self._waiting.values()))
            starting = 0 if self._closed else min(self._most_threads - self._threads, waiting)
            self._threads += starting
        for started in range(starting):
            try:
                self._executor.submit(self._work)
            except (Overloaded, EngineUnavailable) as error:
                # The masks wait for the threads that there are, and for those of the next step.
                with self._changed:
                    self._threads -= starting - started
                if not self._lacks_threads:
                    logger.warning("masks of constraints come late: %s", error)
                self._lacks_threads = True
                return
            self._lacks_threads = False

    def take(self, requests: Sequence[GenerationRequest], wait_for_logits: Callable[[], object]) -> RowMasks:
        """The masks of a step's requests, which have a constraint each and have begun; waits for a while.

        Args:
            requests: Of the step under way.
            wait_for_logits: Waits until the device has computed what the masks are for.
        """
        masks = RowMasks()
        with self._changed:
            jobs = [self._jobs[request] for request in requests]
        if not all(job.is_done for job in jobs):
            wait_for_logits()
        patience = max(_LEAST_PATIENCE_S, _PATIENCE * (time.monotonic() - self._step_began))
        with self._changed:
            self._changed.wait_for(lambda: all(job.is_done for job in jobs), patience)
            if self._all_wait:
                left = max(0.0, _PATIENCE_ALONE_S - patience)
                self._changed.wait_for(lambda: any(job.is_done for job in jobs), left)
            for job in jobs:
                if not job.is_done:
                    masks.postponed.add(job.request)
                    continue
                del self._jobs[job.request]
                if job.error is not None:
                    masks.failures[job.request] = job.error
                elif job.allowed is not None:
                    masks.allowed[job.request] = job.allowed
        return masks

    def forget_left(self) -> None:
        """Drop what is held for requests that do not run any more."""
        with self._changed:
            for job in [job for job in self._jobs.values() if job.request.row < 0]:
                if job.is_started and not job.is_done:
                    # Two threads must not read one constraint: the job stays until it is done.
                    job.is_left = True
                    continue
                del self._jobs[job.request]
                if not job.is_started:
                    waiting = self._waiting[job.request.tenant]
                    waiting.remove(job)
                    if not waiting:
                        del self._waiting[job.request.tenant]

    def close(self) -> None:
        """Begin no mask any more, and wait for those under way.

        A step that outlasts the engine's patience may still run, and its requests leave.
        """
        with self._changed:
            self._closed = True
            # A process that ends within the library's code crashes. A mask that never ends must not keep it.
            self._changed.wait_for(lambda: not self._working, _LAST_MASKS_S)
        self._executor.close()

    def _work(self) -> None:
        """Compute masks until none waits."""
        while (job := self._next()) is not None:
            request, constraint = job.request, job.request.constraint
            allowed, error = None, None
            try:
                # It may have been finished meanwhile.
                if constraint is not None:
                    allowed = allowed_tokens(request, constraint, self._vocabulary)
            except Exception as failure:  # noqa: BLE001 - it is told to the one request whose constraint failed
                error = constraint_failed(request, failure)
            with self._changed:
                # Without the tenants that have none.
                self._working -= Counter([request.tenant])
                job.allowed, job.error = allowed, error
                if job.is_left or not job.is_done:
                    del self._jobs[request]
                self._changed.notify_all()
            # An error refers to this frame.
            del job, request, constraint, allowed, error

    def _next(self) -> _Job | None:
        with self._changed:
            share = max(1, self._most_threads - 1)
            tenant = next((tenant for tenant in self._waiting if self._working[tenant] < share), None)
            if tenant is None or self._closed:
                self._threads -= 1
                return None
            jobs = self._waiting.pop(tenant)
            job = jobs.popleft()
            if jobs:
                # After the other tenants.
                self._waiting[tenant] = jobs
            job.is_started = True
            self._working[tenant] += 1
            return job


def allowed_tokens(request: GenerationRequest, constraint: TokenConstraint, vocabulary: int) -> NDArray[np.uint32]:
    """uint32 (ceil(vocabulary / 32),): the tokens that a request's constraint allows next, as bits.

    Raises:
        ConstraintUnsatisfiable: There are none, or only end tokens before `min_tokens` tokens.
    """
    allowed = np.zeros(-(-vocabulary // 32), np.uint32)
    constraint.fill(allowed)
    if vocabulary % 32:
        allowed[-1] &= np.uint32((1 << vocabulary % 32) - 1)
    may_end = bool(allowed.any())
    if request.bars_end:
        for token in request.end_tokens | request.base_end_tokens:
            allowed[token // 32] &= ~np.uint32(1 << token % 32)
    if not allowed.any():
        if may_end:
            raise ends_too_early(request)
        raise ConstraintUnsatisfiable(
            f"the constraint allows no token of the vocabulary after {request.generated} tokens; "
            "loosen the schema, regex or grammar"
        )
    return allowed


def ends_too_early(request: GenerationRequest) -> ConstraintUnsatisfiable:
    """The error of a request whose constraint ends the text before `min_tokens` tokens."""
    return ConstraintUnsatisfiable(
        f"the constraint lets the text only end after {request.generated} tokens, and min_tokens is "
        f"{request.params.min_tokens}; lower min_tokens",
        param="min_tokens",
    )


def constraint_failed(request: GenerationRequest, error: Exception) -> Exception:
    """The error of a request whose constraint raised `error`."""
    if isinstance(error, InvalidRequest | TenantOverloaded):
        return error
    logger.error("the constraint of request %s failed", request.id, exc_info=error)
    return EngineUnavailable(f"the constraint failed: {error}")
