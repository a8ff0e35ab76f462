"""Which kinds of adapter shapes are resident, as far as launches depend on them. Known on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

RANK_BUCKETS = (16, 64, 256, 1024, 4096)
"""Lengths of a reduced vector that kernels are compiled for."""

MOST_RANK = RANK_BUCKETS[-1]
"""The largest rank of a layer. A program of the mixer holds a column of C at least, which has this many elements."""

OUTPUTS_PER_LAUNCH = 4
"""Number of layers of one launch. Further layers that share the input take further launches."""

MOST_SUMS_BYTES = 1 << 27
"""The most memory of the parts of the sums of one launch. One part may take more."""


def rank_bucket(rank: int) -> int:
    """Return the smallest length in `RANK_BUCKETS` that holds `rank`.

    Raises:
        ValueError: The rank is above `MOST_RANK`.
    """
    bucket = next((bucket for bucket in RANK_BUCKETS if rank <= bucket), None)
    if bucket is None:
        raise ValueError(f"rank {rank} is above {MOST_RANK}, the most that kernels are compiled for")
    return bucket


def workspace_bytes(tokens: int) -> int:
    """Return the most memory that one launch on a GPU takes for so many tokens, whatever the adapters' ranks.

    It has v, float32 (layers, tokens, rank bucket), and the parts of the sums, each of v's size: as many as
    `MOST_SUMS_BYTES` holds, and one at least.
    """
    v = OUTPUTS_PER_LAUNCH * tokens * MOST_RANK * 4
    return v + max(v, MOST_SUMS_BYTES)


@dataclass(frozen=True)
class ShapeClasses:
    """The kinds of shapes that occur, and the rank bucket of each kind. 0 stands for a kind that does not occur.

    Kernels are compiled and launched for the kinds that occur, so these numbers are a part of a CUDA graph's key. A
    larger bucket, or a kind more than what occurs, costs time and is right.

    Attributes:
        single: Segments of rank 1 (rank = split).
        segmented: Several segments of a higher rank.
        whole: One segment of a rank above 1, as in LoRA.
        vectors: Whether a layer has a gain and an offset: these take a launch of their own.
    """

    single: int = 0
    segmented: int = 0
    whole: int = 0
    vectors: bool = False

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, int]], vectors: bool = False) -> ShapeClasses:
        """Classify shapes, each of them (rank, split); `vectors` as in the attribute."""
        found = {"single": 0, "segmented": 0, "whole": 0}
        for rank, split in set(shapes):
            kind = "single" if rank == split else "whole" if split == 1 else "segmented"
            found[kind] = max(found[kind], rank_bucket(rank))
        return cls(**found, vectors=vectors)

    def __or__(self, other: ShapeClasses) -> ShapeClasses:
        """Return the kinds of both."""
        return ShapeClasses(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    @property
    def width(self) -> int:
        """The greatest bucket: the length of a reduced vector's row in a workspace. 0 without any adapter."""
        return max(self.single, self.segmented, self.whole)
