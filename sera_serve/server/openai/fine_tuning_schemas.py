"""Bodies of `/v1/fine_tuning/jobs`, in OpenAI's shapes, with an `adapter` object of this server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from adapters_store import Pooling
from sera_serve.jobs import JobStatus, JobTask
from sera_serve.jobs.records import EventType, Level
from sera_serve.server.openai.fields import METADATA_HELP, Metadata, ModelName, check_metadata
from sera_serve.server.openai.files import MAX_ID
from sera_serve.server.strict import QueryModel, RequestModel, refusal, with_example

MAX_RANK = 256
_MAX_TARGETS, _MAX_TARGET = 64, 128
_MAX_PATTERNS, _MAX_WILDCARDS = 32, 8
_MAX_ALPHA = 65_536.0

Auto = Literal["auto"]


def _few_and_simple(value: Any, info: ValidationInfo) -> Any:
    """Refuse too many patterns, and patterns with many wildcards: each is compared with the path of every layer.

    Before their types are checked: an error object for each of 20,000 wrong values took the event loop 0.1 s.
    """
    if not isinstance(value, dict | list):
        return value
    field, most = f"adapter.{info.field_name}", _MAX_PATTERNS if isinstance(value, dict) else _MAX_TARGETS
    if len(value) > most:
        raise refusal(f"{field} has {len(value)} patterns; send at most {most}", field)
    for pattern in value:
        if isinstance(pattern, str) and sum(map(pattern.count, "*?[")) > _MAX_WILDCARDS:
            raise refusal(
                f"{pattern[:64]!r} has more than {_MAX_WILDCARDS} of '*', '?' and '['; name layers with fewer", field
            )
    return value


Target = Annotated[str, Field(min_length=1, max_length=_MAX_TARGET)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=_MAX_ALPHA)]
RankPattern = Annotated[dict[Target, Rank], Field(min_length=1, max_length=_MAX_PATTERNS)]
AlphaPattern = Annotated[dict[Target, Alpha], Field(min_length=1, max_length=_MAX_PATTERNS)]
TrainingMethod = Literal[
    "sera", "sera-freeze-a", "sera-freeze-b", "sera-c-only", "lora", "melora", "moslora", "lora-fa", "head-only"
]
FileId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


def _different(factors: list[str]) -> list[str]:
    if len(set(factors)) != len(factors):
        raise refusal("train_factors has a factor twice; name each once", "adapter.train_factors")
    return factors


def _no_integrations(value: Any) -> Any:
    if value:
        raise refusal("the server has no integrations; leave integrations out", "integrations")
    return value


class HyperparametersRequest(RequestModel):
    """How to train; `auto` chooses by the number of rows."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = Field(
        default="auto", description="passes over the rows; auto is 3, and up to 10 for fewer than 1,000 rows"
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto", description="rows a step; auto is 4 to 16, a 32nd of the rows"
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = Field(
        default="auto", description="factor of the method's own learning rate; auto is 1"
    )


class SupervisedRequest(RequestModel):
    """The one method of training."""

    hyperparameters: HyperparametersRequest | None = Field(
        None, description="how to train; absent: auto for each of them"
    )


class MethodRequest(RequestModel):
    """How to train: supervised alone. OpenAI's dpo and reinforcement are refused."""

    type: Literal["supervised"] = Field(description="only supervised")
    supervised: SupervisedRequest | None = Field(None, description="the options of the method")


class AdapterRequest(RequestModel):
    """What adapter to train; no part of OpenAI's interface."""

    tenant: str | None = Field(
        default=None, min_length=1, max_length=64, description="whose the job and the adapter are"
    )
    task: JobTask | None = Field(default=None, description="what the rows are for; it must be just that")
    method: TrainingMethod | None = Field(default=None, description="kind of adapter, and which of its factors train")
    rank: Rank | None = Field(default=None, description="rank of the update of a layer")
    split: Rank | None = Field(
        default=None, description="segments of a layer's factors; it must divide the rank and the layer's widths"
    )
    lora_alpha: Alpha | None = Field(default=None, description="the update's scale is lora_alpha / rank")
    target_modules: (
        Literal["all-linear"] | Annotated[list[Target], Field(min_length=1, max_length=_MAX_TARGETS)] | None
    ) = Field(default=None, description="names or patterns of linear layers")
    rank_pattern: RankPattern | None = Field(default=None, description="rank by names or patterns of layers")
    split_pattern: RankPattern | None = Field(default=None, description="split by names or patterns of layers")
    alpha_pattern: AlphaPattern | None = Field(default=None, description="lora_alpha by names or patterns of layers")
    train_factors: (
        Annotated[list[Literal["a", "c", "b"]], Field(min_length=1, max_length=3), AfterValidator(_different)] | None
    ) = Field(default=None, description="the factors that train")
    lora_plus_ratio: float | None = Field(
        default=None, gt=0, le=1000, description="LoRA+: the learning rate of B over that of A and C"
    )
    budget: float | None = Field(
        default=None, gt=0, le=MAX_RANK, description="rank allocation: the mean rank of a layer at the end"
    )
    budget_warmup: float | None = Field(default=None, ge=0, lt=1, description="part of the steps before ranks fall")
    budget_final: float | None = Field(default=None, gt=0, lt=1, description="part of the steps after they have fallen")
    pooling: Pooling | None = Field(default=None, description="how the states of a text become one")

    _patterns = field_validator("target_modules", "rank_pattern", "split_pattern", "alpha_pattern", mode="before")(
        _few_and_simple
    )


class CreateJobRequest(RequestModel):
    """Request body of `POST /v1/fine_tuning/jobs`."""

    model_config = with_example({"model": "demo/chat", "training_file": "file-...", "suffix": "mine"})

    model: ModelName = Field(description="the base, or an adapter to go on from")
    training_file: FileId = Field(description="id of an uploaded file, whose rows train")
    validation_file: FileId | None = Field(
        None,
        description="id of a file with rows of the same kind, which choose the best epoch; absent: a tenth of the "
        "training rows is held out",
    )
    suffix: Annotated[str, Field(min_length=1, max_length=40)] | None = Field(
        None, description="part of the adapter's name: a-z, 0-9, '.', '_' and '-'"
    )
    seed: int | None = Field(None, ge=0, lt=2**31, description="makes the training repeatable; absent: a seed is drawn")
    method: MethodRequest | None = Field(None, description="how to train; not together with hyperparameters")
    hyperparameters: HyperparametersRequest | None = Field(None, description="the older place of hyperparameters")
    metadata: Metadata | None = Field(None, description=f"{METADATA_HELP}; the list of jobs can ask for them")
    integrations: Annotated[list[JsonValue], Field(max_length=0), BeforeValidator(_no_integrations)] | None = Field(
        None, description="only an empty list: the server has none"
    )
    adapter: AdapterRequest | None = Field(
        None, description="what adapter to train; what is left out is the trainer's own choice"
    )

    @model_validator(mode="after")
    def _one_place(self) -> CreateJobRequest:
        if self.hyperparameters is not None and self.method is not None:
            raise refusal("send the hyperparameters in method.supervised alone", "hyperparameters")
        return self

    @property
    def chosen(self) -> HyperparametersRequest:
        """The hyperparameters, from whichever place."""
        supervised = None if self.method is None else self.method.supervised
        given = self.hyperparameters if supervised is None else supervised.hyperparameters
        return given or HyperparametersRequest()


class Hyperparameters(BaseModel):
    """The hyperparameters of a job; no value is `auto` any more."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class SupervisedMethod(BaseModel):
    """The hyperparameters of the one method."""

    hyperparameters: Hyperparameters


class JobMethod(BaseModel):
    """The method of a job."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedMethod


class JobFailure(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobAdapter(BaseModel):
    """The adapter of a job. A null is the trainer's own choice, or that of the adapter that the job goes on from."""

    name: str
    task: JobTask
    init_from: str | None = Field(description="the version that the job goes on from")
    method: str | None
    rank: int | None
    split: int | None
    lora_alpha: float | None
    target_modules: str | list[str] | None
    rank_pattern: dict[str, int] | None
    split_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    train_factors: list[str] | None
    lora_plus_ratio: float | None
    budget: float | None
    budget_warmup: float | None
    budget_final: float | None
    pooling: str | None


class JobObject(BaseModel):
    """A job, as OpenAI's clients read it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(description="seconds since 1970, as all times here")
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = Field(description="the tenant")
    status: JobStatus
    error: JobFailure | None
    hyperparameters: Hyperparameters
    method: JobMethod
    seed: int
    suffix: str | None
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="the file of the metrics, once the job has succeeded")
    trained_tokens: int | None
    integrations: list[str] = Field(description="always empty")
    metadata: dict[str, str]
    adapter: JobAdapter


class JobList(BaseModel):
    """Response body of `GET /v1/fine_tuning/jobs`."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class JobEventObject(BaseModel):
    """Something that happened to a job. `data` of type metrics has the figures of a step."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Level
    message: str
    type: EventType
    data: dict[str, Any]


class JobEventList(BaseModel):
    """Response body of `GET /v1/fine_tuning/jobs/{job_id}/events`."""

    object: Literal["list"] = "list"
    data: list[JobEventObject]
    has_more: bool


class CheckpointObject(BaseModel):
    """The end of an epoch, with its metrics."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str | None = Field(
        description="the version that was published of this epoch: the best one; null for the others"
    )
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class CheckpointList(BaseModel):
    """Response body of `GET /v1/fine_tuning/jobs/{job_id}/checkpoints`."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobQuery(QueryModel):
    """Query parameters of lists of jobs and checkpoints."""

    after: str | None = Field(None, max_length=MAX_ID, description="the last item of the previous page")
    limit: int = Field(20, ge=1, le=100, description="most items on a page")


class JobListQuery(JobQuery):
    """Query parameters of the list of jobs: also `metadata[KEY]=VALUE` for each pair that a job must have.

    FastAPI has no parameters with such names. So the model takes extra parameters, and refuses all but these.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _only_metadata(self) -> JobListQuery:
        pairs: dict[str, str] = {}
        for name, value in (self.model_extra or {}).items():
            key = name.removeprefix("metadata[").removesuffix("]")
            if len(key) == len(name) - len("metadata[]"):
                pairs[key] = value
            elif name != "metadata":
                raise refusal(
                    f"{name[:64]!r} is not a query parameter of this route; they are after, limit and metadata[KEY]",
                    name[:64],
                )
            elif value != "null":
                raise refusal("send metadata[KEY]=VALUE, or metadata=null for jobs without metadata", "metadata")
        check_metadata(pairs)
        if pairs and "metadata" in (self.model_extra or {}):
            raise refusal("metadata=null asks for jobs without metadata; leave it, or metadata[KEY], out", "metadata")
        return self

    @property
    def pairs(self) -> dict[str, str] | None:
        """The pairs that a job must have; without one, jobs without metadata are asked for, and None asks for all."""
        given = self.model_extra or {}
        if not given:
            return None
        return {name[len("metadata[") : -1]: value for name, value in given.items() if name != "metadata"}


class EventQuery(JobQuery):
    """Query parameters of `GET /v1/fine_tuning/jobs/{job_id}/events`."""

    stream: bool = Field(
        False, description="send the events as they come, the oldest first, until the job has finished"
    )
