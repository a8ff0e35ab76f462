"""Request and response bodies of the native routes. docs/http.md describes them, and a test compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from sera_serve.engine import ClassifyResult, GenerateParams, GenerationResult, Priority, TokenDelta
from sera_serve.server.deps import TokenStream
from sera_serve.server.strict import RequestModel, refusal

MAX_NEW_TOKENS = 1 << 20
MAX_TOKEN_IDS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_INPUTS = 1024
MAX_TIMEOUT_S = 86_400
MAX_CACHE_SALT = 64
# Validation of a list stops at its first wrong element, and at the first element too many. An error object for each of
# a body's 350,000 wrong elements took seconds on the event loop.

# The longest reference has a tenant and a name of 64 characters each, "/", "@" and 64 digits. A longer text is refused
# before it is parsed.
MAX_REFERENCE = 256

AdapterReference = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Input = Annotated[str, Field(min_length=1)]

_PRIORITY = "low, normal or high: the order among waiting requests of one tenant; other tenants are unaffected"
_TIMEOUT = "seconds until the request must be finished; a later request is ended with 504; null is no limit"


class GenerateRequest(RequestModel):
    """Body of `POST /v1/generate`."""

    adapter: AdapterReference | None = Field(
        None, description="tenant/name, optionally with @alias, @v3 or @digest; null is the base model"
    )
    prompt: str | None = Field(None, min_length=1, description="text to continue")
    token_ids: list[TokenId] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TOKEN_IDS,
        fail_fast=True,
        description="token ids to continue, in place of prompt; no token is added",
    )
    max_new_tokens: int = Field(64, ge=1, le=MAX_NEW_TOKENS, description="maximum number of tokens to generate")
    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature; 0 takes the most likely token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the most likely tokens that together have this probability"
    )
    top_k: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="sample among this many most likely tokens; 0 is all")
    seed: int | None = Field(None, ge=0, le=MAX_TOKEN_ID, description="repeats a sampled request; null draws a seed")
    stop: list[StopString] = Field(
        default_factory=list,
        max_length=16,
        fail_fast=True,
        description="strings that end the text; the text leaves them out",
    )
    priority: Priority = Field("normal", description=_PRIORITY)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=_TIMEOUT)
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CACHE_SALT,
        description="requests under different salts share nothing in the prefix cache",
    )
    stream: bool = Field(False, description="respond with server-sent events")

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if self.prompt is None and self.token_ids is None:
            raise refusal("prompt is missing; send prompt (text) or token_ids (integers)", "prompt")
        if self.prompt is not None and self.token_ids is not None:
            raise refusal("token_ids and prompt are both given; send one of them", "token_ids")
        return self

    def to_params(self) -> GenerateParams:
        """Return the request as the engine takes it."""
        # `model_dump` would copy the token ids one by one.
        fields = dict(self)
        del fields["stream"]
        return GenerateParams(**fields)


class Usage(BaseModel):
    """Number of tokens of the prompt, and of generated tokens."""

    prompt_tokens: int
    completion_tokens: int


class GenerateResponse(BaseModel):
    """Response body of `POST /v1/generate` without streaming."""

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage

    @classmethod
    def of(cls, result: GenerationResult) -> GenerateResponse:
        """Return the body for a finished generation."""
        return cls(
            id=result.id,
            adapter=result.adapter,
            version=result.version,
            text=result.text,
            token_ids=result.token_ids,
            finish_reason=result.finish_reason,
            usage=_usage(result),
        )


class GenerateEvent(BaseModel):
    """One event of a stream: the added text and tokens. The last event before `[DONE]` adds none and has the usage."""

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None


def delta_event(stream: TokenStream, delta: TokenDelta) -> dict[str, Any]:
    """Return the JSON of a `GenerateEvent` that adds a delta. The JSON has no usage."""
    return _event(stream, text=delta.text, token_ids=delta.token_ids).model_dump(exclude={"usage"})


def final_event(stream: TokenStream, result: GenerationResult) -> dict[str, Any]:
    """Return the JSON of the last `GenerateEvent`, with the finish reason and the usage."""
    return _event(stream, finish_reason=result.finish_reason, usage=_usage(result)).model_dump()


def _event(
    stream: TokenStream,
    text: str = "",
    token_ids: Sequence[int] = (),
    finish_reason: Literal["stop", "length"] | None = None,
    usage: Usage | None = None,
) -> GenerateEvent:
    return GenerateEvent(
        id=stream.id,
        adapter=stream.adapter,
        version=stream.version,
        text=text,
        token_ids=list(token_ids),
        finish_reason=finish_reason,
        usage=usage,
    )


def _usage(result: GenerationResult) -> Usage:
    return Usage(prompt_tokens=result.prompt_tokens, completion_tokens=result.completion_tokens)


class ClassifyRequest(RequestModel):
    """Body of `POST /v1/classify`."""

    adapter: AdapterReference = Field(description="tenant/name, optionally with @alias, @v3 or @digest")
    inputs: list[Input] = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True, description="texts to classify")
    priority: Priority = Field("normal", description=_PRIORITY)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=_TIMEOUT)


class Classification(BaseModel):
    """The most likely label of one input, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


class ClassifyResponse(BaseModel):
    """Response body of `POST /v1/classify`. The results are in the order of the inputs."""

    adapter: str
    version: int
    results: list[Classification]

    @classmethod
    def of(cls, result: ClassifyResult) -> ClassifyResponse:
        """Return the body for a finished classification."""
        rows = [Classification(label=row.label, probabilities=row.probabilities) for row in result.results]
        return cls(adapter=result.adapter, version=result.version, results=rows)


class PublishedAdapter(BaseModel):
    """Response body of `POST /v1/adapters`."""

    adapter: str
    version: int
    digest: str


class AdapterSummary(BaseModel):
    """The latest version of one adapter, as a list shows it."""

    adapter: str
    version: int
    digest: str
    task: Literal["generate", "classify"]
    method: str
    base: str
    labels: list[str] | None
    ranks: list[int] = Field(description="distinct ranks of the adapted layers, ascending")
    splits: list[int] = Field(description="distinct splits of the adapted layers, ascending")
    modules: int = Field(description="number of adapted layers")
    parameters: int
    bytes: int
    created_at: str


class AdapterList(BaseModel):
    """Response body of `GET /v1/adapters`. `next` is the `after` of the next page, and null on the last page."""

    adapters: list[AdapterSummary]
    next: str | None


class AdapterDetail(AdapterSummary):
    """Response body of `GET /v1/adapters/{tenant}/{name}`: one version with its whole configuration."""

    versions: list[int]
    aliases: dict[str, int]
    config: dict[str, JsonValue]


class PinnedAdapter(BaseModel):
    """Response body of `PUT` and `DELETE /v1/adapters/{tenant}/{name}/pin`."""

    adapter: str
    version: int
    pinned: bool


class DeletedAdapter(BaseModel):
    """Response body of `DELETE /v1/adapters/{tenant}/{name}`."""

    adapter: str
    deleted: Literal[True] = True


class ListQuery(BaseModel):
    """Query parameters of `GET /v1/adapters`."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="maximum number of adapters on a page")
    after: str | None = Field(None, max_length=MAX_REFERENCE, description="the last adapter of the previous page")
    tenant: str | None = Field(None, max_length=MAX_REFERENCE, description="list only adapters of this tenant")
