"""The device of `support.fake_gpu`: its streams, events, graphs and launches, and what they do in which order."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from support import other_device
from support.device_waits import waits
from support.other_device import Elsewhere, TwoDevices
from support.stream_order import HOST, Clock, StreamOrder, place_of_ours

GPU = torch.device("cuda", 0)
# Operations that take a tensor for its shape alone.
_NEW = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")


class Stream:
    """In place of `torch.cuda.Stream`."""

    device, device_index = GPU, 0

    def __init__(self, gpu: FakeGpu) -> None:
        gpu.streams += 1
        self.agent, self._gpu = gpu.streams, gpu

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._gpu)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        with self._gpu.lock:
            self._gpu.order.wait(self.agent, event.clock)
        if self._gpu.graph is not None:
            self._gpu.graph.calls.append(_Wait(self.agent, event))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.clock: Clock = {}
        self._gpu = gpu

    def record(self, stream: Stream | None = None) -> None:
        agent = (stream or self._gpu.stream).agent
        with self._gpu.lock:
            self.clock = self._gpu.order.record(agent)
        if self._gpu.graph is not None:
            self._gpu.graph.calls.append(_Record(agent, self))

    def synchronize(self) -> None:
        self._gpu.refuse_in_capture("waiting for an event")
        with self._gpu.lock:
            self._gpu.order.wait(HOST, self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@dataclass(frozen=True)
class _Operation:
    """In a graph: an operation of torch, with the tensors of its capture."""

    agent: int
    function: Any
    args: Any
    kwargs: Any
    results: Any

    def run(self) -> None:
        """Compute it again, into the same memory."""
        again = self.function(*self.args, **self.kwargs)
        if self.function._schema.is_mutable:
            return
        read = {_storage(tensor) for tensor in _tensors((self.args, self.kwargs))}
        for old, new in zip(_tensors(self.results), _tensors(again), strict=True):
            # A view needs no work: its memory is written by what it is a view of.
            if _storage(old) not in read:
                old.copy_(new)


@dataclass(frozen=True)
class _Launch:
    """In a graph: a kernel's launch."""

    agent: int
    tensors: list[Tensor]
    name: str
    run: Callable[[], None]


@dataclass(frozen=True)
class _Record:
    """In a graph: a stream records an event."""

    agent: int
    event: Event


@dataclass(frozen=True)
class _Wait:
    """In a graph: a stream waits for an event."""

    agent: int
    event: Event


@dataclass(frozen=True)
class _Gone:
    """In a graph: its memory at an address is free for other work of the graph."""

    storage: int


class Graph:
    """In place of `torch.cuda.CUDAGraph`.

    Its work has an order of its own, which is that of its capture; it is looked at in each replay anew, because what
    kernels read depends on the contents of the buffers. To the rest it is work of one stream.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        self.order = StreamOrder()
        self.calls: list[_Operation | _Launch | _Record | _Wait | _Gone] = []
        self._gpu = gpu

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert self._gpu.graph is None
        self._gpu.graph = self
        self._stream = self._gpu.stream.agent
        self.order.begin(self._stream)

    def capture_end(self) -> None:
        assert self._gpu.graph is self
        self._gpu.graph = None
        clock = self.order.clocks[self._stream]
        for agent, own in self.order.clocks.items():
            if agent != HOST and own[agent] > clock.get(agent, 0):
                raise RuntimeError(f"stream {agent} has not come back to the capture")
        self._gpu.graphs.append(self)

    def replay(self) -> None:
        gpu, order = self._gpu, self.order
        clocks: dict[Event, Clock] = {}
        with gpu.lock:
            # One replay comes after the other.
            order.wait_for_all()
        with _disable_current_modes():
            for call in self.calls:
                if isinstance(call, _Operation):
                    gpu.note(call, order, call.agent, replays=True)
                    gpu.note(call, gpu.order, gpu.stream.agent, replays=True)
                    call.run()
                elif isinstance(call, _Launch):
                    gpu.run_kernel(call, [(order, call.agent), (gpu.order, gpu.stream.agent)])
                else:
                    with gpu.lock:
                        if isinstance(call, _Record):
                            clocks[call.event] = order.record(call.agent)
                        elif isinstance(call, _Wait):
                            order.wait(call.agent, clocks.get(call.event, {}))
                        else:
                            order.give_back(call.storage)


class FakeGpu:
    """The device.

    Attributes:
        graphs: What was captured.
        launches: Kernels that ran, by name.
        streams: How many there are.
        lock: Around everything that is known of the order.
    """

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.launches: Counter[str] = Counter()
        self.streams = 0
        self.lock = threading.RLock()
        self._order = StreamOrder()
        self._thread = threading.local()
        self._default = Stream(self)
        # The interpreter keeps a program's place in the grid for the whole process.
        self._one_kernel = threading.Lock()
        # By address of a storage: its tensors, its owner, and where it was made.
        self._count: Counter[int] = Counter()
        self._owner: dict[int, int] = {}
        self._made: dict[int, str] = {}
        self._tensors: dict[int, weakref.ref[Tensor]] = {}
        # Page-locked memory stays, as torch's does while it may be in use.
        self._pinned: dict[int, Tensor] = {}

    @property
    def found(self) -> Counter[str]:
        """What is not ordered."""
        return sum((graph.order.found for graph in self.graphs), self._order.found)

    @property
    def stream(self) -> Stream:
        """This thread's stream."""
        return getattr(self._thread, "stream", self._default)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    @property
    def graph(self) -> Graph | None:
        """What this thread captures."""
        return getattr(self._thread, "graph", None)

    @graph.setter
    def graph(self, graph: Graph | None) -> None:
        self._thread.graph = graph

    @property
    def order(self) -> StreamOrder:
        """The order that this thread's work is in: the graph's that it captures, or that of all."""
        return self._order if self.graph is None else self.graph.order

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self.stream = self.stream, stream or self.stream
        try:
            yield
        finally:
            self.stream = before

    def synchronize(self, device: object = None) -> None:
        """`torch.cuda.synchronize`."""
        self.refuse_in_capture("waiting for the device")
        with self.lock:
            self._order.wait_for_all()

    def refuse_in_capture(self, what: str) -> None:
        """Raise as CUDA does."""
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def watch_waits(self, mode: str | int) -> None:
        """`torch.cuda.set_sync_debug_mode`, of this thread."""
        self._thread.watches = mode == "error"

    def compute(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation of torch where its tensors are."""
        if function is torch.ops.aten._flash_attention_forward.default:
            result = _flash_attention(*args, **kwargs)
        else:
            result = other_device.compute(function, args, kwargs)
        is_wait = waits(function, args, kwargs, result) and not self._only_begins(function, args)
        if is_wait:
            self.refuse_in_capture(str(function))
            if getattr(self._thread, "watches", False):
                raise RuntimeError(f"called a synchronizing CUDA operation: {function}")
        tensors = _tensors((args, kwargs, result))
        is_shaped_by_device = function.__name__.startswith(_NEW) and not isinstance(result, Elsewhere)
        is_there = any(isinstance(tensor, Elsewhere) for tensor in tensors) and not is_shaped_by_device
        agent = self.stream.agent if is_there else HOST
        call = _Operation(agent, function, *_inner((args, kwargs, result)))
        if is_there:
            if self.graph is not None:
                if not all(isinstance(tensor, Elsewhere) or _storage(tensor) in self._pinned for tensor in tensors):
                    self.refuse_in_capture(f"{function} with memory of the host that is not page-locked")
                self.graph.calls.append(call)
            self.note(call, self.order, agent)
            if is_wait:
                with self.lock:
                    self.order.wait(HOST, self.order.clocks[agent])
        elif any(_storage(tensor) in self._pinned for tensor in tensors):
            self.note(call, self._order, HOST)
        return result

    def _only_begins(self, function: Any, args: Any) -> bool:
        """Whether an operation is a copy to page-locked memory that the host does not wait for."""
        return function is torch.ops.aten.copy_.default and args[2:] == (True,) and _storage(args[0]) in self._pinned

    def note(self, call: _Operation, order: StreamOrder, agent: int, *, replays: bool = False) -> None:
        """Note what an operation reads and writes."""
        function, schema = call.function, call.function._schema
        name = str(function)
        if not schema.is_mutable and any(value.alias_info is not None for value in schema.returns):
            return  # a view
        with self.lock:
            order.begin(agent)
            read = set()
            for i, argument in enumerate(schema.arguments):
                value = call.args[i] if i < len(call.args) else call.kwargs.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(value):
                    read.add(_storage(tensor))
                    if writes or not function.__name__.startswith(_NEW):
                        self._watch(tensor, order)
                        order.access(agent, tensor, writes, name)
            for tensor in _tensors(call.results):
                storage = _storage(tensor)
                if storage in read or agent == HOST:
                    continue
                order.allocate(agent)
                if not replays:
                    self._owner[storage] = agent
                    self._made[storage] = f"{name} in {place_of_ours()}"
                self._watch(tensor, order)
                if "empty" not in name:
                    order.access(agent, tensor, True, name)

    def _watch(self, tensor: Tensor, order: StreamOrder) -> None:
        storage = _storage(tensor)
        if storage in self._pinned:
            order.know(tensor, HOST, f"page-locked memory of {self._made[storage]}")
        elif order is not self._order or storage in self._count:
            # Memory that a graph has for itself is that of no tensor any more.
            owner = self._owner.get(storage, self._default.agent)
            order.know(tensor, owner, f"memory of {self._made.get(storage, 'the base')}")

    def read_by_host(self, tensor: Elsewhere) -> None:
        """The host reads a tensor of the device, and waits for it."""
        self.refuse_in_capture("a read by the host")
        with self.lock:
            agent = self.stream.agent
            self.order.begin(agent)
            self._watch(tensor.inner, self.order)
            self.order.access(agent, tensor.inner, False, "a read by the host")
            self.order.wait(HOST, self.order.clocks[agent])

    def accessed_by_host(self, tensor: Tensor, writes: bool, operation: str) -> None:
        """The host has a tensor of its own, page-locked memory perhaps."""
        if _storage(tensor) in self._pinned:
            with self.lock:
                self._order.begin(HOST)
                self._watch(tensor, self._order)
                self._order.access(HOST, tensor, writes, operation)

    def pin(self, tensor: Tensor) -> Tensor:
        """Let a tensor be of page-locked memory."""
        self._made[_storage(tensor)] = place_of_ours()
        self._pinned[_storage(tensor)] = tensor
        return tensor

    def launch(self, kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], run: Callable[..., None]) -> None:
        """Run a Triton kernel."""
        if not all(isinstance(tensor, Elsewhere) for tensor in _tensors((args, kwargs))):
            raise TwoDevices(f"{kernel.__name__} has a tensor of the host")
        args, kwargs = _inner((args, kwargs))
        agent = self.stream.agent
        call = _Launch(agent, _tensors((args, kwargs)), kernel.__name__, partial(run, kernel, *args, **kwargs))
        if self.graph is not None:
            self.graph.calls.append(call)
        self.run_kernel(call, [(self.order, agent)])

    def run_kernel(self, call: _Launch, orders: list[tuple[StreamOrder, int]]) -> None:
        """Run a kernel; what it accesses has a place in each of these orders, the one of its graph first."""
        with self.lock:
            for order, agent in orders:
                order.begin(agent)
                for tensor in call.tensors:
                    self._watch(tensor, order)
        with self._one_kernel, _disable_current_modes(), torch.no_grad():
            self._accesses = orders, call.name
            call.run()
        self.launches[call.name] += 1

    def accessed_by_kernel(self, pointers: Any, mask: Any, nbytes: int, writes: bool) -> None:
        """The kernel that runs accesses elements."""
        orders, name = self._accesses
        addresses = pointers[np.broadcast_to(mask, pointers.shape)]
        with self.lock:
            for order, agent in orders:
                order.access_at(agent, addresses, nbytes, writes, name)

    def count(self, tensor: Elsewhere) -> None:
        """A tensor of the device has come; its memory is given back when the last one of it has gone."""
        number, storage = id(tensor), _storage(tensor.inner)

        def gone(_: object) -> None:
            with self.lock:
                del self._tensors[number]
                self._count[storage] -= 1
                if not self._count[storage]:
                    del self._count[storage]
                    if self.graph is not None:
                        self.graph.calls.append(_Gone(storage))
                    for order in {self.order, self._order}:
                        order.give_back(storage)

        with self.lock:
            self._count[storage] += 1
            self._tensors[number] = weakref.ref(tensor, gone)


def _inner(tree: Any) -> Any:
    """The same of the CPU."""

    def on_cpu(value: Any) -> Any:
        if isinstance(value, Elsewhere):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    return tree_map(on_cpu, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return (tensor.inner if isinstance(tensor, Elsewhere) else tensor).untyped_storage().data_ptr()


def _flash_attention(
    query: Elsewhere,
    key: Elsewhere,
    value: Elsewhere,
    query_ends: Elsewhere,
    key_ends: Elsewhere,
    most_queries: int,
    most_keys: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Elsewhere, ...]:
    """What torch has for CUDA alone: the last key of each sequence stands beside its last query."""
    outputs = []
    ends = [each.inner.tolist() for each in (query_ends, key_ends)]
    for i in range(len(ends[0]) - 1):
        q = query.inner[ends[0][i] : ends[0][i + 1]].float()
        k, v = (x.inner[ends[1][i] : ends[1][i + 1]].float() for x in (key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (behind >= 0) & ((window_size_left < 0) | (behind <= window_size_left))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    # The other four are for the backward pass.
    return (Elsewhere(torch.cat(outputs).to(query.dtype)), *(Elsewhere(torch.empty(0)) for _ in range(4)))
