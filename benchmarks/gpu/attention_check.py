"""Attention on pages of keys and values against float64: decodes by the kernel, and whole steps with prefills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.setting import Row, Setting
from sera_kernels import paged_attention
from sera_serve.engine.loop.attention import KeyValuePool, LayerShape, Part, StepContext, attend
from sera_serve.engine.loop.attention_backend import AttentionOptions, choose_backend
from sera_serve.engine.loop.pages import PAGE_SIZE

# Largest error of an element, relative to its size plus the root mean square of its head's output: outputs over many
# keys are small. To leave out one key of 8,192 is an error of 0.07.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
# Prompts with a softcap or sinks are computed by single operations, which round the scores as well.
ROUNDED_SCORES = 3
LENGTHS = (1, 33, 512, 300, 129, 64, 1, 700)


@dataclass(frozen=True)
class Shape:
    """One layer's attention, as in `paged_decode`; the value width is the key width where it is 0."""

    heads: int
    kv_heads: int
    width: int
    value_width: int = 0
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    splits: int | None = None
    spare_pages: int = 0

    @property
    def values(self) -> int:
        """Width of a value."""
        return self.value_width or self.width

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of attention that are no tensors."""
        return {"scale": self.width**-0.5, "window": self.window, "softcap": self.softcap}


LLAMA = Shape(32, 8, 128)
DECODES: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "llama-3-8b": (LLAMA, LENGTHS * 8),
    "one long row": (LLAMA, (8192,)),
    "split in 5, wide table": (replace(LLAMA, splits=5, spare_pages=20), LENGTHS),
    "width 64": (Shape(14, 2, 64), LENGTHS),
    "width 80": (Shape(8, 8, 80), LENGTHS),
    "width 96, sinks": (Shape(24, 8, 96, has_sinks=True, splits=2), LENGTHS),
    "width 256, softcap, window": (Shape(8, 4, 256, softcap=50.0, window=100), LENGTHS),
    "widths 192 and 128": (Shape(16, 1, 192, 128), LENGTHS),
    "window of 37, split in 3": (Shape(16, 4, 128, window=37, splits=3), LENGTHS),
    "float16": (replace(LLAMA, dtype=torch.float16), LENGTHS),
    "float32": (Shape(8, 2, 128, dtype=torch.float32), LENGTHS),
    "float32, width 64, window": (Shape(8, 2, 64, dtype=torch.float32, window=50), LENGTHS),
}
SMALL_DECODES = {
    "small": (Shape(4, 2, 16, dtype=torch.float32), (1, 33, 40)),
    "small, split in 2, window": (Shape(4, 2, 16, dtype=torch.float32, splits=2, window=20), (40, 5)),
}
# Parts of a step: kind, new tokens of each sequence, keys of each sequence.
Parts = tuple[tuple[str, int, tuple[int, ...]], ...]
MIXED: Parts = (
    ("decode", 1, (5, 40, 300)),
    ("fresh", 70, (70, 70)),
    ("fresh", 1, (1,)),
    ("cached", 33, (97,)),
    ("cached", 1, (64,)),
    ("cached", 129, (500,)),
)
STEPS: dict[str, tuple[Shape, Parts]] = {
    "llama-3-8b, mixed": (LLAMA, MIXED),
    "fresh alone": (LLAMA, (("fresh", 300, (300, 300)), ("fresh", 513, (513,)))),
    "chunks of one token": (LLAMA, (("cached", 1, (65,)), ("cached", 1, (33,)))),
    "width 64, window": (Shape(14, 2, 64, window=40), MIXED),
    "width 80": (Shape(8, 8, 80), MIXED),
    "width 256": (Shape(8, 2, 256), MIXED),
    "softcap, window": (Shape(8, 2, 64, window=40, softcap=20.0), MIXED),
    "sinks": (Shape(8, 2, 64, has_sinks=True), MIXED),
    "widths 192 and 128": (Shape(8, 8, 192, 128), MIXED),
    "float32": (Shape(8, 2, 64, dtype=torch.float32), MIXED),
}
SMALL_STEPS: dict[str, tuple[Shape, Parts]] = {
    "small": (Shape(4, 2, 16, dtype=torch.float32), (("decode", 1, (5, 40)), ("fresh", 7, (7,)), ("cached", 3, (37,))))
}


def check_attention(setting: Setting, part: str) -> Iterator[Row]:
    """One row for each case of a part, "decode" or "prefill", with `correct` and the largest error."""
    torch.manual_seed(0)
    if part == "decode":
        for name, decode in (SMALL_DECODES if setting.small else DECODES).items():
            yield {"case": name} | check_decode_case(setting.device, *decode)
        yield from _infinities(setting)
    else:
        for name, step in (SMALL_STEPS if setting.small else STEPS).items():
            yield {"case": name} | check_step_case(setting.device, *step)
        if setting.on_gpu:
            yield _hidden_infinity(setting.device)


def reference(q: Tensor, k: Tensor, v: Tensor, shape: Shape, sinks: Tensor | None) -> Tensor:
    """float64 (new, heads, value width): q (new, heads, width) are the last tokens of k and v (keys, kv_heads, _)."""
    groups = shape.heads // shape.kv_heads
    k, v = (states.double().repeat_interleave(groups, 1) for states in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.double(), k) * shape.width**-0.5
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    new, keys = scores.shape[1:]
    last = torch.arange(keys - new, keys, device=q.device)[:, None]
    at = torch.arange(keys, device=q.device)
    hidden = at > last
    if shape.window:
        hidden |= at <= last - shape.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, new, 1)], 2)
    return torch.einsum("hqt,thd->qhd", scores.softmax(2)[..., :keys], v)


def check_decode_case(device: torch.device, shape: Shape, lengths: tuple[int, ...]) -> Row:
    """Decodes over scattered pages, with NaN where no keys are; the result must be the same twice."""
    rows, pages = len(lengths), -(-max(lengths) // PAGE_SIZE) + shape.spare_pages
    make = _maker(device, shape.dtype)
    count = rows * pages + 1
    q = make(rows, shape.heads, shape.width)
    k = make(count, PAGE_SIZE, shape.kv_heads, shape.width).fill_(torch.nan)
    v = make(count, PAGE_SIZE, shape.kv_heads, shape.values).fill_(torch.nan)
    table = (torch.randperm(count - 1, device=device) + 1).view(rows, pages)
    sinks = make(shape.heads) if shape.has_sinks else None
    wants = []
    for row, length in enumerate(lengths):
        at = torch.arange(length, device=device)
        place = table[row, at // PAGE_SIZE], at % PAGE_SIZE
        k[place] = make(length, shape.kv_heads, shape.width)
        v[place] = make(length, shape.kv_heads, shape.values)
        wants.append(reference(q[row : row + 1], k[place], v[place], shape, sinks))
    on_device = torch.tensor(lengths, device=device)
    got, again = (
        paged_attention.paged_decode(q, k, v, table, on_device, sinks=sinks, splits=shape.splits, **shape.options)
        for _ in range(2)
    )
    # As in a static step, whose rows find their pages by the row of their request.
    owners = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device)
    options = {"sinks": sinks, "splits": shape.splits, **shape.options}
    owned = paged_attention.paged_decode(q, k, v, table.flip(0).int(), on_device, owners=owners, **options)
    found = _compared(got, torch.cat(wants), TOLERANCE[shape.dtype])
    return found | {"correct": found["correct"] and torch.equal(got, again) and torch.equal(got, owned)}


def check_step_case(device: torch.device, shape: Shape, parts: Parts) -> Row:
    """A step as the engine packs it: its keys and values are written to pages, then every part attends."""
    make = _maker(device, shape.dtype)
    pages = sum(-(-length // PAGE_SIZE) for _, _, lengths in parts for length in lengths)
    layer, backend = LayerShape(shape.kv_heads, shape.width, shape.values), choose_backend("auto", device)
    pool = KeyValuePool([layer], pages, shape.dtype, device, backend)
    flat = [states[0].flatten(0, 1) for states in (pool.keys, pool.values)]
    free = iter((torch.randperm(pages) + 1).tolist())
    sinks = make(shape.heads) if shape.has_sinks else None
    made, places, wants = [], [], []
    packed: tuple[list[Tensor], ...] = ([], [], [])
    for kind, new, lengths in parts:
        tables = []
        for length in lengths:
            own = [next(free) for _ in range(-(-length // PAGE_SIZE))]
            tables.append(own)
            at = np.arange(length)
            place = torch.tensor(np.array(own)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE, device=device)
            k, v = make(length, shape.kv_heads, shape.width), make(length, shape.kv_heads, shape.values)
            q, old = make(new, shape.heads, shape.width), length - new
            flat[0][place[:old]], flat[1][place[:old]] = k[:old], v[:old]
            places.append(place[old:])
            for states, own_states in zip(packed, (q, k[old:], v[old:]), strict=True):
                states.append(own_states)
            wants.append(reference(q, k, v, shape, sinks))
        wide = max(map(len, tables))
        table = np.array([own + [own[0]] * (wide - len(own)) for own in tables], np.int64)
        reached = np.array(lengths, np.int64)
        made.append(Part(new, reached, None if kind == "fresh" else table, compiled=kind == "decode"))
    # As models hand them on: (heads, tokens, width) transposed.
    q, k, v = (torch.cat(states).transpose(0, 1).contiguous().transpose(0, 1) for states in packed)
    step = StepContext(pool, torch.cat(places), made)
    pool.write(0, step.places, k, v)
    got = attend(step, 0, q, k, v, AttentionOptions(sinks=sinks, **shape.options))
    rounded = ROUNDED_SCORES if shape.softcap or shape.has_sinks else 1
    return _compared(got, torch.cat(wants), rounded * TOLERANCE[shape.dtype])


def _maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *size: torch.randn(size, device=device).to(dtype)


def _compared(got: Tensor, want: Tensor, tolerance: float) -> Row:
    size = want.abs() + want.square().mean(-1, keepdim=True).sqrt()
    error = ((got.double() - want).abs() / size).max().item()
    return {"dtype": str(got.dtype).removeprefix("torch."), "correct": error <= tolerance, "error": error}


def _infinities(setting: Setting) -> Iterator[Row]:
    """A key that is not finite shows in its row, in the heads that read it, and nowhere else."""
    width, dtype = (16, torch.float32) if setting.small else (128, torch.bfloat16)
    make = _maker(setting.device, dtype)
    table, lengths = (torch.tensor(values, device=setting.device) for values in ([[1], [2], [3]], [30, 30, 30]))
    for bad in (torch.inf, -torch.inf, torch.nan):
        q, k, v = make(3, 8, width).fill_(1), make(4, PAGE_SIZE, 2, width), make(4, PAGE_SIZE, 2, width)
        k[2, 3, 1, 5] = bad
        got = paged_attention.paged_decode(q, k, v, table, lengths, scale=0.1)
        finite = got.isfinite().all(-1).tolist()
        correct = finite == [[True] * 8, [True] * 4 + [False] * 4, [True] * 8]
        yield {"case": f"a key that is {bad}", "correct": correct}


def _hidden_infinity(device: torch.device) -> Row:
    """Scores of -inf for every query of one sequence show, though a softmax by itself would hide them."""
    make = _maker(device, torch.bfloat16)
    pool = KeyValuePool([LayerShape(2, 128, 128)], 4, torch.bfloat16, device, choose_backend("auto", device))
    q, k, v = make(40, 8, 128).fill_(1), make(40, 2, 128), make(40, 2, 128)
    k[5, 1, 3] = -torch.inf
    step = StepContext(pool, torch.arange(40, device=device) + PAGE_SIZE, [Part(20, np.array([20, 20]))])
    pool.write(0, step.places, k, v)
    got = attend(step, 0, q, k, v, AttentionOptions(scale=0.1)).isfinite().all(2)
    want = torch.ones_like(got)
    want[:20, 4:] = False
    return {"case": "prefill, a key that is -inf", "correct": torch.equal(got, want)}
