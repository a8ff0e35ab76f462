"""Memory outside malloc's heaps."""

from __future__ import annotations

import psutil
import pytest

from adapters_store import writable_memory


@pytest.mark.parametrize("nbytes", [0, 1, (128 << 10) - 1, 128 << 10, 5_000_001])
def test_it_is_zero_and_writable(nbytes: int) -> None:
    memory = writable_memory(nbytes)
    assert len(memory) == nbytes and not memory.readonly
    assert memory == bytes(nbytes)
    memory[:] = b"\xff" * nbytes
    assert memory == b"\xff" * nbytes


def test_what_is_dropped_goes_back_to_the_system() -> None:
    process = psutil.Process()
    # After this malloc takes such blocks from its heap.
    bytearray(b"x" * (1 << 24))
    blocks = [writable_memory(1 << 19) for _ in range(64)]
    for block in blocks:
        block[:] = b"x" * len(block)
    before = process.memory_info().rss
    # Every other one, so that what stays lies between.
    del blocks[::2], block
    assert before - process.memory_info().rss > 0.9 * 32 * (1 << 19)
