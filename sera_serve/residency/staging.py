"""Page-locked buffers between host memory and a GPU, allocated once.

A copy from page-locked memory runs beside the GPU's other work. But to page-lock memory takes milliseconds, during
which no thread of the process can launch anything: so adapters stay in ordinary memory, and pass through these buffers.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_CHUNK_BYTES = 4 << 20
_CHUNKS = 4


class StagingRing:
    """Buffers that copies to one device take in turn. Thread-safe."""

    def __init__(self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES, chunks: int = _CHUNKS) -> None:
        """Allocate the buffers.

        Args:
            device: Where copies go.
            chunk_bytes: Size of a buffer; larger copies are cut.
            chunks: How many buffers.
        """
        on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(chunks)]
        # When the device has read a buffer for the last time.
        self._read: list[torch.cuda.Event | None] = [torch.cuda.Event() if on_gpu else None for _ in range(chunks)]
        self._turn = 0
        self._lock = threading.Lock()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy, in the order of the current stream; `source` may be changed when this returns.

        Args:
            target: On the device, contiguous.
            source: On the host, contiguous, of the same dtype and number of elements.
        """
        there, here = (tensor.view(-1).view(torch.uint8) for tensor in (target, source))
        size = len(self._buffers[0])
        for begin in range(0, len(here), size):
            part = here[begin : begin + size]
            # The lock is held for one chunk: another thread's copies go between two chunks.
            with self._lock:
                self._turn = (self._turn + 1) % len(self._buffers)
                buffer, read = self._buffers[self._turn][: len(part)], self._read[self._turn]
                if read is not None:
                    read.synchronize()
                # Not by torch, which would copy on several cores.
                buffer.numpy()[:] = part.numpy()
                there[begin : begin + len(part)].copy_(buffer, non_blocking=True)
                if read is not None:
                    read.record()
