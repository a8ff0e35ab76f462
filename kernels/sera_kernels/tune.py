"""Measure launch parameters of the Triton kernels on this machine's GPU: `python -m sera_kernels.tune`.

At most 24 variants are measured for decoding, which takes about 20 s on a GPU, and 4 for a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from sera_kernels.launches import Launch, choose_launch
from sera_kernels.operands import AdapterBatch, AdapterTables
from sera_kernels.reference import grouped_sera_reference
from sera_kernels.triton_path import PREFILL_TOKENS, grouped_sera_triton

SHAPES = [(4096, [4096, 1024, 1024]), (4096, [14336, 14336]), (14336, [4096])]
"""Widths of the measured layers that share an input (Llama-3-8B): d_in, then every d_out."""

TOKENS = 64
"""Tokens of a measurement of decoding. Each has an adapter of its own."""

PROMPT_TOKENS = 2048
"""Tokens of a measurement of a prompt. All have one adapter."""

RANK = 64
"""Rank and split of the measured adapters."""

CHOICES: dict[str, list[int]] = {
    "reduce_elements": [4096, 8192, 16384],
    "reduce_thread": [8, 16, 32],
    "expand_columns": [512, 1024, 2048, 4096],
    "expand_warps": [2, 4, 8],
    "run_tokens": [4, 8],
    "run_inputs": [32, 64],
}
"""Values of each parameter. Phases are searched one after the other: 9 and 12 variants, and 4 for a prompt."""

DECODING, PROMPT = ("reduce", "expand"), ("run",)
"""Phases that are measured together."""

Operands = tuple[Tensor, list[Tensor], list[int], AdapterBatch, Tensor, AdapterTables]


def variants(best: Launch, phase: str) -> Iterator[Launch]:
    """Yield `best` with every choice of one phase's parameters, "reduce", "expand" or "run"."""
    first, second = (name for name in CHOICES if name.startswith(phase))
    for one in CHOICES[first]:
        for other in CHOICES[second]:
            yield replace(best, **{first: one, second: other})


def search(
    microseconds: Callable[[Launch], float], start: Launch, phases: Sequence[str] = DECODING
) -> tuple[Launch, float]:
    """Search each phase's parameters for the fastest. Returns the launch and its time.

    A time of inf stands for a launch that does not run.
    """
    times = {start: microseconds(start)}
    best = start
    for phase in phases:
        for launch in variants(best, phase):
            if launch not in times:
                times[launch] = microseconds(launch)
        best = min(times, key=times.__getitem__)
    return best, times[best]


def operands(tokens: int, d_in: int, d_outs: list[int], dtype: torch.dtype, device: str = "cuda") -> Operands:
    """Make the operands of a measurement: every token has its own adapter, as in decoding, or all the same."""
    adapters = tokens if tokens <= PREFILL_TOKENS else 1
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
    x = torch.randn(tokens, d_in, device=device).to(dtype)
    outputs = [torch.randn(tokens, d_out, device=device).to(dtype) for d_out in d_outs]
    pool = (torch.randn(end, device=device) / RANK).to(dtype)
    slots = torch.arange(tokens, dtype=torch.int32, device=device) % adapters
    return x, outputs, list(range(len(d_outs))), AdapterBatch(slots), pool, tables


def is_right(launch: Launch, case: Operands) -> bool:
    """Return whether the updates of a launch equal those of the reference."""
    x, outputs, modules, batch, pool, tables = case
    # Beside outputs, which are thousands of times as large, rounding would hide any fault of the updates.
    got, want = [torch.zeros_like(y) for y in outputs], [torch.zeros_like(y, dtype=torch.float64) for y in outputs]
    grouped_sera_triton(x, got, modules, batch, pool, tables, launch)
    grouped_sera_reference(x, want, modules, batch, pool, tables)
    # Of an output's rounding; in float32, of the sums before it, of hundreds of products.
    unit = max(torch.finfo(x.dtype).eps, 2e-6)
    return all(
        torch.allclose(mine.double(), exact, rtol=unit, atol=unit * exact.abs().max().item())
        for mine, exact in zip(got, want, strict=True)
    )


def run_all(launches: list[Launch], cases: list[Operands]) -> None:
    """Run every launch once, in threads: a kernel takes the compiler seconds, and several are compiled at a time."""

    def run(launch: Launch) -> None:
        for case in cases:
            # `measure` finds these errors again, and leaves the launch out.
            with suppress(OutOfResources, PTXASError):
                grouped_sera_triton(*case, launch)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(run, launches))


def measure(launch: Launch, cases: list[Operands]) -> float:
    """Return the microseconds of all cases in CUDA graphs, or inf if the GPU lacks memory or registers for a launch."""
    total = 0.0
    for case in cases:
        run = partial(grouped_sera_triton, *case, launch)
        try:
            total += triton.testing.do_bench_cudagraph(run, rep=10, return_mode="median") * 1000
        except (OutOfResources, PTXASError):
            return float("inf")
    return total


def tune(dtypes: list[torch.dtype], write: Callable[[str], object]) -> dict[str, Any]:
    """Measure this GPU's entry of `launches.json`.

    Raises:
        RuntimeError: The fastest launch gives other results than the reference.
    """
    entry: dict[str, Any] = {"tuned": True, "torch": torch.__version__, "triton": triton.__version__}
    for dtype in dtypes:
        times: dict[int, float] = {}
        cases = {
            tokens: [operands(tokens, d_in, d_outs, dtype) for d_in, d_outs in SHAPES]
            for tokens in (TOKENS, PROMPT_TOKENS)
        }
        best = choose_launch(dtype, cases[TOKENS][0][0].device)
        for (tokens, own), phases in zip(cases.items(), (DECODING, PROMPT), strict=True):
            run_all([launch for phase in phases for launch in variants(best, phase)], own)
            best, times[tokens] = search(lambda launch, own=own: measure(launch, own), best, phases)  # type: ignore[misc]
            if not all(is_right(best, case) for case in own):
                raise RuntimeError(f"{best} is wrong for {dtype}")
            write(f"{dtype}, {tokens} tokens: {times[tokens]:.1f} us, {best}\n")
        size = dtype.itemsize
        entry |= {str(size): asdict(best), f"microseconds_{size}": round(times[TOKENS], 1)}
        entry[f"prompt_microseconds_{size}"] = round(times[PROMPT_TOKENS], 1)
    return entry


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sera_kernels.tune", description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument(
        "--output", type=Path, default=Path("launches.json"), help="file to write; entries of other GPUs are kept"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("sera_kernels.tune needs a CUDA GPU, and torch finds none here; nothing was written\n")
        return 1
    shipped = resources.files("sera_kernels").joinpath("launches.json")
    table = json.loads(options.output.read_text() if options.output.exists() else shipped.read_text())
    table["devices"][torch.cuda.get_device_name()] = tune(
        [getattr(torch, name) for name in options.dtypes], sys.stderr.write
    )
    options.output.write_text(json.dumps(table, indent=1) + "\n")
    sys.stderr.write(f"wrote {options.output}; the package reads the file beside its source\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
