"""Runs sections in processes of their own: checks side by side, then everything else one at a time.

Processes are forked from one that has imported torch and transformers and touched no GPU: importing them again takes
seconds for each section.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from benchmarks.gpu.plan import Section
from benchmarks.gpu.record import Record, Row
from benchmarks.gpu.setting import Options, SectionSkipped, Setting

# A section with many points stops by itself this long before its process is killed.
_MARGIN_S = 5.0
_POLL_S = 0.02


@dataclass
class _Running:
    """A section's process."""

    section: Section
    pid: int
    started: float
    kill_at: float


class Supervisor:
    """Runs sections and knows how each ended."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.record = Record(options.record_path)
        self.sections: list[Row] = []

    def run(self, sections: Sequence[Section]) -> None:
        """Run all sections; returns when the last process has ended or was killed."""
        self._run_checks([section for section in sections if section.is_check])
        for section in sections:
            if not section.is_check:
                blocked = next(filter(None, map(self._wrong, section.needs)), None)
                if blocked is not None:
                    self._ended(section.name, "blocked", f"{blocked}: no speed is reported", 0.0)
                elif not self._out_of_time(section):
                    self._wait_for(self._start(section))

    def correct(self, sections: Iterable[Section]) -> bool:
        """Whether every check of these that can run here was made, and none of these sections found an error."""
        sections = list(sections)
        names, checks = {each.name for each in sections}, [each.name for each in sections if each.is_check]
        if any(row["section"] in names and row.get("correct") is False for row in self.record.rows()):
            return False
        return not any(map(self._wrong, checks)) and any(self._status(name) == "done" for name in checks)

    def failed(self) -> bool:
        """Whether any section ended by an error."""
        return any(section["status"] in ("failed", "killed") for section in self.sections)

    def _run_checks(self, checks: list[Section]) -> None:
        """Side by side: this also compiles their kernels in parallel, for the sections to come too."""
        most = max(2, os.cpu_count() or 1)
        waiting, running = list(checks), list[_Running]()
        while waiting or running:
            while waiting and len(running) < most:
                section = waiting.pop(0)
                if not self._out_of_time(section):
                    running.append(self._start(section))
            running = [process for process in running if not self._has_ended(process)]
            time.sleep(_POLL_S)

    def _start(self, section: Section) -> _Running:
        self._say(f"{section.name} begins")
        started = time.monotonic()
        kill_at = min(started + section.limit_s, self.options.deadline)
        sys.stdout.flush()
        with warnings.catch_warnings():
            # numpy's library has threads that sleep; it takes care of them itself when a process forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _run_in_child(section, self.options, kill_at - _MARGIN_S)
        return _Running(section, pid, started, kill_at)

    def _wait_for(self, process: _Running) -> None:
        while not self._has_ended(process):
            time.sleep(_POLL_S)

    def _has_ended(self, process: _Running) -> bool:
        """Whether a process has ended; it is killed where its time is over."""
        pid, status = os.waitpid(process.pid, os.WNOHANG)
        seconds = time.monotonic() - process.started
        name = process.section.name
        if pid == 0 and time.monotonic() < process.kill_at:
            return False
        # Servers and other processes that the section has started, too.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if pid == 0:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            over = "the budget was spent" if process.kill_at == self.options.deadline else "its limit"
            self._ended(name, "killed", f"after {seconds:.0f} s, {over}", seconds)
            return True
        told = [row for row in self.record.rows() if row["section"] == name and "status" in row]
        if told:
            self._ended(name, told[-1]["status"], told[-1]["reason"], seconds, recorded=True)
        else:
            code = os.waitstatus_to_exitcode(status)
            self._ended(name, "failed", f"its process ended with {code}", seconds)
        return True

    def _out_of_time(self, section: Section) -> bool:
        if time.monotonic() < self.options.deadline:
            return False
        self._ended(section.name, "not reached", "the time budget was spent; raise --budget-s", 0.0)
        return True

    def _ended(self, name: str, status: str, reason: str | None, seconds: float, recorded: bool = False) -> None:
        at = round(time.monotonic() - self.options.started, 1)
        row = {"status": status, "reason": reason, "seconds": round(seconds, 1), "at": at}
        self.sections.append({"section": name, **row})
        if not recorded:
            self.record.add(name, row)
        self._say(f"{name}: {status}" + (f", {reason}" if reason else ""))

    def _status(self, name: str) -> str | None:
        return next((str(section["status"]) for section in self.sections if section["section"] == name), None)

    def _wrong(self, name: str) -> str | None:
        """Why nothing that rests on this check may be timed, or None. A check that cannot run here forbids nothing."""
        status = self._status(name)
        if status == "skipped":
            return None
        if status != "done":
            return f"the check {name!r} was not made ({status})"
        rows = [row["correct"] for row in self.record.rows() if row["section"] == name and "correct" in row]
        if not rows:
            return f"the check {name!r} has checked nothing"
        return None if all(rows) else f"{rows.count(False)} of {len(rows)} cases of {name!r} are wrong"

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.options.started:6.1f} s] {text}", file=sys.stderr, flush=True)


def _run_in_child(section: Section, options: Options, deadline: float) -> None:
    """Run a section in the process just forked, and end the process."""
    code = 1
    try:
        # A group of its own, so that all that it starts is killed with it.
        os.setsid()
        log = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if options.has_gpu and not _sees_gpu():
            # What was imported before the fork has started CUDA: begin again without it.
            arguments = [section.name, json.dumps(asdict(options)), str(deadline)]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.supervisor", *arguments])
        run_section(section, options, deadline)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the ends of libraries: after an error of the device they may wait for ever.
        os._exit(code)


def _sees_gpu() -> bool:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError):
        return False
    return True


def run_section(section: Section, options: Options, deadline: float) -> None:
    """Run a section in this process. Its rows, and how it ended, are in the record."""
    import torch

    record = Record(options.record_path)
    started = time.monotonic()
    status, reason = "done", None
    if options.small:
        # Sections share few cores with others.
        torch.set_num_threads(1)
    try:
        setting = Setting.of(options, deadline)
        function = getattr(importlib.import_module(f"benchmarks.gpu.{section.module}"), section.function)
        arguments = () if section.argument is None else (section.argument,)
        with torch.no_grad():
            for row in function(setting, *arguments):
                record.add(section.name, row)
    except SectionSkipped as error:
        status, reason = "skipped", str(error)
    except Exception as error:  # noqa: BLE001 - it is reported, and the other sections go on
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"[:2000]
    at = time.monotonic() - options.started
    ended = {"status": status, "reason": reason, "seconds": round(time.monotonic() - started, 1), "at": round(at, 1)}
    record.add(section.name, ended)


def preload() -> None:
    """Import what most sections need, without starting CUDA."""
    for name in ("transformers.models.llama.modeling_llama", "sera_serve.engine", "adapters_store"):
        with suppress(ImportError):
            importlib.import_module(name)
    # Objects that no child will free: a collection there would copy their pages.
    gc.freeze()


def main(arguments: list[str]) -> None:
    """Run one section in a process of its own that was not forked: NAME OPTIONS DEADLINE."""
    from benchmarks.gpu.plan import COMMANDS

    name, options, deadline = arguments
    parsed = Options(**json.loads(options))
    section = next(section for section in COMMANDS[parsed.command][0] if section.name == name)
    run_section(section, parsed, float(deadline))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
