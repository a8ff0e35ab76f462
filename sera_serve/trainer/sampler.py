"""The order of training rows: random, of similar lengths in a batch, and the same again after a restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

_BATCHES_A_POOL = 50


class LengthGroupedOrder(Sampler[int]):
    """Row numbers for one epoch, a function of the seed and the epoch alone.

    transformers' own length-grouped sampler draws from the global generator when an epoch begins, so a run resumed
    within an epoch would see other batches than it saw before.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"order {self._seed} {self._epoch()}")
        order = list(range(len(self._lengths)))
        shuffle.shuffle(order)
        pool = self._batch_size * _BATCHES_A_POOL
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            batches += [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        # A short batch anywhere but last would shift the borders of those after it.
        short = [batch for batch in batches if len(batch) < self._batch_size]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        shuffle.shuffle(full)
        for batch in full + short:
            yield from batch
