"""Attention of decodes at Llama-3-8B's shape: microseconds of a layer, and bytes of keys and values a second."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved
from sera_kernels import paged_attention
from sera_serve.engine.loop.pages import PAGE_SIZE

HEADS, KV_HEADS, WIDTH = 32, 8, 128
# Sequences, new tokens of each, its keys, and pages of the table where it is wider than the keys, as the engine's is:
# for a context of 8,192 tokens, or of 131,072. New tokens of one sequence are a prompt in a graph.
POINTS = (
    *((64, 1, 256, None), (64, 1, 512, None), (64, 1, 512, 256), (64, 1, 512, 4096)),
    *((1, 256, 256, 256), (1, 512, 512, 256), (1, 512, 512, 4096)),
    *((64, 1, 2048, None), (8, 1, 512, None), (1, 1, 8192, None)),
)


def time_attention(setting: Setting) -> Iterator[Row]:
    """A graph of several layers, each with keys of its own, so that the cache does not hold them."""
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    for sequences, new_tokens, keys, wide in ((2, 1, 40, None), (1, 8, 40, 3)) if setting.small else POINTS:
        rows = sequences * new_tokens
        # Each token sees the keys up to its own.
        moved = rows * (keys - (new_tokens - 1) / 2) * KV_HEADS * WIDTH * dtype.itemsize * 2
        layers = 2 if setting.small else max(4, min(16, int(1.5e9 / moved)))
        pages = -(-keys // PAGE_SIZE)
        count = sequences * pages + 1
        stored = torch.randn(2, layers, count, PAGE_SIZE, KV_HEADS, WIDTH, dtype=dtype, device=setting.device)
        # As in a static step.
        table = torch.zeros(sequences, wide or pages, dtype=torch.int32, device=setting.device)
        table[:, :pages] = (torch.randperm(count - 1, device=setting.device) + 1).view(sequences, pages)
        row = torch.arange(rows, device=setting.device)
        owners, at = (row // new_tokens).int(), keys - new_tokens + row % new_tokens
        lengths = at + 1
        q = torch.randn(rows, HEADS, WIDTH, dtype=dtype, device=setting.device)
        new = torch.randn(rows, KV_HEADS, WIDTH, dtype=dtype, device=setting.device)
        places = table[owners, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE

        def decode(i: int, stored=stored, rows=(table, lengths, owners), q=q, layers=layers) -> None:  # type: ignore[no-untyped-def]
            k, v = stored[:, i % layers]
            paged_attention.paged_decode(q, k, v, *rows[:2], owners=rows[2], scale=WIDTH**-0.5)

        def write(i: int, stored=stored, places=places, new=new, layers=layers) -> None:  # type: ignore[no-untyped-def]
            k, v = stored[:, i % layers]
            paged_attention.write_kv(k, v, places, new, new)

        times = interleaved(setting, {"decode": Timed(decode, layers), "write": Timed(write, layers)})
        figures = {"decode_us": times["decode"], "tb_per_s": moved / times["decode"] / 1e6, "write_us": times["write"]}
        yield {"sequences": sequences, "rows": rows, "keys": keys, "table_pages": table.shape[1]} | figures
