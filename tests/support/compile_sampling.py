"""Compiles the kernels that choose tokens for GPUs that this machine may lack, and prints figures as JSON.

The test runs this script in its own process, because TRITON_INTERPRET is set for the whole process of pytest.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sera_kernels import sampling

TYPES = dict.fromkeys(("temperature", "top_p", "min_p", "bias", "figures", "maxima"), "*fp32")
TYPES |= dict.fromkeys(("repetition", "frequency", "presence"), "*fp32")
TYPES |= dict.fromkeys(("top_k", "keys", "counts", "found", "listed"), "*i32") | {"tokens": "*i64"}
STRIDES = ("row_stride", "vocabulary", "counts_stride", "bias_stride")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(capability: int, dtype: str, reduce: bool, penalties: bool) -> dict[str, object]:
    kernel = sampling.reduce_kernel if reduce else sampling.finish_kernel
    constants = {"SAMPLED": True, "LIMITED": True, "LIBDEVICE": True, "CHUNK": sampling.CHUNK}
    constants |= {"TILE": sampling.TILE, "LISTED_TILE": sampling.LISTED_TILE // (2 if penalties else 1)}
    constants |= {
        "TRIAL_TILE": sampling.LISTED_TILE // 2 if penalties else sampling.TRIAL_TILE,
        "FIGURES": sampling.FIGURES,
        "GUESSES": sampling.GUESSES,
    }
    constants |= {"SPLITS": 63, "SPLITS_BLOCK": 64, "CHUNKS_BLOCK": 4096}
    if not penalties:
        constants |= dict.fromkeys(("counts", "repetition", "frequency", "presence", "bias"))
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | {"logits": f"*{dtype}"} | dict.fromkeys(STRIDES, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr"}
    code = triton.compile(
        ASTSource(kernel, {name: types[name] for name in names}, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": sampling.REDUCE_WARPS if reduce else sampling.FINISH_WARPS, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "dtype": dtype,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "wide_loads": sum(
            "ld.global" in line and (".v4.b32" in line or ".v2.b64" in line) for line in code.asm["ptx"].splitlines()
        ),
    }


if __name__ == "__main__":
    cases = [(90, "bf16", True, True), (90, "fp32", True, False), (90, "fp32", False, False), (90, "bf16", False, True)]
    cases += [
        (80, "fp32", True, False),
        (80, "fp32", False, False),
        (100, "bf16", True, False),
        (100, "fp32", False, False),
    ]
    json.dump([compiled(*case) for case in cases], sys.stdout)
