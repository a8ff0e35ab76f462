"""compute-sanitizer's memory check over one small case of each kernel.

`python -m benchmarks.gpu.sanitizer` is what it watches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.setting import Row, SectionSkipped, Setting

_FOLDERS = (Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer"))
_ERROR_STATUS = 9


def check_memory(setting: Setting) -> Iterator[Row]:
    """One row: whether the kernels read and write within what they were given.

    Raises:
        SectionSkipped: There is no compute-sanitizer here, or no GPU.
    """
    program = shutil.which("compute-sanitizer") or next(
        (str(folder / "compute-sanitizer") for folder in _FOLDERS if (folder / "compute-sanitizer").exists()), None
    )
    if program is None:
        raise SectionSkipped("there is no compute-sanitizer on this machine")
    if not setting.on_gpu:
        raise SectionSkipped("compute-sanitizer watches a GPU only")
    command = [program, "--tool=memcheck", f"--error-exitcode={_ERROR_STATUS}", "--print-limit=20"]
    # Without torch's cache of memory, which makes one allocation of many.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(1.0, setting.deadline - time.monotonic())
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu.sanitizer"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    said = (done.stdout + done.stderr).strip()
    setting.say(said)
    yield {"correct": done.returncode == 0, "exit_status": done.returncode, "said": said[-300:]}


def run_small_cases(device: torch.device) -> Iterator[tuple[str, bool]]:
    """One small case of the grouped operation by tokens and by tiles, of attention and of sampling; is each right?"""
    from benchmarks.gpu.attention_check import Shape, check_decode_case
    from benchmarks.gpu.kernel_check import Widths, check_case
    from benchmarks.gpu.operands import Member
    from benchmarks.gpu.sampling_check import compared
    from benchmarks.gpu.setting import find_operation
    from sera_serve.engine.sampling import SamplingRows

    members = [Member(16, 16), Member(8, 4), Member(5, 1, False)]
    operation = find_operation(device)[1]
    for tokens in (5, 300):
        # Without space between factors: what reads beyond the last one is beyond the memory too.
        row = check_case(operation, Widths(96, (96, 48), 0), members, torch.bfloat16, tokens, device)
        yield f"grouped, {tokens} tokens", row["correct"]
    for splits in (1, 3):
        shape = Shape(8, 2, 64, splits=splits)
        yield f"attention, {splits} splits", check_decode_case(device, shape, (1, 40, 300))["correct"]
    some = torch.full((3,), 0.8, device=device)
    rows = SamplingRows(some, (some * 50).int(), some, torch.arange(3, device=device).int())
    logits = torch.randn(3, 5003, device=device)
    for name, limits in (("greedy", None), ("limited", rows), ("sampled", replace(rows, truncate=False))):
        yield f"sampling, {name}", compared(logits, limits)["correct"]


def main() -> int:
    """Run the cases on the GPU; 1 where one is wrong."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    wrong = [name for name, correct in run_small_cases(device) if not correct]
    torch.cuda.synchronize()
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
