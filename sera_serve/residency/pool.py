"""The device pool: one buffer of adapter factors, its free extents, and the slots that point into it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels import ABSENT, AdapterTables, ShapeClasses
from sera_serve.residency.packing import NO_VECTORS, AdapterLayout, PackedAdapter, PackedHead
from sera_serve.residency.staging import StagingRing

logger = logging.getLogger("sera_serve.residency")
# Bytes that are copied within host memory in about 0.1 ms.
_COPIED_AT_ONCE = 1 << 20
# Of one check of the tables. A column of Llama-3-8B's modules has 11 KB.
_SLOTS_AT_ONCE = 512


@dataclass(frozen=True)
class Extent:
    """A contiguous run of pool elements."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """First element after the run."""
        return self.start + self.length


class FreeExtents:
    """The holes of a pool, first to last. Not thread-safe: the caller holds a lock."""

    def __init__(self, elements: int) -> None:
        """Begin with all `elements` of a pool free."""
        self._holes = [Extent(0, elements)]

    @property
    def elements(self) -> int:
        """How many elements are free."""
        return sum(hole.length for hole in self._holes)

    def holes(self) -> list[Extent]:
        """The holes in ascending order, no two of them adjacent."""
        return list(self._holes)

    def take(self, chunks: Sequence[int]) -> tuple[Extent, ...] | None:
        """Take room for `chunks` (see `place`), or return None."""
        taken = place(self._holes, chunks)
        if taken is None:
            return None
        lengths = {extent.start: extent.length for extent in taken}
        # What is taken begins where its hole begins, so that one hole stays one hole.
        rests = (
            Extent(hole.start + lengths.get(hole.start, 0), hole.length - lengths.get(hole.start, 0))
            for hole in self._holes
        )
        self._holes = [rest for rest in rests if rest.length]
        return taken

    def give(self, extents: Iterable[Extent]) -> None:
        """Make `extents` free again."""
        self._holes = _coalesce([*self._holes, *extents])

    def would_take(self, chunks: Sequence[int], given: Iterable[Extent]) -> bool:
        """Whether `take` would find room if `given` were free too."""
        return place(_coalesce([*self._holes, *given]), chunks) is not None


def place(holes: Sequence[Extent], chunks: Sequence[int]) -> tuple[Extent, ...] | None:
    """Choose room for consecutive chunks: one extent if a hole is large enough, else a few of the largest holes.

    Returns None only where the holes together have less than sum(chunks) + len(holes) * (max(chunks) - 1) elements:
    the rest of each hole is smaller than the chunk that comes next.

    Args:
        holes: Extents, no two of them adjacent.
        chunks: Elements of each chunk, above zero; a chunk is never split.
    """
    wanted = sum(chunks)
    if not wanted:
        return ()
    enough = [hole for hole in holes if hole.length >= wanted]
    if enough:
        return (Extent(min(enough, key=lambda hole: hole.length).start, wanted),)
    if sum(hole.length for hole in holes) < wanted:
        return None
    chosen = []
    placed = 0
    for hole in sorted(holes, key=lambda hole: hole.length, reverse=True):
        length = 0
        while placed < len(chunks) and length + chunks[placed] <= hole.length:
            length += chunks[placed]
            placed += 1
        if not length:
            return None
        chosen.append(Extent(hole.start, length))
        if placed == len(chunks):
            return tuple(chosen)
    return None


def _coalesce(extents: Iterable[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: extent.start):
        if merged and merged[-1].end == extent.start:
            merged[-1] = Extent(merged[-1].start, merged[-1].length + extent.length)
        else:
            merged.append(extent)
    return merged


class CopyStream:
    """One CUDA stream for everything that is written to the pool, so that writes keep their order; nothing on a CPU.

    Work on this stream and forward passes do not wait for each other. So a pass may read only what was written inside
    a `complete` block that has ended, and only memory that no pass reads may be written.
    """

    def __init__(self, device: torch.device) -> None:
        """Make a stream that begins after the work that the current stream already has."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def enqueue(self) -> AbstractContextManager[object]:
        """Put the device work of the block on this stream; nothing waits for it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def complete(self) -> Iterator[None]:
        """`enqueue`, and wait at the end of the block until the device has done the work; only this thread waits."""
        with self.enqueue():
            yield
        if self._stream is not None:
            # An event, because other threads may have put more work on the stream.
            self._stream.record_event().synchronize()


@dataclass(frozen=True)
class Placement:
    """An adapter's room in the pool: the slot that batches name it by, and the extents that hold its elements.

    Attributes:
        slot: Column of the adapter in the device tables.
        extents: Where consecutive parts of the packed run are; one extent, unless no hole was large enough.
        adapter: What the packed run holds.
    """

    slot: int
    extents: tuple[Extent, ...]
    adapter: AdapterLayout

    def locate(self, offset: int) -> int:
        """The element of the pool that holds element `offset` of the packed run."""
        for extent in self.extents:
            if offset < extent.length:
                return extent.start + offset
            offset -= extent.length
        raise ValueError(f"the adapter ends {offset} elements before that offset")


class DevicePool:
    """Fixed device memory that adapters are copied into, counted in true elements.

    An adapter is placed whole if a hole is large enough, and otherwise in as few extents of whole modules as the
    holes allow. So only free memory of less than one module a hole is of no use.

    The caller holds the lock of `AdapterResidency` around everything but `fill` and `head`. A forward pass reads
    `data` and `tables` without the lock, because only slots and elements that no pass uses are ever written.
    """

    def __init__(
        self, nbytes: int, modules: int, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Allocate the pool.

        Args:
            nbytes: Size of the buffer.
            modules: Rows of the tables: the base's adaptable layers.
            slots: The most adapters resident at once.
            dtype: The base's dtype.
            device: The base's device.
        """
        elements = max(1, nbytes // dtype.itemsize)
        self.data = torch.zeros(elements, dtype=dtype, device=device)
        self.tables = AdapterTables.empty(modules, slots, device)
        self.slots = slots
        self.copies = 0
        """Copies of factors made so far: one for each extent of each adapter filled."""
        self._copy_stream = CopyStream(self.data.device)
        self._staging = None if self.data.device.type == "cpu" else StagingRing(self.data.device)
        self._free = FreeExtents(elements)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._placed: dict[int, Placement] = {}
        # How many placed adapters have each set of kinds.
        self._classes: Counter[ShapeClasses] = Counter()
        self.tables.set_classes(ShapeClasses())
        # What was written to the tables, by slot, for adapters whose fill is complete.
        self._written: dict[int, NDArray[Any]] = {}
        # Where the next check of them goes on.
        self._looked_at = 0

    @property
    def capacity(self) -> int:
        """Elements of the whole pool."""
        return self.data.numel()

    @property
    def used(self) -> int:
        """Elements held by placed adapters."""
        return self.capacity - self._free.elements

    def placements(self) -> list[Placement]:
        """The room of every adapter, filled or not."""
        return list(self._placed.values())

    def reserve(self, adapter: AdapterLayout) -> Placement | None:
        """Reserve a slot and extents for an adapter, or return None where there is no room."""
        if not self._free_slots:
            return None
        extents = self._free.take(adapter.chunks)
        if extents is None:
            return None
        placement = Placement(self._free_slots.pop(), extents, adapter)
        self._placed[placement.slot] = placement
        self._count_classes(adapter, 1)
        return placement

    def would_fit(self, adapter: AdapterLayout, removed: Iterable[Placement]) -> bool:
        """Whether `reserve` would find room if these were removed."""
        removed = list(removed)
        if not self._free_slots and not removed:
            return False
        return self._free.would_take(adapter.chunks, [extent for p in removed for extent in p.extents])

    def room_beside(self, kept: Iterable[Placement]) -> list[Extent]:
        """The holes that there would be if all but these were removed."""
        taken = _coalesce(extent for p in kept for extent in p.extents)
        starts, ends = [0, *(extent.end for extent in taken)], [*(extent.start for extent in taken), self.capacity]
        return [Extent(start, end - start) for start, end in zip(starts, ends, strict=True) if start < end]

    def fills_at_once(self, adapter: PackedAdapter) -> bool:
        """Whether it takes less time to copy the adapter than to wake a thread for it."""
        return self.data.device.type == "cpu" and adapter.nbytes <= _COPIED_AT_ONCE

    def fill(self, placement: Placement, data: Tensor) -> None:
        """Copy an adapter to its reserved room, and write its slot in the tables; returns when the device has done so.

        It needs no lock, because no other thread uses the slot yet. The placement must not be removed meanwhile.

        Args:
            placement: What `reserve` gave.
            data: (elements,), the adapter's packed run.
        """
        columns = slot_columns(placement.adapter, self.tables.offset.shape[0], placement.locate)
        with self._copy_stream.complete():
            begin = 0
            for extent in placement.extents:
                self._copy(extent, data[begin : begin + extent.length])
                begin += extent.length
                self.copies += 1
            self._write(placement.slot, columns)
        self._written[placement.slot] = columns

    def remove(self, placement: Placement) -> None:
        """Free an adapter's slot and extents; no running pass may use them. Does not fail where the device does."""
        del self._placed[placement.slot]
        self._count_classes(placement.adapter, -1)
        self._written.pop(placement.slot, None)
        try:
            with self._copy_stream.enqueue():
                self.tables.clear(placement.slot)
        except RuntimeError:
            # Leases end where a device has failed too. No request uses the slot before `fill` has written it anew.
            logger.exception("slot %d could not be cleared", placement.slot)
        self._free_slots.append(placement.slot)
        self._free.give(placement.extents)

    def head(self, placement: Placement) -> list[tuple[Tensor, Tensor]]:
        """Views of the weight (d_out, d_in) and bias (d_out,) of each layer of a classifier's head, first to last."""
        head = placement.adapter.head
        if head is None:
            raise ValueError("this adapter has no head")
        return head_layers(self.data, head, placement.locate)

    def check_invariants(self) -> None:
        """Raise RuntimeError unless extents tile the pool, every slot is free or used once, and the tables match.

        Of the tables it looks at some slots, and at others in the next call. On a GPU it waits for the device.
        """
        # A copy made first: `fill` takes no lock, and an adapter whose fill ends meanwhile is not looked for.
        written = dict(self._written)
        extents = sorted(
            [*self._free.holes(), *(extent for p in self._placed.values() for extent in p.extents)],
            key=lambda extent: (extent.start, extent.length),
        )
        end = 0
        for extent in extents:
            if extent.start != end or extent.length < 1:
                raise RuntimeError(f"pool elements {end} to {extent.start} are lost or held twice")
            end = extent.end
        if end != self.capacity:
            raise RuntimeError(f"pool elements {end} to {self.capacity} are lost")
        for placement in self._placed.values():
            if sum(extent.length for extent in placement.extents) != placement.adapter.elements:
                raise RuntimeError(f"slot {placement.slot} has another length than its adapter")
        slots = [*self._free_slots, *self._placed]
        if sorted(slots) != list(range(self.slots)):
            raise RuntimeError("a slot is lost or held twice")
        if self.tables.classes != reduce(or_, (p.adapter.classes for p in self._placed.values()), ShapeClasses()):
            raise RuntimeError("the tables' summary of shapes is not that of the placed adapters")
        if not written.keys() <= self._placed.keys():
            raise RuntimeError("a removed adapter still counts as written to the tables")
        slots = list(written)
        begin = self._looked_at % max(1, len(slots))
        looked_at = [*slots[begin:], *slots[:begin]][:_SLOTS_AT_ONCE]
        self._looked_at = begin + len(looked_at)
        with self._copy_stream.complete():
            # Those that were freed last.
            free_offsets = self.tables.offset[:, self._free_slots[-_SLOTS_AT_ONCE:]].cpu()
            there = torch.stack([table[:, looked_at].double() for table in self.tables.tensors]).cpu().numpy()
        if (free_offsets != ABSENT).any():
            raise RuntimeError("a free slot still adapts something")
        for column, slot in enumerate(looked_at):
            if not np.array_equal(there[:, :, column], written[slot]):
                raise RuntimeError(f"slot {slot} does not point at its adapter")

    def _count_classes(self, adapter: AdapterLayout, change: int) -> None:
        """Count an adapter's kinds of shapes in or out. Kinds are counted from `reserve` on, before their use."""
        self._classes[adapter.classes] += change
        if not self._classes[adapter.classes]:
            del self._classes[adapter.classes]
        self.tables.set_classes(reduce(or_, self._classes, ShapeClasses()))

    def _copy(self, extent: Extent, part: Tensor) -> None:
        there = self.data[extent.start : extent.end]
        if self._staging is not None:
            self._staging.copy(there, part)
        else:
            # Not by torch: it would copy on several cores, with a pool of threads for each thread that calls it.
            there.view(torch.uint8).numpy()[:] = part.view(torch.uint8).numpy()

    def _write(self, slot: int, columns: NDArray[Any]) -> None:
        if self._staging is not None:
            there = torch.empty(columns.shape, dtype=torch.float64, device=self.data.device)
            self._staging.copy(there, torch.from_numpy(columns))
            for table, column in zip(self.tables.tensors, there, strict=True):
                table[:, slot].copy_(column)
            return
        # Through numpy: torch gives up the interpreter's lock for every copy, and then waits to get it back.
        for array, values in zip(self.tables.host_arrays, columns, strict=True):
            array[:, slot] = values


def slot_columns(adapter: AdapterLayout, modules: int, locate: Callable[[int], int]) -> NDArray[Any]:
    """float64 (tables, modules): a slot's column of every table, as one array, so that one small copy is enough.

    float64 holds every value exactly: scalings are rounded to float32 first, and offsets are below 2**53. `locate`
    gives the element of the pool that holds an element of the packed run.
    """
    columns = np.zeros((6, modules))
    columns[0] = columns[5] = ABSENT
    # As in empty tables: a module that is absent has one segment of rank 0.
    columns[2] = 1
    own = adapter.modules
    vectors = [ABSENT if at == NO_VECTORS else locate(at) for at in own["vectors"].tolist()]
    offsets = [locate(at) for at in own["offset"].tolist()]
    shapes = [own[name] for name in ("rank", "split", "use_mixer", "scaling")]
    columns[:, own["index"]] = np.array([offsets, *shapes, vectors])
    # A scaling beyond float32 becomes infinite here: the engine ends the requests of such an adapter.
    with np.errstate(over="ignore"):
        columns[4] = columns[4].astype(np.float32)
    return columns


def head_layers(data: Tensor, head: PackedHead, locate: Callable[[int], int]) -> list[tuple[Tensor, Tensor]]:
    """As `DevicePool.head`, of a pool's data (elements,); `locate` is as in `slot_columns`."""
    layers = []
    for layer in head.layers:
        weight, bias = locate(layer.weight_offset), locate(layer.bias_offset)
        matrix = data[weight : weight + layer.d_out * layer.d_in].view(layer.d_out, layer.d_in)
        layers.append((matrix, data[bias : bias + layer.d_out]))
    return layers
