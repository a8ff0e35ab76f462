"""Reads a plan: a YAML file with the settings of several training runs over one base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.option_text import check_options, read_yaml
from sera_serve.trainer.settings import TrainSettings, load_options

# One base, one store, one device: what the jobs of a plan share.
SHARED = ("base", "store", "device", "dtype", "work_dir", "resume", "quantize", "checkpoint_activations")
# Tasks whose rows are token ids, so that their batches can share a pass.
TEXT_TASKS = ("classify", "generate", "regress", "token-classify")
_KEYS = ("defaults", "together", "jobs")
_MOST_TOGETHER = 64
_MOST_JOBS = 10_000


@dataclass(frozen=True)
class Plan:
    """Several training runs.

    Attributes:
        jobs: Their settings, with equal values of `SHARED` and names of their own.
        together: The most jobs that train at the same time.
    """

    jobs: list[TrainSettings]
    together: int


def load_plan(path: Path, flags: Mapping[str, Any] | None = None) -> Plan:
    """Read a plan and check every job's options.

    Args:
        path: YAML with `jobs`, a list of options for each job; `defaults`, options of all jobs; and `together`.
        flags: Options that win over the file, by name of the field; None means that a flag was not given.

    Raises:
        InvalidConfiguration: The file cannot be read, or a job has an unknown, missing or impossible option, or two
            jobs do not fit in one plan. The message names the job.
    """
    plan = _read(path)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    defaults = plan.get("defaults")
    if defaults is None:
        defaults = {}
    check_options(defaults, f"--jobs {path}: defaults", "jobs", TrainSettings.model_fields)
    together = plan.get("together", 8)
    if isinstance(together, bool) or not isinstance(together, int) or not 1 <= together <= _MOST_TOGETHER:
        raise _refused(f"--jobs {path}: together is {together!r}; it must be a number from 1 to {_MOST_TOGETHER}")
    entries = plan.get("jobs")
    if not isinstance(entries, list) or not entries:
        raise _refused(f"--jobs {path}: jobs must be a list with the options of at least one job")
    if len(entries) > _MOST_JOBS:
        raise _refused(f"--jobs {path} has {len(entries)} jobs; the limit is {_MOST_JOBS}: write several plans")
    jobs = []
    for number, entry in enumerate(entries, 1):
        where = f"--jobs {path}: job {number}"
        options = {**defaults, **check_options(entry, where, "jobs", TrainSettings.model_fields), **given}
        where += f" ({options['name']})" if isinstance(options.get("name"), str) else ""
        try:
            jobs.append(load_options(None, options))
        except InvalidConfiguration as error:
            raise InvalidConfiguration(f"{where}: {error.message}", param=error.param) from error
    _check_together(jobs, path)
    return Plan(jobs, together)


def _check_together(jobs: list[TrainSettings], path: Path) -> None:
    first = jobs[0]
    names: dict[str, int] = {}
    for number, job in enumerate(jobs, 1):
        where = f"--jobs {path}: job {number} ({job.name})"
        for field in SHARED:
            if getattr(job, field) != getattr(first, field):
                raise _refused(
                    f"{where} has {field} {getattr(job, field)}, and job 1 has {getattr(first, field)}; the jobs of a "
                    "plan share it: put it into defaults, or write another plan",
                    field,
                )
        if job.task not in TEXT_TASKS:
            raise _refused(
                f"{where} is of task {job.task}; a plan takes {', '.join(TEXT_TASKS)}: train it alone", "task"
            )
        if job.packing:
            raise _refused(f"{where} has packing, whose rows have masks of their own; leave it out", "packing")
        if job.checkpoint_activations and job.dropout:
            raise _refused(
                f"{where} has dropout and checkpoint_activations, whose second pass would draw other numbers; leave "
                "one of them out, or train it alone",
                "dropout",
            )
        if job.name in names:
            raise _refused(
                f"{where} has the name of job {names[job.name]}; versions of one adapter are trained one after the "
                "other: give it another name, or write another plan",
                "name",
            )
        names[job.name] = number


def _read(path: Path) -> dict[str, Any]:
    value = read_yaml(path, "--jobs", "jobs")
    if not isinstance(value, dict):
        raise _refused(f"--jobs {path} must hold `defaults:` and `jobs:`")
    for key in value:
        if key not in _KEYS:
            raise _refused(f"--jobs {path}: unknown key {key!r}; the keys are {', '.join(_KEYS)}")
    return value


def _refused(message: str, param: str = "jobs") -> InvalidConfiguration:
    return InvalidConfiguration(message, param=param)
