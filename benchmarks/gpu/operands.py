"""Random adapters in pools and tables, and how many bytes a launch must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.setting import Grouped
from sera_kernels import ABSENT, AdapterBatch, AdapterTables


@dataclass(frozen=True)
class Member:
    """One member of the family: LoRA is split 1 without a mixer."""

    rank: int
    split: int
    mixer: bool = True

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"sera r={self.rank} split={self.split}" + ("" if self.mixer else " no mixer")

    def elements(self, d_in: int, d_out: int) -> int:
        """Stored elements of one module."""
        return (d_in + d_out) * self.rank // self.split + self.mixer * self.rank**2

    def fits(self, *widths: int) -> bool:
        """Whether the split divides all of the widths."""
        return not any(width % self.split for width in widths)


def mixed_pool(
    d_in: int, d_outs: Sequence[int], members: Sequence[Member], dtype: torch.dtype, device: torch.device, gap: int
) -> tuple[Tensor, AdapterTables]:
    """One slot for each member, in every module; each third one is absent from the second module.

    Another third have a gain and an offset. Between factors lie `gap` elements of NaN, so that reading past an end
    shows. Updates of inputs from a normal distribution have a standard deviation of about one.
    """
    tables = AdapterTables.empty(len(d_outs), len(members))
    chunks = [torch.full((gap,), torch.nan)]
    end = gap
    for slot, member in enumerate(members):
        for module, d_out in enumerate(d_outs):
            if module == 1 and slot % 3 == 1:
                continue
            segment_rank = member.rank // member.split
            fan_in = d_in / member.split * segment_rank * (member.rank if member.mixer else 1)
            chunks += [torch.randn(member.elements(d_in, d_out)), torch.full((gap,), torch.nan)]
            tables.offset[module, slot], end = end, end + member.elements(d_in, d_out) + gap
            tables.rank[module, slot], tables.split[module, slot] = member.rank, member.split
            tables.mixer[module, slot], tables.scaling[module, slot] = int(member.mixer), fan_in**-0.5
            if slot % 3 == 2:
                chunks += [1 + torch.randn(d_out) / 4, torch.randn(d_out) / 2, torch.full((gap,), torch.nan)]
                tables.vectors[module, slot], end = end, end + 2 * d_out + gap
    return torch.cat(chunks).to(device, dtype), moved(tables, device)


def behind(elements: int, pool: Tensor, tables: AdapterTables) -> tuple[Tensor, AdapterTables]:
    """The same adapters behind so many elements of NaN, as they are in a pool of thousands."""
    large = pool.new_full((elements + len(pool),), torch.nan)
    large[elements:] = pool
    offset, vectors = (torch.where(at == ABSENT, at, at + elements) for at in (tables.offset, tables.vectors))
    return large, replace(tables, offset=offset, vectors=vectors)


def moved(tables: AdapterTables, device: torch.device) -> AdapterTables:
    """The tables on another device."""
    return AdapterTables(*(table.to(device) for table in tables.tensors))


def uniform_pool(
    shapes: Sequence[tuple[int, int]], slots: int, member: Member, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, AdapterTables]:
    """`slots` adapters of one shape on modules of these (d_in, d_out), packed as the server packs them."""
    # A module's factors begin on a 16-byte boundary.
    sizes = torch.tensor([-(-member.elements(*shape) // 8) * 8 for shape in shapes], dtype=torch.int64)
    first = sizes.cumsum(0) - sizes
    total = int(sizes.sum())
    tables = AdapterTables.empty(len(shapes), slots, device)
    tables.offset.copy_(first[:, None] + total * torch.arange(slots)[None, :])
    tables.rank.fill_(member.rank)
    tables.split.fill_(member.split)
    tables.mixer.fill_(int(member.mixer))
    d_in, segment_rank = shapes[0][0], member.rank // member.split
    fan_in = d_in / member.split * segment_rank * (member.rank if member.mixer else 1)
    tables.scaling.fill_(0.05 * fan_in**-0.5)
    pool = torch.empty(total * slots, dtype=dtype, device=device).normal_()
    return pool, tables


def spread(tokens: int, adapters: int, device: torch.device) -> Tensor:
    """int32 (tokens,): a slot for each token, in runs of one adapter, every adapter equally often."""
    run = -(-tokens // adapters)
    return (torch.arange(tokens, device=device) // run).to(torch.int32)


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs of several launches, which rotate so that the cache holds none of them beforehand."""

    x: Tensor
    ys: list[Tensor]

    @classmethod
    def make(
        cls, sets: int, tokens: int, d_in: int, d_outs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Activations:
        """x (sets, tokens, d_in) and one y (sets, tokens, d_out) for each output."""
        make = [torch.randn(sets, tokens, width, dtype=dtype, device=device) for width in (d_in, *d_outs)]
        return cls(make[0], make[1:])


def sera_launch(
    operation: Grouped,
    activations: Activations,
    batch: AdapterBatch,
    pool: Tensor,
    tables: AdapterTables,
) -> Callable[[int], None]:
    """Launch i of the grouped operation: set i of the activations, with modules that no other set uses."""
    count = len(activations.ys)
    module_sets = tables.offset.shape[0] // count

    def launch(i: int) -> None:
        own = i % module_sets
        modules = range(own * count, (own + 1) * count)
        ys = [y[i % len(y)] for y in activations.ys]
        operation(activations.x[i % len(activations.x)], ys, modules, batch, pool, tables)

    return launch


def activation_bytes(tokens: int, d_in: int, d_outs: Sequence[int], itemsize: int) -> int:
    """x is read once, each output is read and written once."""
    return tokens * (d_in + 2 * sum(d_outs)) * itemsize


def factor_bytes(member: Member, adapters: int, d_in: int, d_outs: Sequence[int], itemsize: int) -> int:
    """Each distinct adapter's factors are read once."""
    return adapters * sum(member.elements(d_in, d_out) for d_out in d_outs) * itemsize
