"""Measure launch parameters of the Triton kernel on this machine's GPU: `python -m sera_kernels.tune`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from sera_kernels.launches import Launch
from sera_kernels.operands import AdapterBatch, AdapterTables
from sera_kernels.reference import grouped_sera_reference
from sera_kernels.triton_path import launch_grouped

SHAPES = {
    "llama-3-8b": [(4096, [4096, 1024, 1024]), (4096, [4096]), (4096, [14336, 14336]), (14336, [4096])],
    "llama-3-70b": [(8192, [8192, 1024, 1024]), (8192, [8192]), (8192, [28672, 28672]), (28672, [8192])],
}
"""Widths of the layers that share an input, by model: d_in, then every d_out."""

TOKENS = [16, 64, 256, 1024, 4096]
RANK = 64
"""Rank and split of the measured adapters."""

CHOICES: dict[str, list[int]] = {
    "block_m": [1, 16, 32, 64],
    "columns": [256, 512, 1024, 2048],
    "elements": [1024, 2048, 4096],
    "block_n": [32, 64, 128],
    "block_r": [16, 32, 64],
    "block_k": [32, 64, 128],
    "num_warps": [4, 8],
    "num_stages": [1, 2, 3, 4],
    "max_registers": [96, 128, 168, 255],
}

Operands = tuple[Tensor, list[Tensor], list[int], AdapterBatch, Tensor, AdapterTables]


def search(seconds: Callable[[Launch], float], start: Launch) -> tuple[Launch, float]:
    """Search for the best launch by changing one parameter at a time. Returns the launch and its time.

    A time of inf stands for a launch that does not run.
    """
    times = {start: seconds(start)}
    best = start
    while True:
        for name, choices in CHOICES.items():
            for launch in _variants(best, name, choices):
                if launch not in times:
                    times[launch] = seconds(launch)
            best = min(times, key=times.__getitem__)
        if best == start:
            return best, times[best]
        start = best


def _variants(launch: Launch, name: str, choices: list[int]) -> Iterator[Launch]:
    # These parameters have an effect on tiles only.
    if launch.block_m == 1 and name in ("block_n", "block_r", "block_k", "num_stages"):
        return
    for value in choices:
        changed = asdict(launch) | {name: value}
        if changed["elements"] >= 2 * changed["columns"]:
            yield Launch(**changed)


def operands(tokens: int, d_in: int, d_outs: list[int], dtype: torch.dtype, device: str = "cuda") -> Operands:
    """Make the operands of a measurement.

    Up to 256 tokens, each token has its own adapter, as in decoding. With more tokens, 64 tokens have their own adapter
    and the others form long runs of 8 adapters.
    """
    adapters = min(tokens, 256)
    tables = AdapterTables.empty(len(d_outs), adapters, device)
    end = 0
    for module, d_out in enumerate(d_outs):
        size = d_in + d_out + RANK**2
        tables.offset[module] = torch.arange(adapters, device=device) * size + end
        end += adapters * size
    tables.rank.fill_(RANK)
    tables.split.fill_(RANK)
    tables.mixer.fill_(1)
    tables.scaling.fill_(1.0)
    slots = torch.arange(tokens) if tokens <= 256 else (torch.arange(tokens) - 64) * 8 // (tokens - 64)
    slots[:64] = torch.arange(min(tokens, 64))
    x = torch.randn(tokens, d_in, device=device).to(dtype)
    outputs = [torch.randn(tokens, d_out, device=device).to(dtype) for d_out in d_outs]
    pool = (torch.randn(end, device=device) / RANK).to(dtype)
    return x, outputs, list(range(len(d_outs))), AdapterBatch(slots.to(device, torch.int32)), pool, tables


def is_right(launch: Launch, case: Operands) -> bool:
    """Return whether the results of a launch equal the results of the reference."""
    x, outputs, modules, batch, pool, tables = case
    got, want = [y.clone() for y in outputs], [y.double() for y in outputs]
    launch_grouped(launch, x, got, modules, batch, pool, tables)
    grouped_sera_reference(x, want, modules, batch, pool, tables)
    unit = torch.finfo(x.dtype).eps
    return all(
        torch.allclose(mine.double(), exact, rtol=unit, atol=unit * exact.abs().max().item())
        for mine, exact in zip(got, want, strict=True)
    )


def measure(launch: Launch, case: Operands) -> float:
    """Return the milliseconds of a launch in a CUDA graph, or inf if the GPU lacks memory or registers for it."""
    x, outputs, modules, batch, pool, tables = case
    try:
        time: float = triton.testing.do_bench_cudagraph(
            lambda: launch_grouped(launch, x, outputs, modules, batch, pool, tables), rep=10, return_mode="median"
        )
    except (OutOfResources, PTXASError):
        return float("inf")
    return time


def tune(shapes: list[tuple[int, list[int]]], dtypes: list[torch.dtype], write: Callable[[str], object]) -> list[Any]:
    """Measure the rows of `launches.json` for this GPU.

    Raises:
        RuntimeError: The fastest launch gives other results than the reference.
    """
    rows = []
    for dtype in dtypes:
        for d_in, d_outs in shapes:
            best = Launch(1, 512, 2048, 64, 32, 64, 4, 2, 128)
            for tokens in TOKENS:
                case = operands(tokens, d_in, d_outs, dtype)
                if tokens > 256 and best.block_m == 1:
                    best = Launch(32, 1024, 2048, 64, 32, 64, 8, 2, 128)
                best, time = search(lambda launch, case=case: measure(launch, case), best)  # type: ignore[misc]
                if not is_right(best, case):
                    raise RuntimeError(f"{best} is wrong at {tokens} tokens, {d_in} to {d_outs}, {dtype}")
                write(f"{dtype} {tokens} tokens, {d_in} to {d_outs}: {time * 1000:.1f} us, {best}\n")
                row = {"element_bytes": dtype.itemsize, "tokens": tokens, "d_in": d_in, "d_out": max(d_outs)}
                rows.append(row | {"microseconds": round(time * 1000, 1), "launch": asdict(best)})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sera_kernels.tune", description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b", help="measure the layers of this model")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument(
        "--output", type=Path, default=Path("launches.json"), help="file to write; rows of other GPUs are kept"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("sera_kernels.tune needs a CUDA GPU, and torch finds none here; nothing was written\n")
        return 1
    shipped = resources.files("sera_kernels").joinpath("launches.json")
    table = json.loads(options.output.read_text() if options.output.exists() else shipped.read_text())
    rows = tune(SHAPES[options.shapes], [getattr(torch, name) for name in options.dtypes], sys.stderr.write)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    table["devices"][torch.cuda.get_device_name()] = {"tuned": True, **versions, "rows": rows}
    options.output.write_text(json.dumps(table, indent=1) + "\n")
    sys.stderr.write(f"wrote {len(rows)} rows to {options.output}; the package reads the file beside its source\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
