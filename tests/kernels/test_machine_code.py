"""The machine code of the Triton kernels for three generations of GPUs, compiled without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sera_kernels import MOST_RANK

# Scenarios of `compile_triton`, its last ones: a few tokens and a prompt; and attention.
HIGHEST_RANK = (14, 15)
ATTENTION = 16

# The most registers of a kernel.
REGISTERS = {
    "copy_cells": 40,
    "reduce_mix": 104,
    "reduce_parts": 128,
    "mix_parts": 64,
    "expand": 64,
    "expand, any rank": 128,
    "reduce_runs": 184,
    "expand_runs": 128,
    "expand_silu_mul_runs": 112,
    "reduce_tiles": 224,
    "expand_tiles": 255,
    "scale_and_shift": 64,
    "_norm_kernel": 64,
    "_add_norm_kernel": 64,
    "_silu_mul_kernel": 64,
    "_rotate_kernel": 64,
}
READ_POOL = {
    *("reduce_mix", "reduce_parts", "mix_parts", "expand", "reduce_runs", "expand_runs", "expand_silu_mul_runs"),
    *("reduce_tiles", "expand_tiles", "scale_and_shift"),
}
# Triton 3.6 to 3.8 need more registers for two kernels, and keep up to eight values in local memory.
IS_OLD = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
OLD_REGISTERS = {"expand_runs": 168, "expand_silu_mul_runs": 128}


def compiled(capability: int, scenarios: Iterable[int]) -> list[dict[str, Any]]:
    """Figures of every launch of some scenarios of `compile_triton`, for a compute capability such as 90."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    done = subprocess.run(
        # Triton warns where a launch relies on a default that its next release changes.
        [sys.executable, "-W", "error::UserWarning", script],
        input=json.dumps([(capability, scenario) for scenario in scenarios]),
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# Four scenarios have all kernels. The others have further variants, which one generation of GPUs stands for.
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "scenarios"), [(80, 4), (90, HIGHEST_RANK[0]), (100, 4)])
def test_no_launch_spills_and_loads_are_wide(capability: int, scenarios: int) -> None:
    figures = compiled(capability, range(scenarios))
    kernels = {figure["kernel"] for figure in figures}
    assert kernels == {name for name in REGISTERS if "," not in name}
    limits = REGISTERS | OLD_REGISTERS if IS_OLD else REGISTERS
    for figure in figures:
        kernel, constants = figure["kernel"], figure["constants"]
        name = (
            kernel if constants.get("SINGLE", True) or f"{kernel}, any rank" not in REGISTERS else f"{kernel}, any rank"
        )
        assert figure["spills"] <= (8 if IS_OLD else 0), figure
        assert figure["registers"] <= limits[name], figure
        # The mixer of a small bucket is too small for a vector in each thread. Cells are read one by one.
        narrow = constants.get("VEC") == 1 or constants.get("R") == 16 or kernel == "copy_cells"
        assert figure["wide_loads"] > 0 or narrow, figure
        # The first row of B and eight further rows.
        assert figure["wide_loads"] >= 9 or name != "expand, any rank" or constants["VEC"] == 1, figure
        # A pool of thousands of adapters has more elements than 32 bits count.
        reads_pool = kernel in READ_POOL
        assert figure["narrow_offsets"] == 0 and (figure["wide_offsets"] > 0) == reads_pool, figure
        multiplies = kernel.endswith("tiles") or kernel == "reduce_runs"
        assert (figure["products"] > 0) == (multiplies and constants["PRECISION"] != "ieee"), figure
        assert (figure["waits"] > 0) == constants.get("OVERLAP", False), figure
        assert capability >= 90 or not constants.get("OVERLAP", False), figure
        # Two programs of a kernel fit the shared memory of a multiprocessor of sm_80.
        assert figure["shared"] <= 163 * 1024 // 2, figure


# So large a rank is right, and slow: many kernels have all registers of a thread.
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_highest_rank_compiles(capability: int) -> None:
    figures = compiled(capability, HIGHEST_RANK)
    lengths = {(figure["kernel"], figure["constants"].get("R")) for figure in figures}
    assert lengths >= {(kernel, MOST_RANK) for kernel in ("reduce_mix", "reduce_parts", "mix_parts")}
    assert {kernel for kernel, _ in lengths} >= {"expand", "reduce_tiles", "expand_tiles"}
    for figure in figures:
        # `mix_parts` for a prompt keeps two values in local memory there.
        assert figure["spills"] <= (4 if capability == 80 else 0), figure
        assert figure["shared"] <= 163 * 1024 // 2, figure


@pytest.mark.slow
def test_attention_and_the_choice_of_tokens_are_compiled_once_wherever_their_numbers_lie() -> None:
    """A further compilation takes seconds, in which a server that has started answers nobody."""
    variants: dict[str, set[str]] = {}
    for figure in compiled(90, [ATTENTION]):
        kernel = figure["kernel"] + (", owners" if figure["constants"].get("HAS_OWNERS") else "")
        variants.setdefault(kernel, set()).add(figure["compiled"])
        assert figure["spills"] == 0, figure
    assert {kernel: len(found) for kernel, found in variants.items()} == dict.fromkeys(
        (
            *("_decode_kernel", "_decode_kernel, owners", "_combine_kernel", "_write_kernel", "_spread_kernel"),
            *("reduce_kernel", "finish_kernel"),
        ),
        1,
    )
