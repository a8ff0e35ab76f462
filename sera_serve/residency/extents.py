"""Free room of the device pool, and where in it an adapter's pieces go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    """The holes of a pool. Not thread-safe: the caller holds a lock."""

    def __init__(self, elements: int) -> None:
        """All of a pool's `elements`, free."""
        self._holes = [Extent(0, elements)]

    @property
    def elements(self) -> int:
        """How many elements are free."""
        return sum(hole.length for hole in self._holes)

    def holes(self) -> list[Extent]:
        """The holes in ascending order, no two of them adjacent."""
        return list(self._holes)

    def take(self, pieces: Sequence[int]) -> tuple[Extent, ...] | None:
        """Room for `pieces` (see `place`), no longer free, or None."""
        taken = place(self._holes, pieces)
        if taken is None:
            return None
        lengths = {extent.start: extent.length for extent in taken}
        # A piece of room begins where its hole begins, so that one hole stays one hole.
        rests = (
            Extent(hole.start + lengths.get(hole.start, 0), hole.length - lengths.get(hole.start, 0))
            for hole in self._holes
        )
        self._holes = [rest for rest in rests if rest.length]
        return taken

    def give(self, extents: Iterable[Extent]) -> None:
        """Make `extents` free again."""
        self._holes = _coalesce([*self._holes, *extents])

    def would_take(self, pieces: Sequence[int], given: Iterable[Extent]) -> bool:
        """Whether `take` would find room once `given` were free too."""
        return place(_coalesce([*self._holes, *given]), pieces) is not None


def place(holes: Sequence[Extent], pieces: Sequence[int]) -> tuple[Extent, ...] | None:
    """Room for consecutive pieces: one extent if a hole is large enough, else as few as large holes allow.

    Fails only where the holes together have less than sum(pieces) + len(holes) * (max(pieces) - 1) elements: no hole
    is left with more than the next piece did not fit into.

    Args:
        holes: Extents, no two of them adjacent.
        pieces: Elements of each piece, above zero; a piece is never split.
    """
    wanted = sum(pieces)
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
        while placed < len(pieces) and length + pieces[placed] <= hole.length:
            length += pieces[placed]
            placed += 1
        if not length:
            return None
        chosen.append(Extent(hole.start, length))
        if placed == len(pieces):
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
