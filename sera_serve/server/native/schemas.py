"""The JSON of the HTTP interface. docs/http.md describes it for people; a test holds the two together."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from sera_serve.engine import ClassifyResult, GenerateParams, GenerationResult, Priority

MAX_NEW_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_INPUTS = 1024
MAX_TIMEOUT_S = 86_400
# Longest reference: tenant and name of 64 characters, "/", "@", 64 digits; more is cut short before anything parses it.
MAX_REFERENCE = 256

AdapterReference = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Input = Annotated[str, Field(min_length=1)]

_PRIORITY = "low, normal or high: which of its tenant's waiting requests go first; other tenants are unaffected"
_TIMEOUT = "seconds in which it must be finished, or else it is ended with 504; null is without end"


def refusal(message: str, field: str | None) -> PydanticCustomError:
    """A validation error with a message of ours; `field` becomes the answer's `param`."""
    # The braces of a message must not be read as a template.
    return PydanticCustomError("refused", "{reason}", {"reason": message, "field": field})


class RequestModel(BaseModel):
    """A request body: strict types, and no field that nothing reads."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_field(cls, value: Any) -> Any:
        known = list(cls.model_fields)
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name[:64], known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                raise PydanticCustomError(
                    "extra_forbidden",
                    "{reason}",
                    {"reason": f"{name[:64]!r} is not a field of this request; {hint}", "field": name[:64]},
                )
        return value


class GenerateRequest(RequestModel):
    """Body of `POST /v1/generate`."""

    adapter: AdapterReference | None = Field(
        None, description="tenant/name, optionally with @alias, @v3 or @digest; null is the bare base"
    )
    prompt: str | None = Field(None, min_length=1, description="text to continue")
    token_ids: list[TokenId] | None = Field(
        None, min_length=1, description="tokens to continue, taken as they are, in place of prompt"
    )
    max_new_tokens: int = Field(64, ge=1, le=MAX_NEW_TOKENS, description="the most tokens to generate")
    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens whose probabilities reach it")
    top_k: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="sample among this many likeliest tokens; 0 is all")
    seed: int | None = Field(None, ge=0, le=MAX_TOKEN_ID, description="repeats a sampled request; null draws one")
    stop: list[StopString] = Field(
        default_factory=list, max_length=16, description="strings that end the text, and are left out of it"
    )
    priority: Priority = Field("normal", description=_PRIORITY)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=_TIMEOUT)
    stream: bool = Field(False, description="answer with server-sent events")

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if self.prompt is None and self.token_ids is None:
            raise refusal("prompt is missing; send prompt (text) or token_ids (integers)", "prompt")
        if self.prompt is not None and self.token_ids is not None:
            raise refusal("token_ids and prompt are both given; send one of them", "token_ids")
        return self

    def to_params(self) -> GenerateParams:
        """The engine's form of the request."""
        return GenerateParams(**self.model_dump(exclude={"stream"}))


class Usage(BaseModel):
    """Tokens that a generation read and wrote."""

    prompt_tokens: int
    completion_tokens: int


class GenerateResponse(BaseModel):
    """Answer of `POST /v1/generate`, and its last event when it streams."""

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage

    @classmethod
    def of(cls, result: GenerationResult) -> GenerateResponse:
        """The answer for a finished generation."""
        usage = Usage(prompt_tokens=result.prompt_tokens, completion_tokens=result.completion_tokens)
        return cls(
            id=result.id,
            adapter=result.adapter,
            version=result.version,
            text=result.text,
            token_ids=result.token_ids,
            finish_reason=result.finish_reason,
            usage=usage,
        )


class GenerateEvent(BaseModel):
    """One event of a stream: what was added. The last one before `[DONE]` adds nothing and has the usage."""

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None


class ClassifyRequest(RequestModel):
    """Body of `POST /v1/classify`."""

    adapter: AdapterReference = Field(description="tenant/name, optionally with @alias, @v3 or @digest")
    inputs: list[Input] = Field(min_length=1, max_length=MAX_INPUTS, description="texts to classify")
    priority: Priority = Field("normal", description=_PRIORITY)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=_TIMEOUT)


class Classification(BaseModel):
    """The likeliest label of one input, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class ClassifyResponse(BaseModel):
    """Answer of `POST /v1/classify`, results in the order of the inputs."""

    adapter: str
    version: int
    results: list[Classification]

    @classmethod
    def of(cls, result: ClassifyResult) -> ClassifyResponse:
        """The answer for a finished classification."""
        rows = [Classification(label=row.label, probabilities=row.probabilities) for row in result.results]
        return cls(adapter=result.adapter, version=result.version, results=rows)


class PublishedAdapter(BaseModel):
    """Answer of `POST /v1/adapters`."""

    adapter: str
    version: int
    digest: str


class AdapterSummary(BaseModel):
    """One adapter in a listing: its latest version."""

    adapter: str
    version: int
    digest: str
    task: Literal["generate", "classify"]
    method: str
    base: str
    labels: list[str] | None
    ranks: list[int] = Field(description="different ranks among its layers, ascending")
    splits: list[int] = Field(description="different splits among its layers, ascending")
    modules: int = Field(description="how many layers it adapts")
    parameters: int
    bytes: int
    created_at: str


class AdapterList(BaseModel):
    """Answer of `GET /v1/adapters`; `next` is the `after` of the next page, null on the last one."""

    adapters: list[AdapterSummary]
    next: str | None


class AdapterDetail(AdapterSummary):
    """Answer of `GET /v1/adapters/{tenant}/{name}`: one version with its whole configuration."""

    versions: list[int]
    aliases: dict[str, int]
    config: dict[str, JsonValue]


class PinnedAdapter(BaseModel):
    """Answer of `PUT` and `DELETE /v1/adapters/{tenant}/{name}/pin`."""

    adapter: str
    version: int
    pinned: bool


class DeletedAdapter(BaseModel):
    """Answer of `DELETE /v1/adapters/{tenant}/{name}`."""

    adapter: str
    deleted: Literal[True] = True


class ListQuery(BaseModel):
    """Query of `GET /v1/adapters`."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="adapters a page")
    after: str | None = Field(None, max_length=MAX_REFERENCE, description="the last adapter of the page before")
    tenant: str | None = Field(None, max_length=MAX_REFERENCE, description="only this tenant's")


class ErrorDetail(BaseModel):
    """What went wrong, and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class Health(BaseModel):
    """Answer of `GET /healthz` and `GET /readyz`."""

    status: Literal["alive", "ready"]
