"""Correctness and speed on a GPU.

    python -m benchmarks.gpu first|second --output DIR [--budget-s N] [--small] [--peer-kernels DIR] [--layers 32]
                                                       [--sections NAME,NAME]

`first` checks kernels, attention, sampling and the engine, then times decode steps and the engine. `second` checks
what happens under load, then times prefill, the HTTP server, and LoRA computed by others. Where a check finds errors,
no speed is reported for what rests on it (exit status 1). `--small` runs everything at tiny sizes, on the CPU too,
and says nothing about speed. `python -m benchmarks.gpu.wheels` fetches packages for a GPU machine without a network.
DIR gets one file of rows, which grows as they are found, one log, and the table. The last line of the output is one
JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.plan import COMMANDS, Section

# What a machine that was prepared for another use may lack. Without one of them a section would fail late.
NEEDED = (
    *("torch", "triton", "transformers", "numpy", "pydantic", "pydantic_settings", "fastapi", "uvicorn"),
    *("concurrent_log_handler", "llguidance", "orjson"),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the results")
    parser.add_argument("--budget-s", type=float, help="seconds after which everything ends (360, 300)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also without a GPU; no figure means anything")
    parser.add_argument("--peer-kernels", type=Path, metavar="DIR", help="folder of an unpacked vLLM wheel")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the large base (32)")
    parser.add_argument("--sections", help="names of sections, and the checks they rest on, instead of all")
    return parser.parse_args(arguments)


def chosen(command: str, names: str | None) -> tuple[Section, ...]:
    """The sections of a command, or those named and the checks they rest on.

    Raises:
        ValueError: There is no such section.
    """
    sections = COMMANDS[command][0]
    if names is None:
        return sections
    known = {section.name: section for section in sections}
    wanted = {"machine"}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"no section {name!r}; there are {', '.join(known)}")
        wanted |= {name, *known[name].needs}
    return tuple(section for section in sections if section.name in wanted)


def sees_gpu() -> bool:
    """Whether torch sees a CUDA device, asked in another process: one that has started CUDA cannot be forked."""
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.cuda.is_available() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all is right, 1 where something is wrong, 2 where it cannot run at all."""
    started = time.monotonic()
    options = parse(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _refuse(f"missing packages: {', '.join(missing)}")
    try:
        sections = chosen(options.command, options.sections)
    except ValueError as error:
        return _refuse(str(error))
    has_gpu = sees_gpu()
    # What the imports to come ask for must not start CUDA either.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if not (options.small or has_gpu):
        return _refuse("torch sees no GPU; --small runs on the CPU, at tiny sizes")
    if not has_gpu:
        # Kernels run in Triton's interpreter; before anything imports Triton.
        os.environ["TRITON_INTERPRET"] = "1"
    # Kernels that the checks compile are there for the other sections.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

    from benchmarks.gpu.report import describe_machine, summary, write
    from benchmarks.gpu.setting import Options
    from benchmarks.gpu.supervisor import Supervisor, preload

    options.output.mkdir(parents=True, exist_ok=True)
    record, log = (options.output / f"{options.command}.{kind}" for kind in ("jsonl", "log"))
    for path in (record, log):
        path.write_text("")
    supervisor = Supervisor(
        Options(
            options.command,
            str(record),
            str(log),
            options.small,
            1 if options.small else options.layers,
            None if options.peer_kernels is None else str(options.peer_kernels),
            started,
            options.budget_s or COMMANDS[options.command][1],
            has_gpu,
        )
    )
    supervisor.record.add("versions", describe_machine())
    preload()
    supervisor.run(sections)
    # Else Triton reports what the interpreter does not free at its end as leaked.
    gc.unfreeze()
    correct = supervisor.correct(sections)
    result = summary(supervisor, correct)
    write(result, options.output / f"{options.command}.txt")
    print(json.dumps(result))
    return 0 if correct and not supervisor.failed() else 1


def _refuse(reason: str) -> int:
    print(json.dumps({"benchmark": "gpu", "correct": False, "reason": reason, "rows": []}))
    return 2


if __name__ == "__main__":
    sys.exit(main())
