"""Trains the jobs of a plan: one copy of the base, one bundle for each job."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress

from adapters_store import AdapterBundle, AdapterStore, Published, StoreError
from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.terminal import PlainConsole, system_fault
from sera_serve.trainer.activations import checkpointed_activations
from sera_serve.trainer.parallel import join_processes
from sera_serve.trainer.progress import ProgressBar, progress_bars
from sera_serve.trainer.run import train_adapter, usable_base
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.together.lockstep import Member, MemberTrainer, run_together
from sera_serve.trainer.together.plan import Plan
from sera_serve.trainer.together.records import PublishedJobs


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        name: tenant/name of its adapter.
        status: "trained", "published earlier" (by the same plan, before it was killed), or "failed".
        result: The fields of `TrainResult`; of a job that was published earlier `adapter`, `version`, `digest` and
            `metrics` alone; None of a failed job.
        error: Why it failed: type, message, param and code, as in the server's errors.
    """

    name: str
    status: str
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        rest = {"error": self.error} if self.result is None else self.result
        return {"name": self.name, "status": self.status, **rest}


def train_jobs(plan: Plan, *, base: FrozenBase | None = None, console: Console | None = None) -> list[JobResult]:
    """Train the jobs of a plan together and publish each adapter as its training ends.

    Each job is a whole training run, as `train_adapter` alone does it: same initial values, order of rows, optimiser,
    schedule, checkpoints and best epoch. Only the passes through the base are made together. A job that fails, or
    whose loss is not finite, ends alone. A killed plan goes on when it is started again: published jobs are not trained
    again, the others continue from their checkpoints.

    Args:
        plan: The jobs.
        base: A base that is already loaded from the plan's `base`. It is not changed.
        console: Shows the progress, one bar a job; with None nothing is shown.

    Returns:
        One result for each job, in the plan's order.

    Raises:
        InvalidConfiguration: The base cannot be used, or the command runs on several processes.
    """
    shown = console or Console(quiet=True)
    first = plan.jobs[0]
    if join_processes(first.device).count > 1:
        raise InvalidConfiguration("--jobs trains in one process; start it without accelerate launch", param="jobs")
    base = usable_base(first, base, shown)
    # Beside the runs' folders, whose names are tenant/name: no tenant's name begins with a dot.
    work = first.work_dir or first.folder_beside_store
    store = AdapterStore(first.store, create=True)
    records = PublishedJobs(
        work / ".published", store, base.info, resume=first.resume, owns_parent=first.work_dir is None
    )
    results: dict[int, JobResult] = {}
    with progress_bars(shown) as bars:
        members = []
        for key, settings in enumerate(plan.jobs):
            if (earlier := records.load(settings)) is not None:
                shown.print(f"{settings.name}: published earlier", highlight=False)
                results[key] = JobResult(settings.name, "published earlier", earlier)
            else:
                members.append(Member(key, _Job(settings, store, bars, records, results).train))
        with checkpointed_activations(base, first.checkpoint_activations):
            run_together(base, members, together=plan.together)
    if all(result.status != "failed" for result in results.values()):
        records.clear()
    return [results[key] for key in range(len(plan.jobs))]


@dataclass(frozen=True)
class _Job:
    """One job, and where its result goes."""

    settings: TrainSettings
    store: AdapterStore
    bars: Progress
    records: PublishedJobs
    results: dict[int, JobResult]

    def train(self, base: FrozenBase, member: Member) -> None:
        settings = self.settings
        lines = _lines_of(settings.name, self.bars.console)
        bar = ProgressBar(self.bars, settings.name)
        try:
            result = train_adapter(
                settings,
                base=base,
                console=lines,
                callbacks=[bar],
                publish=self._publish,
                make_trainer=functools.partial(MemberTrainer, member=member),
            )
        except (SeraServeError, StoreError) as error:
            self._fail(member.key, type(error).__name__, error.message, error.param, error.code)
        except OSError as error:
            self._fail(member.key, type(error).__name__, system_fault(error), None, "os_error")
        except Exception as error:  # noqa: BLE001 - a fault of one job must not end the others; it is told
            lines.print(traceback.format_exc(), markup=False, highlight=False)
            self._fail(member.key, type(error).__name__, str(error) or type(error).__name__, None, "internal_error")
        else:
            self.results[member.key] = JobResult(settings.name, "trained", asdict(result))
            lines.print(f"version {result.version} is published", highlight=False)
        finally:
            bar.close()

    def _publish(self, bundle: AdapterBundle, name: str) -> Published:
        published = self.store.publish(bundle, name)
        # While the checkpoints are still there: a kill at any moment finds one or the other.
        self.records.save(
            self.settings,
            {
                "adapter": published.adapter,
                "version": published.version,
                "digest": published.digest,
                "metrics": (bundle.config.training or {}).get("metrics", {}),
            },
        )
        return published

    def _fail(self, key: int, kind: str, message: str, param: str | None, code: str) -> None:
        lines = _lines_of(self.settings.name, self.bars.console)
        lines.print(f"failed: {message}", markup=False, highlight=False)
        error = {"type": kind, "message": message, "param": param, "code": code}
        self.results[key] = JobResult(self.settings.name, "failed", error=error)


@dataclass
class _Lines:
    """A text file whose lines go to a console, each with a name before it."""

    name: str
    emit: Callable[[str], None]
    _rest: str = field(default="", repr=False)

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.emit(f"{self.name}: {line}")
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but an unfinished line."""


def _lines_of(name: str, console: Console) -> Console:
    """A console without a terminal of its own, for the lines of one job."""

    def emit(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return PlainConsole(file=_Lines(name, emit), force_terminal=False, width=10_000)
