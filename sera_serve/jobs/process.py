"""The process that trains one job: how it is started, what it reports, and how it is ended."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters_store.backends.durable import put_text
from sera_serve.access import DEFAULT, Limit
from sera_serve.base import Quantize
from sera_serve.base.loading import EMBEDDED
from sera_serve.jobs.paths import JobPaths
from sera_serve.jobs.records import Checkpoint, Job, LastSteps, NewEvent, Reported
from sera_serve.jobs.spec import TRAINING_NAME, VALIDATION_NAME

# Files of a job's directory.
ORDERS = "orders.json"
LIMITS = "limits.json"
PROGRESS = "progress.jsonl"
RESULT = "result.json"
PUBLISHING = "publishing.json"
LOG = "log"
_MOST_READ = 256 << 10
_LOG_TAIL = 2000
_TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# The child watches for the server's end before it imports anything: its imports take seconds. The server writes nothing
# to the pipe, so a read returns when the server has ended, however it ended.
_PROGRAM = """
import os, signal, sys, threading
def end_with_server():
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end_with_server, daemon=True).start()
from pathlib import Path
from sera_serve.jobs.worker import main
sys.exit(main(Path(sys.argv[1])))
"""


@dataclass(frozen=True)
class JobProcesses:
    """How the processes of jobs are started.

    Attributes:
        base: What the server has loaded as its base.
        store: Directory of the store.
        device: Torch device.
        dtype: dtype of the base.
        quantize: What the base's linear layers are kept in.
        threads: Threads of one process.
        timeout_s: Longest time that a process runs, or None.
        gpu_memory_fraction: Share of a GPU's memory that one process may use.
        max_bundle_bytes: Largest bundle of the store.
        quotas: Returns the limits of the settings file, by tenant: they may be read again.
    """

    base: str
    store: Path
    device: str
    dtype: str
    threads: int
    gpu_memory_fraction: float
    max_bundle_bytes: int
    quotas: Callable[[], Mapping[str, Mapping[str, Limit]]] = dict
    quantize: Quantize = "none"
    timeout_s: float | None = None

    def prepare(self, job: Job, paths: JobPaths) -> Path:
        """Make the directory of a job, with its orders and links to its files. Returns the directory.

        Raises:
            OSError: The disk is full.
        """
        paths.make()
        run = paths.run(job.id)
        run.mkdir(mode=0o700, exist_ok=True)
        settings = job.spec.train_settings(
            # The process has another working directory.
            str(Path(self.base).resolve()) if self.base != EMBEDDED and Path(self.base).is_dir() else self.base,
            self.store.absolute(),
            device=self.device.partition(":")[0],
            dtype=self.dtype,
            quantize=self.quantize,
        )
        _link(paths.file(job.training_file), run / TRAINING_NAME)
        if job.validation_file is not None:
            _link(paths.file(job.validation_file), run / VALIDATION_NAME)
            settings["eval"] = VALIDATION_NAME
        orders = {
            "job": job.id,
            "settings": settings,
            "threads": self.threads,
            "gpu_memory_fraction": self.gpu_memory_fraction,
            "max_bundle_bytes": self.max_bundle_bytes,
        }
        (run / ORDERS).write_text(json.dumps(orders))
        self.tell_limits(job, run)
        return run

    def tell_limits(self, job: Job, run: Path) -> None:
        """Leave the tenant's present limits in a job's directory, if it has others: the process publishes within them.

        Raises:
            OSError: The disk is full.
        """
        limits = {tenant: dict(held) for tenant, held in self.quotas().items() if tenant in (job.tenant, DEFAULT)}
        if limits != read_limits(run):
            write_json(run / LIMITS, limits)

    def start(self, job: Job, paths: JobPaths) -> JobProcess:
        """Start the process of a job. Its directory may be that of an earlier process, which it goes on from.

        Raises:
            OSError: The disk is full, or no process can be made.
        """
        run = self.prepare(job, paths)
        # The child finds the modules that this process has found.
        modules = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {
            **os.environ,
            **one_gpu(self.device),
            "PYTHONPATH": modules,
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (run / LOG).open("wb") as log:
            # Its end of the pipe closes when this process ends, however it ends; then the child ends too.
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(run)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return JobProcess(job, run, child, self.timeout_s)


def one_gpu(device: str) -> dict[str, str]:
    """The variable that shows a process the server's GPU alone, as "cuda"; none for a CPU."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {}
    # The number counts the GPUs that the server's own variable shows.
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = int(index or 0)
    return {"CUDA_VISIBLE_DEVICES": shown[number] if shown else str(number)}


class JobProcess:
    """A running process of a job."""

    def __init__(self, job: Job, run: Path, child: subprocess.Popen[bytes], timeout_s: float | None) -> None:
        """Take a process that was started just now. It is overdue after `timeout_s`, or never."""
        self.job = job
        self.run = run
        self.recorded_at = 0.0
        self._overdue_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._child = child

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    @property
    def is_overdue(self) -> bool:
        """Whether it has run for longer than it may."""
        return time.monotonic() >= self._overdue_at

    def kill(self) -> None:
        """End the process and its own children at once. Idempotent: their number may be another process's by then."""
        if self._child.stdin is None or self._child.stdin.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._child.stdin.close()

    def log_tail(self) -> str:
        """The end of what the process has written, for the server's log."""
        with suppress(OSError), (self.run / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL))
            return file.read().decode("utf-8", "replace")
        return ""


def read_result(run: Path) -> dict[str, Any] | None:
    """The result that a process left in its directory, or None."""
    return _read_json(run / RESULT)


def read_limits(run: Path) -> dict[str, dict[str, Limit]] | None:
    """The limits of the settings file that a server left in a job's directory, by tenant, or None."""
    return _read_json(run / LIMITS)


def read_publishing(run: Path) -> dict[str, Any] | None:
    """The version that a process was about to publish, or None: `name` and `digest`."""
    return _read_json(run / PUBLISHING)


def read_progress(run: Path, begin: int, last: LastSteps) -> Reported:
    """Read the progress of a process from byte `begin` on, a bounded part of it.

    A process that goes on from a checkpoint reports steps again; those up to `last` are left out.
    """
    found = Reported(begin, last, [], [])
    try:
        with (run / PROGRESS).open("rb") as file:
            file.seek(begin)
            data = file.read(_MOST_READ)
    except OSError:
        return found
    whole = data.rfind(b"\n") + 1
    found.read += whole
    for line in data[:whole].splitlines():
        # A process that was killed may leave a part of a line.
        with suppress(ValueError, KeyError, TypeError):
            _take(json.loads(line), found)
    return found


def _take(entry: dict[str, Any], found: Reported) -> None:
    kind = entry.pop("type")
    if kind == "message":
        found.events.append(NewEvent(str(entry["message"])))
        return
    if kind == "saved":
        found.has_saved = True
        return
    step, total = int(entry["step"]), int(entry["total_steps"])
    if seconds := entry.pop("seconds_left", None):
        found.estimated_finish = time.time() + float(seconds)
    if kind == "checkpoint":
        metrics = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        metrics.pop("total_steps", None)
        found.checkpoints.append(Checkpoint(step, time.time(), None, metrics))
    elif kind == "metrics" and step > (found.last.evaluated if "eval_loss" in entry else found.last.trained):
        found.last = replace(found.last, **{"evaluated" if "eval_loss" in entry else "trained": step})
        # Of an evaluation, its metrics too; the time that it took is no metric.
        known = ["train_loss", *(name for name in entry if name.startswith("eval_") and name not in _TIMINGS)]
        shown = ", ".join(f"{name.replace('_', ' ')}={entry[name]:.4f}" for name in known if name in entry)
        found.events.append(NewEvent(f"Step {step}/{total}: {shown}", type="metrics", data=entry))


def clear(run: Path) -> None:
    """Delete a job's directory, which may be gone.

    Raises:
        OSError: Something of it is left. What else it held is deleted.
    """
    shutil.rmtree(run, ignore_errors=True)
    if run.exists():
        # Again, for the reason.
        shutil.rmtree(run)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file that is there whole, or not at all, and durable when this returns."""
    put_text(str(path), json.dumps(value), str(path.parent))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _link(target: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)
