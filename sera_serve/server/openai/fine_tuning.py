"""`/v1/fine_tuning/jobs`: training jobs, in OpenAI's form."""

from __future__ import annotations

import re
import secrets
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from adapters_store import AdapterConfig, AdapterStore, check_part, expected_shapes, file_bytes, parse_ref
from adapters_store.errors import InvalidAdapterName, InvalidBundle
from sera_serve.engine import ServingEngine
from sera_serve.errors import AdapterTooLarge, InvalidRequest
from sera_serve.jobs import Job, JobSpec, JobTask, TrainingFile
from sera_serve.jobs.files import TrainingFileMissing, missing_file
from sera_serve.jobs.records import new_job_id
from sera_serve.jobs.rows import TASK_OF, RowKind
from sera_serve.jobs.spec import BYTES_A_NUMBER, KEPT, SHAPE, auto_batch_size, auto_epochs, check_spec, method_of
from sera_serve.server.auth import Caller, NotYourTenant
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.errors import renamed_fields
from sera_serve.server.openai.errors import InvalidOpenAIRequest, OpenAIRoute
from sera_serve.server.openai.fine_tuning_schemas import (
    AdapterRequest,
    CheckpointList,
    CheckpointObject,
    CreateJobRequest,
    EventQuery,
    Hyperparameters,
    JobAdapter,
    JobEventList,
    JobFailure,
    JobList,
    JobListQuery,
    JobMethod,
    JobObject,
    JobQuery,
    SupervisedMethod,
)
from sera_serve.server.openai.job_events import (
    CHECKPOINT_PREFIX,
    EVENT_PREFIX,
    JobEventStream,
    event_object,
    number_after,
)
from sera_serve.server.openai.texts import adapter_of
from sera_serve.server.openapi import stream_of
from sera_serve.server.training import DEFAULT_TENANT, Training

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

JobPath = Annotated[str, Path(description="the id of a job")]

_SUFFIX = re.compile(r"[a-z0-9._-]{1,40}")
_ODD = re.compile(r"[^a-z0-9]+")
_BASE_CHARACTERS, _ID_CHARACTERS = 10, 10
_BY_METADATA = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "only jobs that have these pairs, as `metadata[KEY]=VALUE`",
            "schema": {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string"}},
        }
    ]
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": stream_of()}}


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: CreateJobRequest, context: ContextOf) -> JobObject:
    """Make a job that trains an adapter on a file, and publishes it."""
    init_from = adapter_of(body.model, context.engine)
    if init_from is not None:
        context.caller.check_use(init_from)
    job = await context.run(context.executors.changing, _create, body, init_from, context)
    context.training.supervisor.wake()
    return job_object(job)


@router.get("/v1/fine_tuning/jobs", openapi_extra=_BY_METADATA)
async def list_jobs(query: Annotated[JobListQuery, Query()], context: ContextOf) -> JobList:
    """The jobs, the newest first, a page at a time."""
    jobs, has_more = await context.run(
        context.executors.listing,
        context.training.jobs.page,
        context.caller.seen_tenant,
        query.after,
        query.limit,
        query.pairs,
    )
    return JobList(data=[job_object(job) for job in jobs], has_more=has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def retrieve_job(job_id: JobPath, context: ContextOf) -> JobObject:
    """One job."""
    return job_object(
        await context.run(context.executors.changing, context.training.jobs.get, job_id, context.caller.seen_tenant)
    )


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: JobPath, context: ContextOf) -> JobObject:
    """Cancel a job that has not finished. Its process ends within seconds, and leaves nothing."""
    job = await context.run(context.executors.changing, _cancel, context, job_id)
    context.training.supervisor.wake()
    return job_object(job)


@router.get("/v1/fine_tuning/jobs/{job_id}/events", response_model=JobEventList, responses=_STREAM)
async def list_events(
    job_id: JobPath, query: Annotated[EventQuery, Query()], context: ContextOf
) -> JobEventList | Response:
    """The events of a job, the newest first; or as they come, the oldest first."""
    after = number_after(query.after, EVENT_PREFIX, "an event")
    if query.stream:
        if "limit" in query.model_fields_set:
            raise InvalidRequest("a stream has all events; leave limit out", param="limit")
        return JobEventStream(job_id, context.caller, after, context.training, context.executors.changing)
    events, has_more = await context.run(
        context.executors.changing,
        context.training.jobs.events,
        job_id,
        context.caller.seen_tenant,
        after,
        query.limit,
    )
    return JobEventList(data=[event_object(event) for event in events], has_more=has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(job_id: JobPath, query: Annotated[JobQuery, Query()], context: ContextOf) -> CheckpointList:
    """The ends of a job's epochs with their metrics, the newest first."""
    after = number_after(query.after, CHECKPOINT_PREFIX, "the last item of the page")
    found, has_more = await context.run(
        context.executors.changing,
        context.training.jobs.checkpoints,
        job_id,
        context.caller.seen_tenant,
        after,
        query.limit,
    )
    data = [
        CheckpointObject(
            id=f"{CHECKPOINT_PREFIX}{held.step}",
            created_at=int(held.created_at),
            fine_tuned_model_checkpoint=held.model,
            fine_tuning_job_id=job_id,
            metrics=held.metrics,
            step_number=held.step,
        )
        for held in found
    ]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, first_id=first, last_id=last, has_more=has_more)


def job_object(job: Job) -> JobObject:
    """A job as clients read it."""
    spec = job.spec
    resolved = Hyperparameters(
        n_epochs=spec.epochs, batch_size=spec.batch_size, learning_rate_multiplier=spec.learning_rate_multiplier
    )
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=_second(job.finished_at),
        estimated_finish=_second(job.estimated_finish),
        model=spec.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.tenant,
        status=job.status,
        error=None if job.error is None else JobFailure(**job.error),
        hyperparameters=resolved,
        method=JobMethod(supervised=SupervisedMethod(hyperparameters=resolved)),
        seed=spec.seed,
        suffix=spec.suffix,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[] if job.result_file is None else [job.result_file],
        trained_tokens=job.trained_tokens,
        integrations=[],
        metadata=job.metadata,
        adapter=JobAdapter(
            name=spec.adapter,
            task=spec.task,
            init_from=spec.init_from,
            **{name: getattr(spec, name, spec.options.get(name)) for name in SHAPE},
        ),
    )


def _create(body: CreateJobRequest, init_from: str | None, context: RequestContext) -> Job:
    caller, engine, store, training = context.caller, context.engine, context.store, context.training
    if engine.base.image_tower is not None:
        raise InvalidOpenAIRequest(
            "the base takes images, and training files have texts; train with `train_adapter`, and publish the bundle",
            param="model",
        )
    shape = body.adapter or AdapterRequest()
    tenant = _tenant(shape, caller)
    train = _file(training, caller, body.training_file, "training_file")
    kind = _row_kind(train, "training_file")
    if body.validation_file is not None:
        validation = _file(training, caller, body.validation_file, "validation_file")
        if _row_kind(validation, "validation_file") != kind:
            raise InvalidOpenAIRequest(
                "the rows of validation_file are of another kind than those of training_file; send rows of one kind",
                param="validation_file",
            )
    job_id = new_job_id()
    adapter = f"{tenant}/{_name(body, init_from, engine, job_id)}"
    _check_task(shape, TASK_OF[kind], engine)
    # A version and no alias, which may move: a job that goes on after a kill must begin where it began.
    exact, initial = _initial(init_from, shape, TASK_OF[kind], store)
    spec = _spec(body, shape, adapter, kind, train.rows, exact, initial)
    planned = check_spec(spec, engine.base.info, engine.base.module_shapes(), train.labels, initial)
    # A job must not train for hours what is then refused.
    _check_servable(adapter, planned, initial is not None, context)
    key_id = None if caller.key is None else caller.key.id
    job = training.jobs.create(
        job_id,
        tenant,
        spec,
        body.metadata or {},
        body.training_file,
        body.validation_file,
        key_id,
        partial(context.quotas.check_training_jobs, tenant),
    )
    context.record("job.create", tenant, job.id, model=spec.model, adapter=spec.adapter)
    return job


def _check_servable(adapter: str, planned: AdapterConfig, goes_on: bool, context: RequestContext) -> None:
    """Refuse an adapter that this server could not serve, or not store, by the field of the body that decides it."""
    field, remedy = "adapter.rank", "send a smaller adapter.rank, or fewer adapter.target_modules"
    if goes_on:
        field, remedy = "model", "send a smaller adapter as model"
    elif 2 * planned.head_parameters > planned.parameters:
        field, remedy = "training_file", "send rows with fewer labels"
    nbytes, max_bundle_bytes = planned.parameters * BYTES_A_NUMBER, context.settings.max_upload_mib << 20
    try:
        context.engine.check_config(planned)
        if nbytes > max_bundle_bytes:
            raise AdapterTooLarge(
                f"the adapter takes {nbytes} bytes, a bundle may have {max_bundle_bytes}; raise max_upload_mib"
            )
    except AdapterTooLarge as error:
        error.message = f"{error.message}, or {remedy}"
        error.param = field
        raise
    except InvalidBundle as error:
        raise InvalidOpenAIRequest(error.message, param=field, code=error.code) from error
    tensors = [(name, "F32", shape) for name, shape in expected_shapes(planned).items()]
    # No field decides how many adapters there are.
    with renamed_fields({"bundle": field, "name": None}):
        context.holdings.check_publish(adapter, "", file_bytes(planned, tensors))


def _tenant(shape: AdapterRequest, caller: Caller) -> str:
    named = shape.tenant
    if named is None:
        return caller.tenant or DEFAULT_TENANT
    try:
        check_part(named, "adapter.tenant")
    except InvalidAdapterName as error:
        raise InvalidOpenAIRequest(error.message, param="adapter.tenant") from None
    if caller.seen_tenant not in (None, named):
        raise NotYourTenant(
            f"the key acts for tenant {caller.tenant!r}; leave adapter.tenant out", param="adapter.tenant"
        )
    return named


def _file(training: Training, caller: Caller, file_id: str, param: str) -> TrainingFile:
    file = training.files.get(file_id, caller.seen_tenant, param)
    # Its bytes are compared before the job runs. That they are there is told at once.
    if not training.files.path(file).exists():
        raise InvalidOpenAIRequest(missing_file(file_id, param).message, param=param, code=TrainingFileMissing.code)
    return file


def _row_kind(file: TrainingFile, param: str) -> RowKind:
    if file.kind == "metrics":
        raise InvalidOpenAIRequest(
            f"{file.id} has the metrics of a job; send a file of training rows, with the purpose fine-tune", param=param
        )
    return file.kind


def _name(body: CreateJobRequest, init_from: str | None, engine: ServingEngine, job_id: str) -> str:
    """The second part of the adapter's name: the base's, the suffix, and digits of the job's id, which no other has."""
    known = engine.base.name if init_from is None else parse_ref(init_from).parts[1]
    parts = [_ODD.sub("-", known.lower())[:_BASE_CHARACTERS].strip("-") or "ft"]
    if body.suffix is not None:
        if _SUFFIX.fullmatch(body.suffix) is None or ".." in body.suffix:
            raise InvalidOpenAIRequest(
                "suffix may have 1 to 40 of a-z, 0-9, '.', '_' and '-', without '..'", param="suffix"
            )
        parts.append(body.suffix)
    return "-".join([*parts, job_id.rpartition("-")[2][:_ID_CHARACTERS]])


def _check_task(shape: AdapterRequest, task: JobTask, engine: ServingEngine) -> None:
    """Refuse rows for another task than was asked for, or for one that the base does not have."""
    if shape.task not in (None, task):
        raise InvalidOpenAIRequest(
            f"the rows of training_file are for task {task}; send other rows, or leave adapter.task out",
            param="adapter.task",
        )
    if task == "generate" and engine.base.kind == "encoder":
        raise InvalidOpenAIRequest(
            "the base is an encoder, which cannot generate; send rows with text and label", param="training_file"
        )
    if task == "token-classify" and not engine.base.preprocessor.has_offsets:
        raise InvalidOpenAIRequest(
            "the base's tokenizer does not tell which characters a token stands for, which spans need; send other rows",
            param="training_file",
        )


def _initial(
    init_from: str | None, shape: AdapterRequest, task: JobTask, store: AdapterStore
) -> tuple[str | None, AdapterConfig | None]:
    """The version that a job goes on from, `tenant/name@vN`, and its configuration; None for a new adapter."""
    if init_from is None:
        return None, None
    for field in KEPT:
        if getattr(shape, field) is not None:
            raise InvalidOpenAIRequest(
                f"a job that goes on from an adapter keeps its {field}; leave adapter.{field} out",
                param=f"adapter.{field}",
            )
    found = store.resolve(init_from)
    of = "multi-label" if found.multi_label else found.task
    if of != task:
        raise InvalidOpenAIRequest(
            f"{init_from} is for task {of}, and the rows are for {task}; send other rows, or another model",
            param="model",
        )
    return f"{found.adapter}@v{found.version}", store.config(found.digest)


def _spec(
    body: CreateJobRequest,
    shape: AdapterRequest,
    adapter: str,
    kind: RowKind,
    rows: int,
    init_from: str | None,
    initial: AdapterConfig | None,
) -> JobSpec:
    asked = body.chosen
    multiplier = asked.learning_rate_multiplier
    return JobSpec(
        model=body.model,
        adapter=adapter,
        kind=kind,
        task=TASK_OF[kind],
        epochs=auto_epochs(rows) if asked.n_epochs == "auto" else asked.n_epochs,
        batch_size=auto_batch_size(rows) if asked.batch_size == "auto" else asked.batch_size,
        learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        rows=rows,
        suffix=body.suffix,
        init_from=init_from,
        method=shape.method,
        rank=shape.rank,
        split=shape.split,
        target_modules=shape.target_modules,
        kept_method=None if initial is None else method_of(initial),
        options={
            name: value
            for name in SHAPE
            if name not in JobSpec.__dataclass_fields__ and (value := getattr(shape, name)) is not None
        },
    )


def _cancel(context: RequestContext, job_id: str) -> Job:
    job = context.training.jobs.cancel(job_id, context.caller.seen_tenant)
    context.record("job.cancel", job.tenant, job.id)
    return job


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)
