"""The order of training rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

_BATCHES_A_POOL = 50


class LengthGroupedOrder(Sampler[int]):
    """The order of training rows: random, with similar lengths in a batch, and the same after a restart.

    The order depends on the seed and the epoch only. transformers' own length-grouped sampler draws from the global
    generator when an epoch begins, so a run that resumes within an epoch would get different batches.
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
        # The short batch goes last; elsewhere it would shift the borders of later batches.
        short = [batch for batch in batches if len(batch) < self._batch_size]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        shuffle.shuffle(full)
        for batch in full + short:
            yield from batch
