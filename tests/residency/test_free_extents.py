"""Where the chunks of an adapter go in the holes of a pool."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sera_serve.residency.pool import Extent, FreeExtents, place

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def holes_of(lengths: list[int]) -> list[Extent]:
    """Holes with a gap of one element between each two."""
    holes = []
    start = 0
    for length in lengths:
        holes.append(Extent(start, length))
        start += length + 1
    return holes


@given(SIZES, SIZES)
def test_placed_chunks_are_whole_and_inside_holes(lengths: list[int], chunks: list[int]) -> None:
    holes = holes_of(lengths)
    extents = place(holes, chunks)
    if extents is None:
        assert sum(lengths) < sum(chunks) + len(holes) * (max(chunks) - 1)
        return
    ends = {sum(chunks[: i + 1]) for i in range(len(chunks))}
    end = 0
    for extent in extents:
        assert any(hole.start == extent.start and extent.length <= hole.length for hole in holes)
        end += extent.length
        assert end in ends, "a chunk is split"
    assert end == sum(chunks)
    assert len({extent.start for extent in extents}) == len(extents)
    if max(lengths) >= sum(chunks):
        assert len(extents) == 1


def test_smallest_hole_that_is_large_enough_is_taken() -> None:
    assert place(holes_of([50, 9, 12, 10]), [4, 6]) == (Extent(74, 10),)


def test_chunks_that_fill_their_holes_are_placed() -> None:
    assert place(holes_of([5, 6]), [2, 4, 5]) == (Extent(6, 6), Extent(0, 5))


def test_nothing_to_place_takes_nothing() -> None:
    assert place([], []) == ()


@given(st.lists(SIZES, min_size=1, max_size=6), st.randoms())
def test_what_is_given_back_can_be_taken_again(adapters: list[list[int]], random: object) -> None:
    total = sum(map(sum, adapters))
    free = FreeExtents(total)
    taken = [free.take(chunks) for chunks in adapters]
    assert free.elements == 0
    assert free.take([1]) is None
    random.shuffle(taken)  # type: ignore[attr-defined]
    for i, extents in enumerate(taken):
        assert extents is not None
        rest = [extent for other in taken[i:] for extent in other or ()]
        assert free.would_take([total], rest)
        assert not free.would_take([total], rest[1:])
        free.give(extents)
    assert free.holes() == [Extent(0, total)]
