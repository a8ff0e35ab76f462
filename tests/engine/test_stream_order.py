"""What `support.stream_order` and `support.fake_gpu` find, and what they take for ordered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sera_kernels.norm import rms_norm
from sera_serve.engine.loop.captures import Captures
from sera_serve.layers import SideStream
from sera_serve.residency.staging import StagingRing
from support.fake_gpu import GPU, FakeGpu, fake_gpu
from support.stream_order import HOST, StreamOrder


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as gpu:
        yield gpu


def order_of(*agents: int) -> StreamOrder:
    order = StreamOrder()
    for agent in agents:
        order.begin(agent)
    return order


@pytest.mark.parametrize("first", [True, False], ids=["written first", "read first"])
@pytest.mark.parametrize("how", ["nothing", "event", "host", "event of an earlier time"])
def test_two_streams(first: bool, how: str) -> None:
    memory = torch.zeros(8)
    order = order_of(1, 2)
    order.know(memory, 1, "memory")
    early = order.record(1)
    order.begin(1)
    order.access(1, memory, first, "one")
    if how == "host":
        order.wait(HOST, order.record(1))
    elif how != "nothing":
        order.wait(2, order.record(1) if how == "event" else early)
    order.begin(2)
    order.access(2, memory[4:], not first, "two")
    assert bool(order.found) == (how in ("nothing", "event of an earlier time"))


def test_only_the_same_bytes_need_an_order() -> None:
    memory = torch.zeros(4, 4)
    order = order_of(1, 2)
    order.know(memory, 1, "memory")
    order.access(1, memory[:, 1], True, "one")
    order.access(2, memory[:, 2], True, "two")
    order.access_at(2, np.array([memory.data_ptr() + 8], np.uint64), 4, True, "two")
    assert order.found == {}
    order.access_at(2, np.array([memory.data_ptr() + 4], np.uint64), 1, False, "two")
    assert len(order.found) == 1


def test_two_reads_need_none_and_the_host_does() -> None:
    memory = torch.zeros(4)
    order = order_of(1, 2)
    order.know(memory, HOST, "memory")
    order.access(1, memory, False, "one")
    order.access(2, memory, False, "two")
    assert order.found == {}
    order.begin(HOST)
    order.access(HOST, memory, True, "the host")
    assert len(order.found) == 2


def test_memory_that_is_given_back() -> None:
    for waits in (False, True):
        memory = torch.zeros(4)
        order = order_of(1, 2)
        order.know(memory, 1, "memory")
        order.access(2, memory, False, "two")
        order.give_back(memory.data_ptr())
        if waits:
            order.wait(1, order.record(2))
        order.begin(1)
        order.allocate(1)
        assert bool(order.found) != waits


@pytest.mark.parametrize("what", ["nothing", "fork", "join"])
def test_side_stream_in_a_capture(gpu: FakeGpu, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a graph's branches, with a kernel's own reads and writes."""
    side = SideStream(GPU)
    x, weight = torch.ones(2, 64, device=GPU), torch.ones(64, device=GPU)
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    y = rms_norm(x, weight, 1e-5)
    with side.fork(torch.cuda.Event() if what == "fork" else side.mark()):
        z = rms_norm(y, weight, 1e-5)
    if what == "join":
        z.mul_(2)
        with pytest.raises(RuntimeError, match="has not come back"):
            graph.capture_end()
    else:
        side.join()
        z.mul_(2)
        graph.capture_end()
        x.mul_(0)
        graph.replay()
        assert z.tolist() == [[0] * 64] * 2
    found = [*gpu.found, *graph.order.found]
    assert bool(found) == (what != "nothing")
    assert all("_norm_kernel" in each for each in found)


def test_what_a_capture_refuses(gpu: FakeGpu) -> None:
    class Reads:
        def run(self) -> None:
            torch.ones(2, device=GPU).tolist()

    captures: Captures[int, Reads] = Captures(lambda key: Reads(), "a read")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captures.captured(1)


def test_staged_copies(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked buffers are filled again once the device has read them, and others may read the copy after a wait."""
    ring = StagingRing(GPU, chunk_bytes=16, chunks=2)
    source, target = torch.arange(32.0), torch.zeros(32, device=GPU)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ring.copy(target, source)
    assert gpu.found == {}
    assert target.tolist() == source.tolist()
    (early,) = gpu.found
    assert "reads by a read by the host" in early
    for event in ring._read:
        monkeypatch.setattr(event, "synchronize", lambda: None)
    with torch.cuda.stream(stream):
        ring.copy(target, source)
    assert any("the host writes by numpy" in each for each in gpu.found)


@pytest.mark.parametrize("waits", [True, False])
def test_results_of_the_device(gpu: FakeGpu, waits: bool) -> None:
    """A copy to page-locked memory is not waited for."""
    found = torch.zeros(4, pin_memory=True)
    found.copy_(torch.ones(4, device=GPU), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    if waits:
        done.synchronize()
    assert found.tolist() == [1] * 4
    assert [each for each in gpu.found if "the host reads by tolist" in each] == list(gpu.found)
    assert len(gpu.found) == (not waits)
