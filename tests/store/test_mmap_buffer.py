"""Memory outside malloc's heaps."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch

from adapters_store import reused_memory, writable_memory


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


def address(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def test_a_buffer_is_used_again_after_its_last_view() -> None:
    memory = reused_memory(5_000_001)
    first = address(memory)
    assert len(memory) == 5_000_001 and not memory.readonly
    view = torch.frombuffer(memory, dtype=torch.uint8, offset=1)[1::2]
    del memory
    assert address(others := reused_memory(5_000_001)) != first, "a view of it is still there"
    view.fill_(7)
    assert bytes(others[:4]) == bytes(4)
    del view
    again = reused_memory(4_900_000)
    assert (address(again), len(again)) == (first, 4_900_000)


def test_a_buffer_too_large_is_left_to_others() -> None:
    # As many as are kept.
    large = [reused_memory(8 << 20) for _ in range(4)]
    kept = {address(memory) for memory in large}
    del large
    small = reused_memory(7 << 20)
    assert address(small) not in kept
    assert address(reused_memory(8 << 20)) in kept


def test_few_buffers_are_kept() -> None:
    process = psutil.Process()
    bytearray(b"x" * (1 << 24))
    blocks = [reused_memory(4 << 20) for _ in range(32)] + [reused_memory(64 << 20)]
    for block in blocks:
        block[:] = b"x" * len(block)
    before = process.memory_info().rss
    del blocks, block
    assert before - process.memory_info().rss > 0.9 * (192 - 16) * (1 << 20)


def test_threads_never_share_a_buffer() -> None:
    def write(number: int) -> bool:
        for _ in range(200):
            memory = reused_memory(200_000 + number)
            memory[:] = bytes([number]) * len(memory)
            time.sleep(0)
            if memory != bytes([number]) * len(memory):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write, range(8)))
