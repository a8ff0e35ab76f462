"""What every task runner is: requests come in, a thread runs them in steps, and each request ends once."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from sera_serve.engine.request import FinishReason, Request, Task
from sera_serve.engine.scheduler import Scheduler
from sera_serve.errors import EngineUnavailable

logger = logging.getLogger("sera_serve.engine")
_STOP_SECONDS = 30

R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class RunnerLoad:
    """What a runner has to do at one moment.

    Attributes:
        waiting: Requests that wait for their turn.
        running: Requests in the batch.
        preemptions: Requests that were put out of the batch so far, to be computed again.
        cache_pages: Pages of keys and values, in use and in all; both 0 where the task has no cache.
    """

    waiting: int
    running: int
    preemptions: int = 0
    cache_pages: tuple[int, int] = (0, 0)


class TaskRunner(ABC, Generic[R]):
    """Runs the requests of one task, on a thread of its own. The engine has one for each task, and knows no more.

    The loop takes news from other threads (cancellations), then runs one step, then hands on what the step gave. A
    request that runs is finished by the loop alone, between two steps.
    """

    task: Task

    def __init__(self, scheduler: Scheduler[R], device: torch.device, cpu_threads: int) -> None:
        """Set up without starting.

        Args:
            scheduler: This runner's own from now on.
            device: Where its steps run.
            cpu_threads: Threads of a forward pass on a CPU; 0 is as many as torch has here.
        """
        self.scheduler = scheduler
        self._cpu_threads = cpu_threads or torch.get_num_threads()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A deque needs no lock for one end each.
        self._cancelled: deque[tuple[R, FinishReason, Exception | None]] = deque()
        self._wake = threading.Event()
        scheduler.wake = self._wake.set
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"sera-{self.task}", daemon=True)

    @abstractmethod
    def step(self) -> bool:
        """Run one step; whether there was anything to run. Raises only where the runner cannot go on."""

    @abstractmethod
    def in_batch(self) -> list[R]:
        """The requests in the batch."""

    @abstractmethod
    def remove(self, request: R) -> None:
        """Take a running request out of the batch; between two steps."""

    def device_bytes(self) -> dict[str, int]:
        """Device memory that this runner keeps, by what it is for."""
        return {}

    def settle(self) -> None:
        """Wait until no step runs on the device. A runner whose steps have ended when they return has nothing to do."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step under way; the requests that wait or run end with an error."""
        self._stopping = True
        self.scheduler.close()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def failure(self) -> str | None:
        """Why the runner cannot serve, or None while it can."""
        if self._failure is not None:
            return self._failure
        return None if self._thread.is_alive() else f"the {self.task} thread is not running"

    def load(self) -> RunnerLoad:
        """What there is to do."""
        return RunnerLoad(self.scheduler.waiting(), self.scheduler.running())

    def cancel(self, request: R, reason: FinishReason, error: Exception | None = None) -> None:
        """Finish a request: at once if it waits, before the next step if it runs. Idempotent; any thread."""
        self.cancel_all([request], reason, error)

    def cancel_all(self, requests: Sequence[R], reason: FinishReason, error: Exception | None = None) -> None:
        """`cancel`, for several requests."""
        for request in self.scheduler.cancel_waiting(requests, reason, error):
            self._cancelled.append((request, reason, error))
            self._wake.set()

    def end(self, request: R, reason: FinishReason, error: Exception | None = None) -> None:
        """Finish a running request; the loop's thread, between two steps."""
        self.remove(request)
        self.scheduler.finish(request, reason, error)

    def on_stream(self) -> AbstractContextManager[object]:
        """Within the block, this thread's work on a GPU is in the order of the runner's own stream.

        The runners' streams and the one that copies adapters are not ordered among each other: adapters are leased only
        once the host has seen that they are on the device, and leases end only once the host has seen that the steps
        with them have ended. Nothing else is shared and written.
        """
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _run(self) -> None:
        # torch keeps the number by thread.
        torch.set_num_threads(self._cpu_threads)
        try:
            with torch.inference_mode(), self.on_stream():
                while not self._stopping:
                    self._wake.clear()
                    self._take_news()
                    self.scheduler.in_step = True
                    ran = self.step()
                    self.scheduler.in_step = False
                    if not ran:
                        self._wake.wait()
        except Exception as error:
            self._failure = f"the engine stopped on an error: {error}"
            logger.exception("the %s loop stopped", self.task)
        finally:
            self.scheduler.close()
            self.settle()
            for request in self.in_batch():
                self.end(request, FinishReason.FAILED, EngineUnavailable(self._failure or "the engine is stopping"))

    def _take_news(self) -> None:
        while self._cancelled:
            request, reason, error = self._cancelled.popleft()
            # It may have ended, or been preempted, since.
            if not self.scheduler.cancel(request, reason, error):
                self.end(request, reason, error)
