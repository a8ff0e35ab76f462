"""Two adapters for one token: factors side by side in one slot, against a second slot for the same token.

    python -m benchmarks.combinations [--quick]

16 rows, each with a sum of its own, in one call for three outputs, on a CPU. One slot runs the grouped operation once
over the factors of `Combination`; two slots run it once for each part. Each figure is the median of interleaved rounds,
in microseconds, beside the base linear layers of the same shapes. Bytes are those of one layer's factors in float32.
Outputs of both ways are compared first. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters_store import AdapterBundle, AdapterConfig, BaseInfo, ModuleSpec, combine, expected_shapes
from benchmarks.cpu_paths import LAYERS, OUTPUTS, TOKENS, microseconds
from benchmarks.last_line import tell
from sera_kernels import AdapterBatch, AdapterTables, grouped_sera
from sera_serve.residency.packing import PackedAdapter, pack

MODULES = [f"layer{module}" for module in range(LAYERS * OUTPUTS)]
INDEX = {path: row for row, path in enumerate(MODULES)}
# Rank, split and mixer of the two parts.
PAIRS = {
    "LoRA 8 + LoRA 8": ((8, 1, False), (8, 1, False)),
    "split 64 + split 64": ((64, 64, True), (64, 64, True)),
    "split 64 + split 16": ((64, 64, True), (16, 16, True)),
    "split 64 + LoRA 8": ((64, 64, True), (8, 1, False)),
}


def adapter(width: int, shape: tuple[int, int, bool], seed: int) -> AdapterBundle:
    """One adapter of every layer, with random factors."""
    rank, split, use_mixer = shape
    spec = ModuleSpec(d_in=width, d_out=width, rank=rank, split=split, use_mixer=use_mixer, scaling=1.0)
    base = BaseInfo(name="b", architecture="a", config_digest="c", weights_digest="d", hidden_size=width)
    config = AdapterConfig(task="generate", method="sera", base=base, modules=dict.fromkeys(MODULES, spec))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(size, generator=generator) / width**0.5 for name, size in expected_shapes(config).items()
    }
    return AdapterBundle(config, tensors)


def resident(adapters: list[PackedAdapter]) -> tuple[Tensor, AdapterTables]:
    """A pool with each adapter in the slot of its place, and its tables."""
    tables = AdapterTables.empty(len(MODULES), len(adapters))
    begin = 0
    for slot, packed in enumerate(adapters):
        for module in packed.layout.modules:
            index = int(module["index"])
            tables.offset[index, slot] = begin + int(module["offset"])
            tables.rank[index, slot] = int(module["rank"])
            tables.split[index, slot] = int(module["split"])
            tables.mixer[index, slot] = int(module["use_mixer"])
            tables.scaling[index, slot] = float(module["scaling"])
        begin += packed.layout.elements
    return torch.cat([packed.data for packed in adapters]), tables


@torch.no_grad()
def measure(width: int, name: str, rounds: int) -> dict[str, Any]:
    """One row; raises where the two ways differ."""
    shapes = PAIRS[name]
    parts = [[adapter(width, shape, 2 * row + side) for row in range(TOKENS)] for side, shape in enumerate(shapes)]
    sums = [combine([first, second], [0.5, 0.5]) for first, second in zip(*parts, strict=True)]
    halves = [combine([each], [0.5]) for side in parts for each in side]
    together = resident([pack(bundle, INDEX, torch.float32) for bundle in sums])
    apart = resident([pack(bundle, INDEX, torch.float32) for bundle in halves])
    slots = torch.arange(TOKENS, dtype=torch.int32)
    one, two = AdapterBatch(slots), (AdapterBatch(slots), AdapterBatch(slots + TOKENS))
    x = torch.randn(TOKENS, width)
    bases = [torch.nn.Linear(width, width, bias=False) for _ in MODULES]
    outputs = [torch.zeros(TOKENS, width) for _ in range(OUTPUTS)]
    modules = [list(range(layer * OUTPUTS, (layer + 1) * OUTPUTS)) for layer in range(LAYERS)]

    def one_slot(layer: int) -> None:
        grouped_sera(x, outputs, modules[layer], one, *together)

    def two_slots(layer: int) -> None:
        for batch in two:
            grouped_sera(x, outputs, modules[layer], batch, *apart)

    one_slot(0)
    got = [output.clone() for output in outputs]
    for output in outputs:
        output.zero_()
    two_slots(0)
    for mine, other in zip(got, outputs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    works = {
        "base": lambda layer: [bases[module](x) for module in modules[layer]],
        "one slot": one_slot,
        "two slots": two_slots,
    }
    times: dict[str, list[float]] = {way: [] for way in works}
    for _ in range(rounds + 1):
        for way, work in works.items():
            times[way].append(microseconds(work))
    sizes = {"one slot": sums[0].nbytes, "two slots": sum(side[0].nbytes for side in parts)}
    return {
        "width": width,
        "sum": name,
        **{f"{way} us": round(statistics.median(each[1:]), 1) for way, each in times.items()},
        **{f"{way} bytes": size // len(MODULES) for way, size in sizes.items()},
    }


def main(quick: Annotated[bool, typer.Option(help="One width, few rounds.")] = False) -> None:
    """Measure, print a table, then one JSON line."""
    rows = [measure(width, name, 3 if quick else 41) for width in ((256,) if quick else (256, 1024)) for name in PAIRS]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    # A wrong output has ended the run.
    tell("combinations", rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    typer.run(main)
