"""Compile the kernel of paged decodes for GPUs that need not be there. Reads cases as JSON, prints counts as JSON.

Run it without TRITON_INTERPRET: Triton's functions are made for either the interpreter or the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sera_kernels import paged_attention

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = ["q", "keys", "values", "sinks", "out"]
STRIDES = ["q_row", "q_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head"]


def compiled(case: dict[str, Any]) -> dict[str, int]:
    """What the kernel becomes with the constants of `paged_decode`; without extras, those of a static step."""
    kernel = paged_attention._decode_kernel
    extras = [True if case["extras"] else None] * 3
    owners = None if case["extras"] else True
    constants, options = paged_attention.decode_constants(
        DTYPES[case["dtype"]], 32, 8, case["width"], case["width"], 32, case["splits"], *extras, owners
    )
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(POINTERS, f"*{case['dtype']}")
    types |= {"table": "*i32" if owners else "*i64", "lengths": "*i64", "owners": "*i32" if owners else "*i64"}
    types |= {"work": "*fp32", "scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    wide = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in [*POINTERS, "work", *STRIDES]}
    made = triton.compile(
        ASTSource(kernel, signature, constants, wide), target=GPUTarget("cuda", case["capability"], 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, code = (
            subprocess.run([BIN / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None
    counts = Counter(match[1] for line in code.splitlines() if (match := INSTRUCTION.match(line)))

    def count(pattern: str) -> int:
        return sum(number for name, number in counts.items() if re.match(pattern, name))

    return {
        "registers": int(used[1]),
        "stack": int(used[2]),
        "shared": made.metadata.shared,
        "threads": options["num_warps"] * 32,
        "copies": count("LDGSTS"),
        "wide_copies": count(r"LDGSTS.*\.128"),
        "local_loads": count("LDL"),
        "local_stores": count("STL"),
        "products": count("HMMA|HGMMA"),
    }


if __name__ == "__main__":
    json.dump([compiled(case) for case in json.load(sys.stdin)], sys.stdout)
