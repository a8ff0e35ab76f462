"""Adapters in several extents: a forward pass reads the right elements wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from slow_store import Build, granted

from adapters_store import AdapterBundle
from sera_kernels import AdapterBatch, grouped_sera, grouped_sera_reference
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.residency import AdapterLayout, DevicePool, PackedAdapter, Placement, pack
from sera_serve.residency import pool as pool_module
from sera_serve.residency.pool import Extent, FreeExtents
from support.factories import random_adapter, with_hidden_layer, with_vectors


@pytest.fixture(scope="module")
def packed(base: FrozenBase, index: dict[str, int]) -> list[PackedAdapter]:
    """Four classifiers of one size, about 20 chunks each."""
    config = SeraConfig(8, 4, 8.0, "all-linear")
    bundles = [random_adapter(base, config, seed, labels=["a", "b", "c"]) for seed in range(4)]
    return [pack(bundle, index, torch.float32) for bundle in bundles]


def fill(pool: DevicePool, packed: PackedAdapter) -> Placement:
    placement = pool.reserve(packed.layout)
    assert placement is not None
    pool.fill(placement, packed.data)
    return placement


def read_back(pool: DevicePool, placement: Placement) -> torch.Tensor:
    return torch.cat([pool.data[extent.start : extent.end] for extent in placement.extents])


@pytest.fixture
def scattered(packed: list[PackedAdapter], index: dict[str, int]) -> tuple[DevicePool, Placement]:
    """A pool in which the fourth adapter lies where the first and the third were."""
    size = packed[0].layout.elements
    pool = DevicePool(4 * int(2.4 * size), len(index), 4, torch.float32)
    first, _, third = (fill(pool, adapter) for adapter in (_part(packed[0], 0.6), packed[1], _part(packed[2], 0.6)))
    pool.remove(first)
    pool.remove(third)
    return pool, fill(pool, packed[3])


def _part(packed: PackedAdapter, share: float) -> PackedAdapter:
    """The adapter's first modules."""
    modules = packed.layout.modules[: int(share * len(packed.layout.modules))]
    elements = int(packed.layout.modules[len(modules)]["offset"])
    layout = AdapterLayout(packed.digest, packed.layout.config, modules, None, elements)
    return PackedAdapter(layout, packed.data[:elements])


def test_adapter_that_fits_by_bytes_gets_in_by_several_extents(
    scattered: tuple[DevicePool, Placement], packed: list[PackedAdapter]
) -> None:
    pool, placement = scattered
    assert len(placement.extents) == 2
    assert pool.copies == 3 + 2
    assert torch.equal(read_back(pool, placement), packed[3].data)
    pool.check_invariants()


def test_the_room_beside_some_adapters_is_what_the_others_leave(scattered: tuple[DevicePool, Placement]) -> None:
    pool, last = scattered
    (other,) = (placement for placement in pool.placements() if placement is not last)
    assert pool.room_beside([last, other]) == pool._free.holes()
    beside_other = pool.room_beside([other])
    assert pool.room_beside([]) == [Extent(0, pool.capacity)]
    pool.remove(last)
    assert beside_other == pool._free.holes()


def test_every_module_is_read_from_its_own_extent(
    scattered: tuple[DevicePool, Placement], packed: list[PackedAdapter], base: FrozenBase
) -> None:
    pool, placement = scattered
    whole = DevicePool(packed[3].layout.elements * 4, pool.tables.offset.shape[0], 1, torch.float32)
    whole_slot = fill(whole, packed[3]).slot
    slots = [torch.full((3,), slot, dtype=torch.int32) for slot in (placement.slot, whole_slot)]
    for row, (d_in, d_out) in enumerate(base.module_shapes().values()):
        x = torch.randn(3, d_in)
        want, got = torch.zeros(3, d_out), torch.zeros(3, d_out)
        grouped_sera_reference(x, [want], [row], AdapterBatch(slots[1]), whole.data, whole.tables)
        grouped_sera(x, [got], [row], AdapterBatch(slots[0]), pool.data, pool.tables)
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


def test_head_is_read_from_its_own_extent(scattered: tuple[DevicePool, Placement], packed: list[PackedAdapter]) -> None:
    pool, placement = scattered
    head = packed[3].layout.head
    assert head is not None
    ((weight, bias),) = pool.head(placement)
    (layer,) = head.layers
    begin = layer.weight_offset
    assert torch.equal(weight.flatten(), packed[3].data[begin : begin + weight.numel()])
    assert torch.equal(bias, packed[3].data[layer.bias_offset : layer.bias_offset + layer.d_out])
    assert placement.locate(layer.weight_offset) != placement.extents[0].start + layer.weight_offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_and_hidden_layers_are_read_from_their_own_extents(
    dtype: torch.dtype, base: FrozenBase, index: dict[str, int]
) -> None:
    bundle = random_adapter(base, SeraConfig(8, 4, 8.0, "all-linear"), 7, labels=["a", "b", "c"])
    # Some modules have one of the two vectors alone.
    bundle = with_vectors(bundle, gain=("q_proj", "up_proj"), offset=("q_proj", "down_proj"))
    bundle = with_hidden_layer(bundle, "gelu", 10)
    packed = pack(bundle, index, dtype)
    pool = DevicePool(4 * packed.layout.elements * dtype.itemsize, len(index), 3, dtype)
    chunks = packed.layout.chunks
    cut = next(cut for cut in range(len(chunks)) if 2 * sum(chunks[:cut]) > sum(chunks))
    sizes = [sum(chunks[:cut]), sum(chunks[cut:])]
    held = [Extent(sizes[0], 64), Extent(sizes[0] + 64 + sizes[1], pool.capacity - sum(sizes) - 64)]
    # Two holes that the adapter fits in together: the rest is taken.
    pool._free = FreeExtents(pool.capacity)
    pool._free._holes = [Extent(0, sizes[0]), Extent(held[0].end, sizes[1])]
    placement = fill(pool, packed)
    assert len(placement.extents) == 2
    tensors = bundle.tensors
    seen = set()
    for path, spec in bundle.config.modules.items():
        (entry,) = pool.tables.entries(index[path], [placement.slot])
        vectors = entry.gain_and_offset(pool.data, spec.d_out)
        if vectors is None:
            assert not (spec.has_gain or spec.has_offset)
            continue
        seen.add((spec.has_gain, spec.has_offset))
        gain = tensors.get(f"{path}.gain", torch.ones(spec.d_out))
        assert torch.equal(vectors[0], gain.to(dtype))
        assert torch.equal(vectors[1], tensors.get(f"{path}.offset", torch.zeros(spec.d_out)).to(dtype))
    assert seen == {(True, True), (True, False), (False, True)}
    names = ["head.dense.weight", "head.dense.bias", "head.weight", "head.bias"]
    parts = [part for layer in pool.head(placement) for part in layer]
    assert all(torch.equal(part, tensors[name].to(dtype)) for part, name in zip(parts, names, strict=True))
    pool._free.give(held)
    pool.check_invariants()
    pool.tables.vectors[index["model.layers.0.self_attn.q_proj"], placement.slot] += 1
    with pytest.raises(RuntimeError, match="does not point at its adapter"):
        pool.check_invariants()


def test_wrong_table_is_noticed(scattered: tuple[DevicePool, Placement]) -> None:
    pool, placement = scattered
    pool.tables.split[0, placement.slot] += 1
    with pytest.raises(RuntimeError, match=f"slot {placement.slot} does not point at its adapter"):
        pool.check_invariants()


@pytest.mark.parametrize("which", range(4))
def test_checks_look_at_all_tables_in_turn(
    which: int, packed: list[PackedAdapter], index: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_SLOTS_AT_ONCE", 2)
    pool = DevicePool(4 * 5 * packed[0].layout.elements, len(index), 6, torch.float32)
    placements = [fill(pool, adapter) for adapter in packed]
    pool.tables.rank[1, placements[which].slot] += 1
    found = []
    for _ in range(4):
        try:
            pool.check_invariants()
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append("")
    assert found.count("") == 2
    assert found.count(f"slot {placements[which].slot} does not point at its adapter") == 2
    pool.tables.rank[1, placements[which].slot] -= 1
    # Those that are placed change: none is left out.
    pool.remove(placements[which])
    for _ in range(3):
        pool.check_invariants()


def test_free_slot_that_adapts_something_is_noticed(scattered: tuple[DevicePool, Placement]) -> None:
    pool, placement = scattered
    pool.remove(placement)
    pool.check_invariants()
    pool.tables.offset[0, placement.slot] = 8
    with pytest.raises(RuntimeError, match="free slot"):
        pool.check_invariants()


def test_lease_is_granted_only_when_the_device_has_the_adapter(
    build: Build, large: list[str], bundles: dict[str, AdapterBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    residency = build(room=4)
    enqueued, done = threading.Event(), threading.Event()

    class SlowDevice:
        """Takes work, and does not end a block that waits for it before `done`."""

        @contextmanager
        def enqueue(self) -> Iterator[None]:
            yield

        @contextmanager
        def complete(self) -> Iterator[None]:
            yield
            enqueued.set()
            assert done.wait(30)

    monkeypatch.setattr(residency.pool, "_copy_stream", SlowDevice())
    future = residency.acquire(large[0])
    assert enqueued.wait(10)
    assert not future.done()
    assert residency.resident_digests() == []
    done.set()
    granted(future).release()
