"""Makes the runs of a plan that are not in its file of results yet, in the plan's order."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.baselines import NEED_ADAPTERS
from sera_serve.trainer.compare.learning_rates import LearningRateRule
from sera_serve.trainer.compare.plan import LOWER_IS_BETTER, Cell, ComparePlan, Purpose, RunSpec
from sera_serve.trainer.compare.results import ResultsFile
from sera_serve.trainer.schedule import SCHEDULE

_WORKER = "sera_serve.trainer.compare.worker"
# A base that differs by more than this between two environments is not the same base.
_PROBE_TOLERANCE = 1e-3


class CompareRunner:
    """Runs a plan.

    Args:
        plan: The plan.
        results: Its results so far; this adds to them.
        console: Shows a progress bar and one line for each run that ended.
        adapters_python: Python of an environment with the library `adapters`, or None.
        hold: A command that is started before each run. It gets a line and repeats it when the run may begin; its input
            is closed after the run. So `flock FILE cat` holds a lock during each run, and not between runs.
        retry_failed: Make runs again that failed.
        python: Python of all other runs.
    """

    def __init__(
        self,
        plan: ComparePlan,
        results: ResultsFile,
        console: Console,
        *,
        adapters_python: str | None = None,
        hold: str | None = None,
        retry_failed: bool = False,
        python: str = sys.executable,
    ) -> None:
        self.plan = plan
        self.results = results
        self.console = console
        self.adapters_python = adapters_python
        self.python = python
        self.hold = hold
        self._retry_failed = retry_failed
        # Digests of the runs that this object has made.
        self._own: set[str] = set()
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._specs: dict[tuple[str, str, str, int, float | None, str], RunSpec] = {}
        self._made = 0
        self._limit: int | None = None

    def _spec(self, cell: Cell, seed: int, rate: float | None, purpose: Purpose) -> RunSpec:
        key = (cell.base, cell.data, cell.variant.label, seed, rate, purpose)
        if key not in self._specs:
            self._specs[key] = self.plan.spec(cell, seed, rate, purpose)
        return self._specs[key]

    def pending(self) -> list[tuple[Cell, int]]:
        """Return the runs that count and are not finished, in order."""
        return [(cell, seed) for cell, seed in self.plan.ordered() if self.finished(cell, seed) is None]

    def finished(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """Return the record of a run that counts, or None if it is not finished."""
        known, rate = self._rate(cell)
        return self._record(self._spec(cell, seed, rate, "score")) if known else None

    def _record(self, spec: RunSpec) -> dict[str, Any] | None:
        record = self.results.records.get(spec.digest)
        is_retried = record is not None and "error" in record and self._retry_failed and spec.digest not in self._own
        return None if is_retried else record

    def _rate(self, cell: Cell) -> tuple[bool, float | None]:
        """Return (whether the rate is known, the rate or None for the method's default)."""
        rule = self._rule(cell)
        if rule is None:
            return True, cell.variant.learning_rate
        tried = self._tried(rule, cell)
        return (False, None) if rule.next_rate(tried) is not None else (True, rule.best(tried))

    def _rule(self, cell: Cell) -> LearningRateRule | None:
        """The rule that chooses the cell's rate; None where the rate is fixed, or is the method's default."""
        return self.plan.learning_rates if cell.variant.learning_rate is None else None

    def _tried(self, rule: LearningRateRule, cell: Cell) -> dict[float, tuple[float, float]]:
        """Return (mean score, minus mean loss) of each rate whose runs are finished."""
        cells, tried = self.plan.tuning_cells(rule, cell), {}
        for rate in rule.ladder:
            records = [self._record(self._spec(each, rule.seed, rate, "rate")) for each in cells]
            done = [record for record in records if record is not None]
            if len(done) == len(cells):
                tried[rate] = judge(done, [self.plan.score_of(each.data) for each in cells])
        return tried

    def run(self, limit: int | None = None) -> None:
        """Make every pending run, or at most `limit` runs, those for learning rates included.

        Raises:
            RunInProgress: Another comparison writes to the same results.
            InvalidConfiguration: The results are of another schedule of the learning rate; or a process cannot be
                started, or ends before its first run.
        """
        self._made, self._limit = 0, limit
        total = len(self.plan.ordered())
        progress = Progress(
            TextColumn("compare"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        try:
            with self.results.exclusive(), progress:
                pending = self.pending()
                if pending:
                    self.results.check_schedule()
                bar = progress.add_task("", total=total, completed=total - len(pending), now="")
                for cell, seed in pending:
                    progress.update(bar, now=f"{cell.base} {cell.data} {cell.variant.label} seed {seed}")
                    if not self._settle_rate(cell):
                        return
                    _, rate = self._rate(cell)
                    spec = self._spec(cell, seed, rate, "score")
                    if self._record(spec) is None and not self._make(spec, cell):
                        return
                    progress.advance(bar)
        finally:
            for worker in self._workers.values():
                _end(worker)
            self._workers.clear()

    def _settle_rate(self, cell: Cell) -> bool:
        """Make the runs that choose the cell's learning rate. Return False if the limit was reached."""
        rule = self._rule(cell)
        if rule is None:
            return True
        while (rate := rule.next_rate(self._tried(rule, cell))) is not None:
            for each in self.plan.tuning_cells(rule, cell):
                spec = self._spec(each, rule.seed, rate, "rate")
                if self._record(spec) is None and not self._make(spec, each):
                    return False
        return True

    def _make(self, spec: RunSpec, cell: Cell) -> bool:
        """Make one run and keep its result. Return False if the limit was reached."""
        if self._limit is not None and self._made >= self._limit:
            return False
        self._made += 1
        started = time.monotonic()
        # Each is another base to compute with, under one name.
        form = {"base": cell.base, "dtype": spec.settings.get("dtype"), "quantize": spec.settings.get("quantize")}
        result = self._same_base(form, self._train(spec))
        score = self.plan.score_of(cell.data)
        if "error" not in result:
            name = score
            # The rows to test on may be a split of the folder of the training rows, which no option names.
            if spec.purpose == "score" and (
                spec.settings.get("test") is not None or f"test_{score}" in result["metrics"]
            ):
                name = f"test_{score}"
            if name in result["metrics"]:
                result["score"] = result["metrics"][name]
            else:
                known = ", ".join(result["metrics"]) or "none: give rows to test or evaluate on"
                result = {"error": f"the run has no metric {name!r}; it has {known}"}
        record = {
            "run": spec.digest,
            "purpose": spec.purpose,
            **form,
            "data": cell.data,
            "method": cell.variant.label,
            "seed": spec.settings["seed"],
            "learning_rate": spec.settings.get("learning_rate"),
            "schedule": SCHEDULE,
            "wall_seconds": round(time.monotonic() - started, 1),
            **result,
        }
        self._own.add(spec.digest)
        self.results.add(record)
        shown = f"{score} {record['score']:.4f}" if "score" in record else f"failed: {record['error']}"
        rate = record["learning_rate"]
        self.console.print(
            f"{cell.base} {cell.data} {cell.variant.label} seed {record['seed']}"
            f"{f' rate {rate:g}' if rate is not None else ''}: {shown} ({record['wall_seconds']} s)",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        return True

    def _train(self, spec: RunSpec) -> dict[str, Any]:
        python = self.python
        if spec.baseline is not None and spec.baseline["method"] in NEED_ADAPTERS and self.adapters_python is not None:
            python = self.adapters_python
        with self._held():
            worker = self._worker(python)
            assert worker.stdin is not None and worker.stdout is not None
            # A run for the choice of a rate scores no test rows, not even those of a folder with a split for them.
            test_rows = spec.test_rows if spec.purpose == "score" else 0
            run = {"settings": spec.settings, "baseline": spec.baseline, "test_rows": test_rows}
            try:
                worker.stdin.write(json.dumps(run) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            del self._workers[python]
            status = _end(worker)
            return {"error": f"the process {python} -m {_WORKER} ended with status {status}; see standard error"}
        result: dict[str, Any] = json.loads(line)
        return result

    def _same_base(self, form: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Refuse a result of another base than the finished runs had, be it of another environment or another folder.

        Args:
            form: Base, dtype and quantization, as records name them.
            result: Of the run.
        """
        probe = result.get("base_probe")
        for record in self.results.records.values():
            first = record.get("base_probe")
            if probe is None or first is None or any(record.get(name) != value for name, value in form.items()):
                continue
            if abs(probe - first) > _PROBE_TOLERANCE * abs(first):
                return {
                    "error": f"base {form['base']} computes other states than in earlier runs (norm {probe:.6g} "
                    f"instead of {first:.6g}); it may be another base, which needs another name in the plan, or this "
                    "run's transformers may not know the base's configuration"
                }
            break
        return result

    def _worker(self, python: str) -> subprocess.Popen[str]:
        worker = self._workers.get(python)
        if worker is None:
            # The environment of `adapters` need not have this package installed.
            root = Path(__file__).parents[3]
            paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(paths),
                "TOKENIZERS_PARALLELISM": "false",
                # Progress bars of libraries do not belong between the lines of the comparison.
                "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            try:
                worker = subprocess.Popen(
                    [python, "-m", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
                )
            except OSError as error:
                raise InvalidConfiguration(f"{python} cannot be started: {error.strerror}", param="python") from error
            assert worker.stdout is not None
            try:
                ready = worker.stdout.readline()
            except KeyboardInterrupt:
                # It does not hear Ctrl-C, and looks at its input only when its libraries are imported.
                worker.kill()
                worker.wait()
                raise
            if not ready:
                raise InvalidConfiguration(
                    f"{python} cannot make runs: its process ended with status {_end(worker)} before the first one; "
                    "standard error says why, such as a package that the environment lacks",
                    param="python",
                )
            self._workers[python] = worker
        return worker

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if self.hold is None:
            yield
            return
        try:
            holder = subprocess.Popen(
                shlex.split(self.hold), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except (OSError, ValueError, IndexError) as error:
            raise InvalidConfiguration(f"--hold {self.hold!r} cannot be started: {error}", param="hold") from error
        assert holder.stdin is not None and holder.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                holder.stdin.write("begin\n")
            if not holder.stdout.readline():
                raise InvalidConfiguration(
                    f"--hold {self.hold!r} ended without an answer; give a command that repeats its input, such as "
                    "'flock FILE cat'",
                    param="hold",
                )
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                holder.stdin.close()
            holder.stdout.close()
            holder.wait()


def _end(worker: subprocess.Popen[str]) -> int:
    """End a worker and its run: it ends by itself when its input closes. Return its exit status."""
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()
    try:
        status = worker.wait(timeout=10)
    except subprocess.TimeoutExpired:
        worker.kill()
        status = worker.wait()
    worker.stdout.close()
    return status


def judge(records: list[dict[str, Any]], scores: list[str]) -> tuple[float, float]:
    """Return (mean score, minus mean loss), higher is better; minus infinity if a run failed."""
    if any("error" in record or not math.isfinite(record["score"]) for record in records):
        return -math.inf, -math.inf
    signed = [-r["score"] if name in LOWER_IS_BETTER else r["score"] for r, name in zip(records, scores, strict=True)]
    losses = [record["metrics"]["loss"] for record in records]
    return sum(signed) / len(signed), -sum(losses) / len(losses)
