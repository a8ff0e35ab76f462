"""The device pool: one buffer of adapter factors, its free extents, and the slots that point into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sera_kernels import AdapterTables
from sera_serve.residency.packing import PackedAdapter


@dataclass(frozen=True)
class Extent:
    """A contiguous run of pool elements."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """First element after the run."""
        return self.start + self.length


@dataclass(frozen=True)
class Placement:
    """An adapter in the pool: the slot that batches name it by, and the extent that holds it."""

    slot: int
    extent: Extent
    adapter: PackedAdapter


class DevicePool:
    """Fixed device memory that adapters are copied into, counted in true elements.

    The caller holds one lock around `reserve` and `remove`. Reading `data` and `tables` in a forward
    pass needs no lock, because only slots that no pass uses are ever written.
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
        self._free = [Extent(0, elements)]
        self._free_slots = list(range(slots - 1, -1, -1))
        self._placed: dict[int, Placement] = {}
        self._filled: set[int] = set()

    @property
    def capacity(self) -> int:
        """Elements of the whole pool."""
        return self.data.numel()

    @property
    def used(self) -> int:
        """Elements held by placed adapters."""
        return sum(placement.extent.length for placement in self._placed.values())

    def reserve(self, adapter: PackedAdapter) -> Placement | None:
        """Set a slot and an extent aside for an adapter, or return None where no free one is large enough."""
        length = adapter.data.numel()
        index = next((i for i, extent in enumerate(self._free) if extent.length >= length), None)
        if index is None or not self._free_slots:
            return None
        hole = self._free[index]
        extent = Extent(hole.start, length)
        rest = Extent(extent.end, hole.length - length)
        self._free[index : index + 1] = [rest] if rest.length else []
        placement = Placement(self._free_slots.pop(), extent, adapter)
        self._placed[placement.slot] = placement
        return placement

    def fill(self, placement: Placement) -> None:
        """Copy a reserved adapter in and point its slot at it; needs no lock, since nobody else knows the slot yet."""
        extent = placement.extent
        self.data[extent.start : extent.end].copy_(placement.adapter.data)
        self._write_tables(placement)
        self._filled.add(placement.slot)

    def remove(self, placement: Placement) -> None:
        """Free an adapter's slot and extent; no running pass may use it."""
        del self._placed[placement.slot]
        self._filled.discard(placement.slot)
        self.tables.clear(placement.slot)
        self._free_slots.append(placement.slot)
        self._free = _coalesce([*self._free, placement.extent])

    def head(self, placement: Placement) -> tuple[Tensor, Tensor]:
        """Views of a classifier's weight (labels, hidden) and bias (labels,)."""
        head = placement.adapter.head
        if head is None:
            raise ValueError("this adapter has no head")
        weight = placement.extent.start + head.weight_offset
        bias = placement.extent.start + head.bias_offset
        shape = (head.labels, head.hidden_size)
        return self.data[weight : weight + shape[0] * shape[1]].view(shape), self.data[bias : bias + head.labels]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless extents tile the pool, slots are all accounted for, and tables match."""
        extents = sorted(
            [*self._free, *(p.extent for p in self._placed.values())],
            key=lambda extent: (extent.start, extent.length),
        )
        end = 0
        for extent in extents:
            if extent.start != end:
                raise RuntimeError(f"pool elements {end} to {extent.start} are lost or held twice")
            end = extent.end
        if end != self.capacity:
            raise RuntimeError(f"pool elements {end} to {self.capacity} are lost")
        slots = [*self._free_slots, *self._placed]
        if sorted(slots) != list(range(self.tables.offset.shape[1])):
            raise RuntimeError("a slot is lost or held twice")
        if (self.tables.offset[:, self._free_slots] >= 0).any():
            raise RuntimeError("a free slot still adapts something")
        # A copy: a loader thread may finish a fill meanwhile, which takes no lock.
        for slot in tuple(self._filled):
            placement = self._placed[slot]
            for module in placement.adapter.modules:
                want = placement.extent.start + module.offset
                if self.tables.offset[module.index, placement.slot].item() != want:
                    raise RuntimeError(f"slot {placement.slot} does not point at its adapter")

    def _write_tables(self, placement: Placement) -> None:
        modules = placement.adapter.modules
        if not modules:
            return
        device = self.data.device
        rows = torch.tensor([module.index for module in modules], device=device)
        columns = [
            (self.tables.rank, [module.rank for module in modules]),
            (self.tables.split, [module.split for module in modules]),
            (self.tables.mixer, [int(module.use_mixer) for module in modules]),
            (self.tables.scaling, [module.scaling for module in modules]),
            (self.tables.offset, [placement.extent.start + module.offset for module in modules]),
        ]
        for table, values in columns:
            table[rows, placement.slot] = torch.tensor(values, dtype=table.dtype, device=device)


def _coalesce(extents: list[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: extent.start):
        if merged and merged[-1].end == extent.start:
            merged[-1] = Extent(merged[-1].start, merged[-1].length + extent.length)
        else:
            merged.append(extent)
    return merged
