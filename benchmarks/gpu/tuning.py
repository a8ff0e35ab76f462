"""The search of `sera_kernels.tune` for launch parameters: what the shipped ones take on this GPU, and the best."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from benchmarks.gpu.setting import Row, SectionSkipped, Setting
from sera_kernels import tune
from sera_kernels.launches import Launch, choose_launch


def tune_kernel(setting: Setting) -> Iterator[Row]:
    """Microseconds of the layers of Llama-3-8B that `tune` measures: shipped, by variant, and the best.

    Raises:
        SectionSkipped: No GPU.
    """
    if not setting.on_gpu:
        raise SectionSkipped("launches are measured on a GPU only")
    shipped = choose_launch(torch.bfloat16, setting.device)
    for tokens, phases in ((tune.TOKENS, tune.DECODING), (tune.PROMPT_TOKENS, tune.PROMPT)):
        yield from _search(setting, tokens, phases, shipped)


def _search(setting: Setting, tokens: int, phases: Sequence[str], shipped: Launch) -> Iterator[Row]:
    """Rows of one number of tokens."""
    cases = [tune.operands(tokens, d_in, d_outs, torch.bfloat16) for d_in, d_outs in tune.SHAPES]
    began = time.monotonic()
    tune.run_all([launch for phase in phases for launch in tune.variants(shipped, phase)], cases)
    yield {"tokens": tokens, "compile_s": time.monotonic() - began}
    found: dict[Launch, float] = {}

    def microseconds(launch: Launch) -> float:
        found[launch] = float("inf") if setting.out_of_time() else tune.measure(launch, cases)
        return found[launch]

    best, us = tune.search(microseconds, shipped, phases)
    for launch, measured in found.items():
        yield {"tokens": tokens, "us": measured, **asdict(launch)}
    right = all(tune.is_right(best, case) for case in cases)
    figures = {"shipped_us": found[shipped], "best_us": us, "best_is_right": right, "best": str(asdict(best))}
    yield {"tokens": tokens, **figures}
