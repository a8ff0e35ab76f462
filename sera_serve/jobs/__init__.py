"""Training jobs of tenants: their files, the queue, and the processes that train.

`sera_serve.jobs.worker` is the program of such a process. Nothing else imports it: it needs the trainer.
"""

from sera_serve.jobs.files import (
    TrainingFile,
    TrainingFileNotFound,
    TrainingFiles,
    missing_files,
)
from sera_serve.jobs.paths import JobPaths
from sera_serve.jobs.process import JobProcesses
from sera_serve.jobs.records import (
    Job,
    JobEnded,
    JobEvent,
    JobNotFound,
    Jobs,
    JobStatus,
    base_id,
)
from sera_serve.jobs.rows import JobTask
from sera_serve.jobs.spec import JobSpec
from sera_serve.jobs.supervisor import Supervisor

__all__ = [
    "Job",
    "JobEnded",
    "JobEvent",
    "JobNotFound",
    "JobPaths",
    "JobProcesses",
    "JobSpec",
    "JobStatus",
    "JobTask",
    "Jobs",
    "Supervisor",
    "TrainingFile",
    "TrainingFileNotFound",
    "TrainingFiles",
    "base_id",
    "missing_files",
]
