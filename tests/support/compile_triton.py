"""Compiles the Triton kernels for GPUs that this machine may lack, and writes figures of the machine code.

The host's code runs on CPU tensors without contents. Each launch is compiled as the GPU's driver would compile it, and
nothing runs. The test runs this script in its own process, because TRITON_INTERPRET is set for the whole process of
pytest. Input: a JSON list of pairs (compute capability, index of a scenario). Output: one line of JSON for each
compiled kernel.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sera_kernels import MOST_RANK, AdapterBatch, AdapterTables, ShapeClasses, triton_path, tune
from sera_kernels.activation import silu_mul, updated_silu_mul
from sera_kernels.attention_overflow import spread_overflow
from sera_kernels.launches import choose_launch
from sera_kernels.norm import add_norm, rms_norm
from sera_kernels.paged_attention import paged_decode, write_kv
from sera_kernels.rotary import rotate_and_write
from sera_kernels.sampling import choose_tokens_triton

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)")
EVERY = ShapeClasses(single=64, segmented=64, whole=64, vectors=True)
HIGHEST = ShapeClasses(single=MOST_RANK, segmented=MOST_RANK, whole=MOST_RANK)
# Tokens, kinds of shapes, dtype, d_in, d_outs.
SCENARIOS = [
    # These have all kernels.
    (64, EVERY, torch.bfloat16, 4096, [4096, 1024, 1024]),
    (64, ShapeClasses(single=64), torch.bfloat16, 4096, [14336, 14336]),
    (2048, ShapeClasses(single=64), torch.bfloat16, 4096, [14336, 14336]),
    (2048, EVERY, torch.bfloat16, 4096, [4096, 1024, 1024]),
    # Other ranks, widths, dtypes and alignments.
    (64, ShapeClasses(single=64), torch.bfloat16, 14336, [4096]),
    (64, ShapeClasses(single=16, segmented=16, whole=16), torch.float16, 4096, [14336, 14336]),
    (64, ShapeClasses(single=256), torch.bfloat16, 4096, [4096]),
    (64, EVERY, torch.float32, 4096, [4096, 1024, 1024]),
    (64, ShapeClasses(single=64), torch.bfloat16, 765, [765]),
    (2048, ShapeClasses(single=256), torch.float32, 4096, [4096]),
    (2048, ShapeClasses(single=16), torch.float16, 14336, [4096]),
    (2048, ShapeClasses(single=256), torch.bfloat16, 765, [765, 765]),
    (2048, ShapeClasses(whole=16), torch.bfloat16, 4096, [4096, 1024, 1024]),
    (2048, EVERY, torch.float32, 4096, [4096]),
    # The highest rank.
    (64, HIGHEST, torch.bfloat16, 4096, [4096]),
    (2048, HIGHEST, torch.bfloat16, 4096, [4096]),
]
# The scenario after those: attention and the choice of tokens.
ATTENTION = len(SCENARIOS)


class Device:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device, and a process may compile for several.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(case: tuple[int, int]) -> list[dict[str, Any]]:
    """Compile every launch of a scenario for a capability."""
    capability, scenario = case
    driver.set_active(Device(capability))
    figures: list[dict[str, Any]] = []

    def compile_only(kernel: triton.JITFunction, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = kernel.warmup(*arguments, grid=grid, **options)
            constants = {name: value for name, value in options.items() if name.isupper()}
            figure = {"kernel": kernel.__name__, "constants": constants, "compiled": made.hash}
            figures.append(figure | inspect(made))

        return launch

    triton.JITFunction.__getitem__ = compile_only
    if scenario == ATTENTION:
        attend_and_choose()
        return figures
    tokens, classes, dtype, d_in, d_outs = SCENARIOS[scenario]
    triton_path._can_overlap = lambda device: capability >= 90  # type: ignore[assignment]
    tables = AdapterTables.empty(len(d_outs), 1)
    tables.set_classes(classes)
    batch = AdapterBatch(torch.zeros(tokens, dtype=torch.int32))
    outputs = [torch.empty(tokens, d_out, dtype=dtype) for d_out in d_outs]
    x, modules = torch.empty(tokens, d_in, dtype=dtype), range(len(d_outs))
    if tokens > triton_path.PREFILL_TOKENS:
        # In large blocks, and in small ones.
        for rows in (0, 1 << 20):
            triton_path.RUN_ROWS = rows
            triton_path.grouped_sera_triton(x, outputs, modules, batch, torch.empty(64, dtype=dtype), tables)
            if len(outputs) == 2:
                updated_silu_mul(x, outputs[0], outputs[1], modules, batch, torch.empty(64, dtype=dtype), tables)
        triton_path.RUN_ROWS = 0
        if capability == 90 and not (classes.segmented or classes.whole):
            # What the tuner tries. For sm_100 one of them spills, which its times will tell.
            for launch in tune.variants(choose_launch(dtype, x.device), "run"):
                triton_path.reduce_updates(x, modules, batch, x, tables, launch=launch)
        return figures
    triton_path.grouped_sera_triton(x, outputs, modules, batch, torch.empty(64, dtype=dtype), tables)
    updates = triton_path.updates_of(x, d_outs, modules, batch, torch.empty(64, dtype=dtype), tables)
    if len(outputs) == 2:
        silu_mul(outputs[0], outputs[1], updates)
        add_norm(x, x, x[0].clone(), 1e-5, x)
        rms_norm(x, x[0].clone(), 1e-5)
    elif len(outputs) == 3:
        heads = [y.view(tokens, -1, 128) for y in outputs]
        places, pages = torch.zeros(tokens, dtype=torch.int64), torch.empty(tokens, 1, *heads[1].shape[1:], dtype=dtype)
        angles = torch.empty(tokens, 128, dtype=dtype)
        rotate_and_write(heads[0], heads[1], heads[2], angles, angles, pages, pages, places, updates)
    return figures


def attend_and_choose() -> None:
    """Launch attention and the choice of tokens in bfloat16, with what is no number of a layer at several places."""
    rows, half = 64, torch.bfloat16
    q, keys = torch.empty(rows, 32, 128, dtype=half), torch.empty(4, 32, 8, 128, dtype=half)
    k, logits = torch.empty(rows, 8, 128, dtype=half), torch.empty(rows, 128256, dtype=half)
    numbers = torch.empty(64 * 300, dtype=torch.int32)
    for at, pages in ((0, 256), (1, 1), (2, 17)):
        # In a static step each token has an owner among the table's rows; a packed step has a table of its own.
        place = numbers[at:]
        lengths, owners = place[:rows], place[rows : 2 * rows]
        for table, owned in (
            (place[: 64 * pages].view(rows, pages), None),
            (place[: 65 * pages].view(65, pages), owners),
        ):
            paged_decode(q, keys, keys, table, lengths, scale=0.1, splits=8, owners=owned)
        write_kv(keys, keys, lengths.long(), k, k)
        spread_overflow(q.clone(), q, k, place[:3], place[3:6])
        column = place.view(torch.float32)[:rows]
        choose_tokens_triton(logits, (column, lengths, column, column, lengths), True, None, None)


def inspect(made: Any) -> dict[str, int]:
    """Return figures of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", cubin))
        lines = dump("-sass", cubin).splitlines()
    code = collections.Counter(found[1] for line in lines if (found := INSTRUCTION.match(line)))
    if usage is None:
        raise RuntimeError("cuobjdump shows no registers")

    def count(pattern: str) -> int:
        return sum(n for instruction, n in code.items() if re.match(pattern, instruction))

    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": made.metadata.shared,
        "instructions": sum(code.values()) - count("NOP"),
        "wide_loads": count(r"LDG.*\.128"),
        "spills": count("LDL|STL"),
        "products": count(r"HMMA|HGMMA|UTCHMMA|UTCQMMA"),
        "waits": count("ACQBULK"),
        # What is counted in 32 bits reaches 4 GiB of the pool, 600 adapters.
        "narrow_offsets": len(re.findall(r"tt\.addptr %pool, .*, i32\b", made.asm["ttir"])),
        "wide_offsets": len(re.findall(r"tt\.addptr %pool, .*, i64\b", made.asm["ttir"])),
    }


def dump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    with ProcessPoolExecutor() as processes:
        for figures in processes.map(compiled, json.load(sys.stdin)):
            sys.stdout.writelines(json.dumps(figure) + "\n" for figure in figures)
