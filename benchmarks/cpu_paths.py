"""The ways to compute the grouped operation on a CPU, side by side: numba, torch, and torch compiled.

    python -m benchmarks.cpu_paths [--quick]

16 tokens of 16 adapters in one call for q, k and v; each figure is the median of interleaved rounds, beside the base
linear layers of the same shapes. Outputs are compared with the reference first. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.last_line import tell
from sera_kernels import AdapterBatch, AdapterTables, grouped_sera_reference
from sera_kernels.numba_path import grouped_sera_numba
from sera_kernels.torch_path import grouped_sera_torch

TOKENS, OUTPUTS, LAYERS = 16, 3, 8
CALLS = 24


def random_adapters(width: int, rank: int) -> tuple[Tensor, AdapterTables]:
    """16 SeRA adapters, split = rank, on the modules of `LAYERS` layers: more than stays in a core's cache."""
    size = 2 * width + rank**2
    tables = AdapterTables.empty(OUTPUTS * LAYERS, TOKENS)
    tables.offset.copy_((torch.arange(tables.offset.numel()) * size).view_as(tables.offset))
    tables.rank.fill_(rank), tables.split.fill_(rank), tables.mixer.fill_(1), tables.scaling.fill_(1.0)
    return torch.randn(tables.offset.numel() * size) / width**0.5, tables


def microseconds(work: Callable[[int], Any]) -> float:
    """Time of one call of `work`, which is told the layer."""
    start = time.perf_counter()
    for call in range(CALLS):
        work(call % LAYERS)
    return (time.perf_counter() - start) / CALLS * 1e6


@torch.no_grad()
def measure(width: int, rank: int, compiled: bool, rounds: int) -> dict[str, Any]:
    """One row: microseconds of each path; raises where an output is wrong."""
    pool, tables = random_adapters(width, rank)
    batch = AdapterBatch(torch.arange(TOKENS, dtype=torch.int32))
    x = torch.randn(TOKENS, width)
    bases = [torch.nn.Linear(width, width, bias=False) for _ in range(OUTPUTS * LAYERS)]
    paths: dict[str, Callable[..., None]] = {"numba": grouped_sera_numba, "torch": grouped_sera_torch}
    if compiled:
        paths["torch.compile"] = torch.compile(grouped_sera_torch, dynamic=False)
    modules = [list(range(layer * OUTPUTS, (layer + 1) * OUTPUTS)) for layer in range(LAYERS)]
    want = [torch.zeros(TOKENS, width) for _ in range(OUTPUTS)]
    grouped_sera_reference(x, want, modules[0], batch, pool, tables)
    works: dict[str, Callable[[int], Any]] = {
        "base layers": lambda layer: [bases[module](x) for module in modules[layer]]
    }
    for name, path in paths.items():
        got = [torch.zeros(TOKENS, width) for _ in range(OUTPUTS)]
        path(x, got, modules[0], batch, pool, tables)
        for mine, reference in zip(got, want, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        works[name] = lambda layer, path=path, got=got: path(x, got, modules[layer], batch, pool, tables)
        microseconds(works[name])
    times = {name: [microseconds(work) for _ in range(rounds)] for name, work in works.items()}
    return {"width": width, "rank": rank} | {name: round(statistics.median(each), 1) for name, each in times.items()}


def main(
    quick: Annotated[bool, typer.Option(help="One width, few rounds.")] = False,
    compiled: Annotated[bool, typer.Option(help="Also torch.compile, which needs a C++ compiler.")] = True,
) -> None:
    """Measure, print a table, then one JSON line."""
    shapes = [(256, 16)] if quick else [(width, rank) for width in (256, 512, 1024, 2048) for rank in (16, 64)]
    rows = [measure(width, rank, compiled, 3 if quick else 15) for width, rank in shapes]
    table = Table(*rows[0], title="microseconds")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)
    # A wrong output has ended the run.
    tell("cpu_paths", rows)


if __name__ == "__main__":
    typer.run(main)
