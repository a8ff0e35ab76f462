"""A supervisor over a new store, with processes that do nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_store import AdapterStore, Published
from sera_serve.access import AccessDatabase
from sera_serve.jobs import Job, JobPaths, JobProcesses, Jobs, JobSpec, Supervisor, TrainingFiles
from sera_serve.jobs.process import JobProcess
from sera_serve.jobs.records import new_job_id
from support.training import SORTED, jsonl

SUCCESS = {"status": "succeeded", "version": 1, "digest": "d", "chosen_step": 3, "trained_tokens": 42}
STARTED: list[str] = []
CHILDREN: list[subprocess.Popen[bytes]] = []


class IdleProcesses(JobProcesses):
    """Starts processes that wait for their end. They write down what was started."""

    def start(self, job: Job, paths: JobPaths) -> JobProcess:
        """Start a process that sleeps."""
        run = paths.run(job.id)
        run.mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", "import time; time.sleep(600)"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        CHILDREN.append(child)
        STARTED.append(job.id)
        return JobProcess(job, run, child, self.timeout_s)


class Platform:
    """A database, files, jobs and a supervisor over a new store."""

    def __init__(self, root: Path) -> None:
        self.store = AdapterStore(root / "store")
        self.paths = JobPaths(self.store.root)
        self.database = AccessDatabase(self.store.root)
        self.files = TrainingFiles(self.database, self.paths, 1 << 20)
        self.jobs = Jobs(self.database, "base")
        self.processes = IdleProcesses("base", self.store.root, "cpu", "auto", 1, 0.1, 1 << 20)
        STARTED.clear()
        CHILDREN.clear()
        self.ended: list[Job] = []
        (root / "rows.jsonl").write_bytes(jsonl(SORTED))
        self.rows = root / "rows.jsonl"
        self.supervisor = self.new_supervisor()

    def check_use(self, job: Job) -> None:
        """Let each job use what it goes on from."""

    def new_supervisor(self, most: int = 1, base: str = "base") -> Supervisor:
        def note(job: Job, published: Published | None) -> None:
            self.ended.append(job)

        def withdraw(job: Job) -> None:
            self.store.delete(job.spec.adapter)

        jobs = self.jobs if base == "base" else Jobs(self.database, base)
        return Supervisor(
            jobs,
            self.files,
            self.paths,
            self.store,
            self.processes,
            most,
            withdraw,
            note,
            lambda job: self.check_use(job),
        )

    def create(self, tenant: str, metadata: Mapping[str, str] | None = None) -> Job:
        with self.rows.open("rb") as source:
            file = self.files.add(tenant, "rows.jsonl", source)
        job_id = new_job_id()
        spec = JobSpec("base", f"{tenant}/a-{job_id[-8:]}", "text", "classify", 1, 4, 1.0, 0, 12)
        return self.jobs.create(job_id, tenant, spec, metadata or {}, file.id, None, None)

    def leave(self, job: Job, **result: Any) -> None:
        """Leave a result, as a job's process does at its end."""
        run = self.paths.run(job.id)
        run.mkdir(exist_ok=True)
        (run / "result.json").write_text(json.dumps(result))

    def status(self, job: Job) -> str:
        return self.jobs.get(job.id, None).status
