"""Copies through the page-locked buffers, on a CPU: what is copied, not when."""

from __future__ import annotations

import threading

import pytest
import torch

from sera_serve.residency.staging import StagingRing

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 1000])
def test_a_copy_larger_than_a_buffer_is_cut(dtype: torch.dtype, elements: int) -> None:
    ring = StagingRing(CPU, chunk_bytes=64, chunks=3)
    source = torch.randn(elements).to(dtype)
    there = torch.full((elements + 2,), 7, dtype=dtype)
    ring.copy(there[1:-1], source)
    assert torch.equal(there[1:-1], source) and there[0] == 7 and there[-1] == 7


def test_threads_that_copy_at_once_do_not_mix_their_parts() -> None:
    ring = StagingRing(CPU, chunk_bytes=256, chunks=2)
    sources = [torch.randn(5000) for _ in range(4)]
    targets = [torch.zeros(5000) for _ in sources]

    def work(number: int) -> None:
        for _ in range(20):
            targets[number].zero_()
            ring.copy(targets[number], sources[number])
            assert torch.equal(targets[number], sources[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
