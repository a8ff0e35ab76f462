"""Finds accesses to one memory that nothing orders: by two streams of a device, or by a stream and the host.

The host is an agent, and each stream is one. An agent has a clock: how far it knows each agent to be. A stream learns
what the host knows at each launch; an event carries what its stream knows, and who waits for it learns that. Of two
accesses to one byte, one of them a write, the later agent must know the earlier access. So it must of all accesses to
memory that has been given back, when the stream that had it takes memory again. All threads count as one host: that
finds less than there may be, and nothing that is in order.
"""

from __future__ import annotations

import bisect
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

HOST = 0
Clock = dict[int, int]
_OURS = ("sera_serve.", "sera_kernels.", "benchmarks.")


class Memory:
    """The last accesses to each byte of a storage.

    Attributes:
        owner: The agent whose allocations may use it when it is given back.
        name: For messages.
        writer: int8 (bytes,), the agent that wrote last, or -1.
        written: int32 (bytes,), when, by that agent's clock.
        read: By agent, int32 (bytes,), when it read last.
        operations: What each agent did when.
    """

    def __init__(self, tensor: Tensor, owner: int, name: str) -> None:
        self.begin, self.nbytes = _address(tensor), tensor.untyped_storage().nbytes()
        self.owner, self.name = owner, f"{name} ({self.nbytes} bytes)"
        self.writer = np.full(self.nbytes, -1, np.int8)
        self.written = np.zeros(self.nbytes, np.int32)
        self.read: dict[int, NDArray[np.int32]] = {}
        self.operations: dict[tuple[int, int], str] = {}

    def last_uses(self) -> Clock:
        """When each agent used any of it last."""
        uses = {agent: int(times.max()) for agent, times in self.read.items()}
        for agent in set(self.writer.tolist()) - {-1}:
            uses[agent] = max(uses.get(agent, 0), int(self.written[self.writer == agent].max()))
        return uses


class StreamOrder:
    """What is known of the order of all work.

    Attributes:
        clocks: By agent.
        found: What is not ordered, and how often.
        accesses: How many were checked.
    """

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {HOST: {HOST: 1}}
        self.found: Counter[str] = Counter()
        self.accesses = 0
        self._memories: dict[int, Memory] = {}
        # Their addresses, ascending.
        self._begins: list[int] = []
        # By owner: the agents and times that its next allocation must know of, and of what.
        self._given_back: dict[int, dict[int, tuple[int, str]]] = {}

    def begin(self, agent: int) -> None:
        """An agent begins another piece of work; a stream knows what the host does that launches it."""
        clock = self.clocks.setdefault(agent, {})
        if agent != HOST:
            _learn(clock, self.clocks[HOST])
        clock[agent] = clock.get(agent, 0) + 1

    def record(self, stream: int) -> Clock:
        """An event of a stream."""
        self.begin(stream)
        return dict(self.clocks[stream])

    def wait(self, agent: int, event: Clock) -> None:
        """An agent waits for an event."""
        if agent != HOST:
            self.begin(agent)
        _learn(self.clocks[agent], event)

    def wait_for_all(self) -> None:
        """The host waits for everything."""
        for clock in list(self.clocks.values()):
            _learn(self.clocks[HOST], clock)

    def know(self, tensor: Tensor, owner: int, name: str) -> None:
        """Watch a tensor's memory from now on, if it is not watched."""
        begin, nbytes = _address(tensor), tensor.untyped_storage().nbytes()
        known = self._memories.get(begin)
        if known is not None and known.nbytes == nbytes:
            return
        self._forget(begin)
        if nbytes:
            self._memories[begin] = Memory(tensor, owner, name)
            bisect.insort(self._begins, begin)

    def give_back(self, begin: int) -> None:
        """No tensor has the memory at an address any more."""
        memory = self._forget(begin)
        if memory is None or memory.owner == HOST:
            return
        due = self._given_back.setdefault(memory.owner, {})
        for agent, time in memory.last_uses().items():
            if agent not in (memory.owner, HOST) and time > due.get(agent, (0, ""))[0]:
                due[agent] = time, f"{memory.name}, used by {memory.operations[agent, time]}"

    def allocate(self, stream: int) -> None:
        """A stream takes memory: perhaps what was given back."""
        for agent, (time, what) in self._given_back.pop(stream, {}).items():
            if time > self.clocks[stream].get(agent, 0):
                self._tell(f"stream {stream} may take memory that stream {agent} uses: {what}")

    def access(self, agent: int, tensor: Tensor, writes: bool, operation: str) -> None:
        """An agent accesses all elements of a tensor."""
        memory = self._memories.get(_address(tensor))
        if memory is not None and memory.nbytes == tensor.untyped_storage().nbytes() and tensor.numel():
            self._access(agent, memory, lambda entries: _bytes_of(entries, tensor), writes, operation)

    def access_at(self, agent: int, addresses: NDArray[np.uint64], nbytes: int, writes: bool, operation: str) -> None:
        """An agent accesses elements of so many bytes at addresses of one tensor."""
        if not addresses.size:
            return
        first = int(addresses.flat[0])
        place = bisect.bisect_right(self._begins, first) - 1
        memory = None if place < 0 else self._memories[self._begins[place]]
        if memory is None or first >= memory.begin + memory.nbytes:
            return  # not watched
        at = addresses.reshape(-1, 1).astype(np.int64) - memory.begin + np.arange(nbytes)
        if at.min() < 0 or at.max() >= memory.nbytes:
            self._tell(f"{operation} accesses {memory.name} beyond its ends")
            return
        self._access(agent, memory, lambda entries: _Chosen(entries, at), writes, operation)

    def _access(
        self, agent: int, memory: Memory, of: Callable[[NDArray[np.generic]], _Entries], writes: bool, operation: str
    ) -> None:
        self.accesses += 1
        clock = self.clocks[agent]
        writer, written = of(memory.writer)[...], of(memory.written)[...]
        for other in set(np.unique(writer).tolist()) - {-1, agent}:
            late = written[(writer == other) & (written > clock.get(other, 0))]
            if late.size:
                self._conflict(memory, agent, writes, operation, other, int(late.max()), "wrote")
        if writes:
            for other, read in memory.read.items():
                latest = int(of(read)[...].max())
                if other != agent and latest > clock.get(other, 0):
                    self._conflict(memory, agent, writes, operation, other, latest, "read")
            of(memory.writer)[...], of(memory.written)[...] = agent, clock[agent]
        else:
            read = memory.read.setdefault(agent, np.zeros(memory.nbytes, np.int32))
            of(read)[...] = clock[agent]
        memory.operations[agent, clock[agent]] = operation

    def _conflict(
        self, memory: Memory, agent: int, writes: bool, operation: str, other: int, time: int, did: str
    ) -> None:
        self._tell(
            f"{memory.name}: {_named(agent)} {'writes' if writes else 'reads'} by {operation}, without waiting for "
            f"{_named(other)}, which {did} by {memory.operations[other, time]}"
        )

    def _tell(self, what: str) -> None:
        self.found[f"{place_of_ours()}: {what}"] += 1

    def _forget(self, begin: int) -> Memory | None:
        memory = self._memories.pop(begin, None)
        if memory is not None:
            self._begins.remove(begin)
        return memory


class _Chosen:
    """Some entries of an array, to read or to set by `[...]`."""

    def __init__(self, entries: NDArray[np.generic], at: NDArray[np.int64]) -> None:
        self._entries, self._at = entries, at

    def __getitem__(self, key: object) -> NDArray[np.generic]:
        return self._entries[self._at]

    def __setitem__(self, key: object, value: object) -> None:
        self._entries[self._at] = value


_Entries = NDArray[np.generic] | _Chosen


def place_of_ours() -> str:
    """The innermost line of the project that runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_globals['__name__']}, line {frame.f_lineno}"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(entries: NDArray[np.generic], tensor: Tensor) -> NDArray[np.generic]:
    """The entries of a tensor's bytes, of one entry for each byte of its storage."""
    size = tensor.element_size()
    strides = [stride * size * entries.itemsize for stride in tensor.stride()]
    begin = entries[tensor.storage_offset() * size :]
    return np.lib.stride_tricks.as_strided(begin, (*tensor.shape, size), (*strides, entries.itemsize))


def _learn(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(time, clock.get(agent, 0))


def _named(agent: int) -> str:
    return "the host" if agent == HOST else f"stream {agent}"
