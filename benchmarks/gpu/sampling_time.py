"""The choice of tokens at Llama-3's vocabulary: microseconds as a part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.sampling_check import CASES, vocabulary
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved
from sera_serve.engine.sampling import SamplingRows, choose_tokens, choose_tokens_torch

# torch's own way, for comparison: it sorts where tokens are limited.
_BY_TORCH = ("greedy", "sampled", "top_k 50, top_p 0.9")


def time_sampling(setting: Setting) -> Iterator[Row]:
    """Microseconds of one call by kind of limits, for 1 and 64 rows, and the bound of reading the logits once."""
    bandwidth = setting.figure("memory_bytes_per_s")
    launches = 2 if setting.small else 10
    for rows in (2,) if setting.small else (64, 1):
        bound = rows * vocabulary(setting) * torch.float32.itemsize / bandwidth * 1e6
        # torch's in graphs of their own, afterwards: what it cannot capture would end the section.
        for way, choose, names in (("kernel", choose_tokens, tuple(CASES)), ("torch", choose_tokens_torch, _BY_TORCH)):
            timed = {}
            for name in names:
                make, limits = CASES[name]
                timed[name] = Timed(partial(_choose, choose, make(setting, rows), limits(setting, rows)), launches)
            for name, us in interleaved(setting, timed).items():
                yield {"by": way, "case": name, "rows": rows, "us": us, "bound_us": bound}


def _choose(choose: Callable[..., Tensor], logits: Tensor, rows: SamplingRows | None, _: int) -> None:
    choose(logits, rows)
