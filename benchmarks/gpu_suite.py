"""The GPU figures in one command: correctness, kernel times, a whole decode step, adapters per GiB.

    python -m benchmarks.gpu_suite [--small] [--peer-kernels DIR] [--output DIR]

Checks the grouped kernel against its float64 reference and reports no speed where it is wrong (exit status 1). Needs a
GPU, torch, numpy and Triton; the decode step and the adapters' sizes also need transformers and this project's own
requirements, and are skipped, with the reason, where those are missing. `--small` runs everything at tiny sizes, on the
CPU too, and says nothing about speed. Ends with a table for people and one JSON line, which is also kept in a file.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_report import describe_machine, rounded, save, table

if TYPE_CHECKING:
    from benchmarks.gpu_setting import Row, Setting

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, also without a GPU; no figures about speed")
    parser.add_argument("--peer-kernels", type=Path, metavar="DIR", help="folder of an unpacked vLLM wheel")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the JSON file goes (benchmarks/results)")
    parser.add_argument("--budget-s", type=float, default=450, help="what has not begun by then is left (450)")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the decode step's base (32)")
    return parser.parse_args(arguments)


def missing_packages(small: bool) -> list[str]:
    """What the kernel's part needs and this Python lacks."""
    return [name for name in ("torch", "numpy", *([] if small else ["triton"])) if find_spec(name) is None]


class Suite:
    """Runs sections one after the other and keeps what each found, or why it did not run."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rows: list[Row] = []
        self.sections: list[Row] = []

    def run(self, name: str, section: Callable[[], Iterable[Row]], blocked: str | None = None) -> None:
        """Run a section, unless `blocked` says why not or time is up."""
        from benchmarks.gpu_setting import SectionSkipped

        start = time.monotonic()
        status, reason = "done", None
        if blocked is not None:
            status, reason = "skipped", blocked
        elif self.setting.out_of_time():
            status, reason = "not reached", "the time budget was spent; raise --budget-s"
        else:
            self.setting.say(f"{name} begins")
            try:
                for row in section():
                    self.rows.append({"section": name, **row})
            except (SectionSkipped, ImportError) as error:
                status, reason = "skipped", str(error)
            except Exception as error:  # noqa: BLE001 - what the other sections found must not be lost
                status, reason = "failed", f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - start, 1)
        self.sections.append({"section": name, "status": status, "reason": reason, "seconds": seconds})
        self.setting.say(f"{name}: {status}" + (f", {reason}" if reason else ""))
        _free()

    def status(self, name: str) -> str:
        """How a section that has had its turn ended: done, skipped, not reached, or failed."""
        return next(str(section["status"]) for section in self.sections if section["section"] == name)

    def wrong(self, name: str) -> str | None:
        """Why nothing that rests on this check may be timed, or None: it found errors, or it could not be made."""
        checks = [row["correct"] for row in self.rows if row["section"] == name]
        if self.status(name) == "done" and not all(checks):
            return f"{checks.count(False)} of {len(checks)} cases of {name} are wrong: no speed is reported"
        return f"the check {name} failed: no speed is reported" if self.status(name) == "failed" else None


def _free() -> None:
    """Give the GPU's memory back to the next section."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _of(module: str, function: str, *arguments: Any) -> Callable[[], Iterable[Row]]:
    """A section's function, imported when it runs: what it needs may be missing."""
    return lambda: getattr(importlib.import_module(f"benchmarks.{module}"), function)(*arguments)


def run_sections(setting: Setting) -> tuple[Suite, dict[str, float]]:
    """All sections; those that time anything only where everything that was checked is right."""
    from benchmarks.gpu_timing import copy_bandwidth, empty_launch

    suite = Suite(setting)
    machine: dict[str, float] = {}
    suite.run("correctness", _of("gpu_correctness", "check_kernel", setting))
    suite.run("decode correctness", _of("gpu_decode", "check_decode", setting))
    blocked = suite.wrong("correctness")
    if blocked is None and not setting.out_of_time():
        machine = {"copy_bytes_per_s": copy_bandwidth(setting), "empty_launch_us": empty_launch(setting)}
        _free()
    bandwidth, empty = machine.get("copy_bytes_per_s", 0.0), machine.get("empty_launch_us", 0.0)
    # The kernel's many points come last: if time runs out, some of them are what is left.
    decode_blocked = blocked or suite.wrong("decode correctness")
    suite.run("decode step", _of("gpu_decode", "time_decode", setting, bandwidth), decode_blocked)
    suite.run("capacity", _of("gpu_capacity", "measure_capacity", setting), blocked)
    suite.run("kernel time", _of("gpu_kernel_time", "time_kernels", setting, bandwidth, empty), blocked)
    return suite, machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; 0 where all is right, 1 where something is wrong, 2 where it cannot run at all."""
    options = parse(arguments)
    missing = missing_packages(options.small)
    if missing:
        return _refuse(f"missing packages: {', '.join(missing)}")
    import torch

    from benchmarks.gpu_setting import SectionSkipped, Setting, find_operation

    if not (options.small or torch.cuda.is_available()):
        return _refuse("torch sees no GPU; --small runs on the CPU, at tiny sizes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    try:
        operation = find_operation(device)
    except SectionSkipped as error:
        return _refuse(str(error))
    layers = 1 if options.small else options.layers
    setting = Setting(
        device, options.small, operation, started + options.budget_s, layers, options.peer_kernels, started
    )
    with torch.no_grad():
        suite, machine = run_sections(setting)
    checks = ("correctness", "decode correctness")
    correct = suite.status("correctness") == "done" and not any(map(suite.wrong, checks))
    result = {
        "benchmark": "gpu_suite",
        "correct": correct,
        "figures": "of a GPU"
        if setting.on_gpu and not setting.small
        else "not a GPU at full size: no figure means anything",
        "operation": operation[0],
        **describe_machine(device),
        **machine,
        "seconds": round(time.monotonic() - started, 1),
        "sections": suite.sections,
        "rows": suite.rows,
    }
    result = rounded(result)
    print(table(result))
    if not options.small or options.output is not None:
        setting.say(f"kept in {save(result, options.output or RESULTS)}")
    print(json.dumps(result))
    failed = any(section["status"] == "failed" for section in suite.sections)
    return 0 if correct and not failed else 1


def _refuse(reason: str) -> int:
    print(json.dumps({"benchmark": "gpu_suite", "correct": False, "reason": reason, "rows": []}))
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
