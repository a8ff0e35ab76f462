"""Copies to the device that run beside the forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class CopyStream:
    """A CUDA stream of its own for everything written to the pool, so that writes keep their order; nothing on a CPU.

    Enqueued work does not wait for forward passes, nor they for it: a pass may only read what was written inside a
    `complete` block that has ended, and only memory that no pass reads may be written.
    """

    def __init__(self, device: torch.device) -> None:
        """Make a stream that begins after what the current one has been given."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def enqueue(self) -> AbstractContextManager[object]:
        """Device work inside the block goes to this stream; nothing waits for it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def complete(self) -> Iterator[None]:
        """`enqueue`, and the block ends when the device has done the work; only the calling thread waits."""
        with self.enqueue():
            yield
        if self._stream is not None:
            # An event, because the stream may have been given more by other threads.
            self._stream.record_event().synchronize()
