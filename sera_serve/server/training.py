"""The training jobs of one app: files, jobs, and what runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from adapters_store import Published, parse_ref
from sera_serve.access import AccessControl, Actor, Quotas
from sera_serve.config import ServeSettings
from sera_serve.errors import Overloaded
from sera_serve.jobs import Job, JobPaths, JobProcesses, Jobs, Supervisor, TrainingFiles, base_id
from sera_serve.server.auth import unknown_adapter
from sera_serve.server.publishing import Publisher, record_publication
from sera_serve.threads import BoundedExecutor

DEFAULT_TENANT = "default"
"""The tenant of files and jobs where the server needs no key and the request names no tenant."""
_STREAMS, _TENANT_STREAMS = 64, 16
# The check of a file is Python code, which holds the interpreter's lock: it rests for as long as it works.
_CHECKING_REST = 1


class StreamSlots:
    """Counts the streams of events, each of which looks at the database; used on the event loop alone."""

    def __init__(self) -> None:
        self._taken: Counter[str | None] = Counter()

    @contextmanager
    def take(self, tenant: str | None) -> Iterator[None]:
        """Count one stream of a tenant's key, or of a caller who sees all.

        Raises:
            Overloaded: As many as allowed are open.
        """
        if self._taken[tenant] >= _TENANT_STREAMS or self._taken.total() >= _STREAMS:
            raise Overloaded("too many streams of events are open; read the events of a job without stream")
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1


@dataclass(frozen=True)
class Training:
    """Files and jobs of an app.

    Attributes:
        files: The files.
        jobs: The jobs.
        supervisor: Runs them.
        checking: The thread that checks uploaded files, one at a time.
        streams: Counts the streams of events.
    """

    files: TrainingFiles
    jobs: Jobs
    supervisor: Supervisor
    checking: BoundedExecutor
    streams: StreamSlots

    @classmethod
    def of(cls, settings: ServeSettings, publisher: Publisher, quotas: Quotas) -> Training:
        """Make what an app needs, which `publisher` has. Nothing runs yet, and nothing is read."""
        store, database, audit = publisher.store, publisher.access.database, publisher.audit
        paths = JobPaths(store.root)
        files = TrainingFiles(database, paths, settings.max_training_files_mib << 20)
        jobs = Jobs(database, base_id(publisher.engine.base.info))
        processes = JobProcesses(
            base=settings.base,
            store=store.root,
            device=settings.device,
            dtype=settings.dtype,
            quantize=settings.quantize,
            threads=settings.training_threads,
            timeout_s=settings.training_job_timeout_s,
            gpu_memory_fraction=settings.training_gpu_memory_fraction,
            max_bundle_bytes=settings.max_upload_mib << 20,
            quotas=quotas.of_settings,
        )

        def withdraw(job: Job) -> None:
            publisher.remove(job.spec.adapter, Actor("job", job.key_id))

        def record(job: Job, published: Published | None) -> None:
            """Tell the audit log of a job's end."""
            actor = Actor("job", job.key_id)
            if published is not None:
                record_publication(published, audit, actor)
            code = None if job.error is None else job.error["code"]
            model = job.fine_tuned_model
            audit.record(
                "job.finish", actor, tenant=job.tenant, target=job.id, status=job.status, model=model, code=code
            )

        supervisor = Supervisor(
            jobs,
            files,
            paths,
            store,
            processes,
            settings.max_training_jobs,
            withdraw,
            record,
            partial(check_initial, access=publisher.access),
        )
        return cls(
            files=files,
            jobs=jobs,
            supervisor=supervisor,
            checking=BoundedExecutor("training-files", 1, settings.max_uploads, _CHECKING_REST),
            streams=StreamSlots(),
        )

    def close(self) -> None:
        """Stop all jobs, which go on when a server of the store starts again. Blocks."""
        self.checking.close()
        self.supervisor.stop()


def check_initial(job: Job, access: AccessControl) -> None:
    """Refuse a job that goes on from an adapter that its tenant may not use any more, as a new job would be refused.

    A job of an admin, or of a caller who needed no key, may go on from every adapter. Blocks.

    Raises:
        AdapterNotFound: The adapter is not shared with the tenant any more.
        AccessDatabaseError: Nobody knows whether it is.
    """
    if job.spec.init_from is None or job.key_id is None:
        return
    # A share that ended a moment ago counts.
    access.refresh()
    adapter = parse_ref(job.spec.init_from).adapter
    if access.may_use(job.tenant, adapter):
        return
    if not any(key.id == job.key_id and key.may("admin") for key in access.keys.all()):
        raise unknown_adapter(adapter)
