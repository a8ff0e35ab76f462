"""Compiles the kernel for GPUs that this machine may lack, and prints figures of the machine code.

The test runs this script in its own process, because TRITON_INTERPRET is set for the whole process of pytest.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sera_kernels.launches import Launch
from sera_kernels.triton_path import grouped_kernel

POINTERS = {"x": "", "pool": "", "y0": "", "y1": "", "y2": "", "y3": "", "slots": "i32", "order": "i64"}
POINTERS |= {"tile_first": "i64", "tile_ordinal": "i64", "offset": "i64", "rank": "i32", "split": "i32", "mixer": "i32"}
POINTERS |= {"scaling": "fp32"}


def compiled(capability: int, dtype: str, vector: int, launch: Launch) -> dict[str, object]:
    constants = {
        "COLUMNS": launch.columns,
        "ELEMENTS": launch.elements,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": launch.block_r,
        "BLOCK_K": launch.block_k,
        "VEC": vector,
        "WIDEN": False,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    names = grouped_kernel.arg_names
    types = {name: f"*{POINTERS[name] or dtype}" if name in POINTERS else "i32" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in POINTERS}
    kernel = triton.compile(
        ASTSource(grouped_kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "maxnreg": launch.max_registers,
            "enable_fp_fusion": True,
        },
    )
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "cubin": len(kernel.asm["cubin"]),
        "wide_loads": sum("ld.global" in line and ".v4.b32" in line for line in ptx.splitlines()),
        "products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    cases = [
        (capability, dtype, vector, Launch(**launch)) for capability, dtype, vector, launch in json.load(sys.stdin)
    ]
    json.dump([compiled(*case) for case in cases], sys.stdout)
