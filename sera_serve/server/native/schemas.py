"""Request and response bodies of the native routes. docs/http.md describes them, and a test compares the two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters_store import MAX_PARTS, Published, Task
from sera_serve.engine import (
    AdapterChoice,
    ClassifyResult,
    ConstraintSpec,
    GenerateParams,
    GenerationResult,
    GenerationStream,
    HeadResult,
    LabelScores,
    LabelSet,
    Priority,
    Score,
    Tier,
    TokenDelta,
    WeightedAdapter,
)
from sera_serve.server.native.inputs import ClassifyInputs
from sera_serve.server.native.sampling import (
    MAX_TOKEN_ID,
    SamplingFields,
    ScoredToken,
    TokenId,
    logprob_pieces,
    logprobs_content,
)
from sera_serve.server.response_format import (
    GRAMMAR_HELP,
    REGEX_HELP,
    RESPONSE_FORMAT_HELP,
    Grammar,
    Regex,
    ResponseFormat,
    to_constraint,
)
from sera_serve.server.sse import EventWriter, encode_event
from sera_serve.server.strict import QueryModel, RequestModel, refusal, with_example

MAX_NEW_TOKENS = 1 << 20
MAX_TOKEN_IDS = 1 << 20
MAX_TIMEOUT_S = 86_400
MAX_CACHE_SALT = 64
# Validation of a list stops at its first wrong element, and at the first element too many. An error object for each of
# a body's 350,000 wrong elements took seconds on the event loop.

# The longest reference has a tenant and a name of 64 characters each, "/", "@" and 64 digits. A longer text is refused
# before it is parsed.
MAX_REFERENCE = 256

MAX_CLASSIFIERS = 128
# Larger weights are of no use, and would only overflow.
MAX_WEIGHT = 1e6

AdapterReference = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _parts(value: Any) -> AdapterChoice | None:
    """One reference, or a list of parts with weights. Reading stops at the first wrong element."""
    if value is None or (isinstance(value, str) and 1 <= len(value) <= MAX_REFERENCE):
        return value
    if isinstance(value, str):
        raise refusal(f"adapter must have 1 to {MAX_REFERENCE} characters, such as tenant/name", "adapter")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise refusal(
            f"adapter must be a string such as tenant/name, or a list of 1 to {MAX_PARTS} adapters with weights",
            "adapter",
        )
    return [_part(part, f"adapter[{index}]") for index, part in enumerate(value)]


def _part(value: Any, place: str) -> WeightedAdapter:
    if not isinstance(value, dict) or value.keys() != {"adapter", "weight"}:
        raise refusal(f"{place} must be an object with the fields adapter and weight, and no other", place)
    adapter, weight = value["adapter"], value["weight"]
    if not isinstance(adapter, str) or not 1 <= len(adapter) <= MAX_REFERENCE:
        raise refusal(f"{place}.adapter must be a string such as tenant/name", f"{place}.adapter")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
        raise refusal(f"{place}.weight must be a number of -{MAX_WEIGHT:,.0f} to {MAX_WEIGHT:,.0f}", f"{place}.weight")
    return WeightedAdapter(adapter, float(weight))


_ADAPTER_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_REFERENCE},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_PARTS,
            "items": {
                "type": "object",
                "required": ["adapter", "weight"],
                "additionalProperties": False,
                "properties": {
                    "adapter": {
                        "type": "string",
                        "minLength": 1,
                        "maxLength": MAX_REFERENCE,
                        "description": "tenant/name, optionally with @alias, @v3 or @digest",
                    },
                    "weight": {
                        "type": "number",
                        "minimum": -MAX_WEIGHT,
                        "maximum": MAX_WEIGHT,
                        "description": "factor of the adapter's update",
                    },
                },
            },
        },
        {"type": "null"},
    ]
}
AdapterField = Annotated[AdapterChoice | None, PlainValidator(_parts), WithJsonSchema(_ADAPTER_SCHEMA)]

PRIORITY_HELP = "low, normal or high: the order among waiting requests of one tenant; other tenants are unaffected"
TIMEOUT_HELP = "seconds until the request must be finished; a later request is ended with 504; null is no limit"
CACHE_SALT_HELP = "requests under different salts share nothing in the prefix cache"


class GenerateRequest(SamplingFields):
    """Body of `POST /v1/generate`."""

    model_config = with_example(
        {"adapter": "demo/pirate", "prompt": "The little cat found a map.", "max_new_tokens": 40}
    )

    _constraint: ConstraintSpec | None = PrivateAttr(None)

    adapter: AdapterField = Field(
        None,
        description="tenant/name, optionally with @alias, @v3 or @digest; or a weighted sum of several; null is the "
        "base model",
    )
    prompt: str | None = Field(None, min_length=1, description="text to continue")
    token_ids: list[TokenId] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TOKEN_IDS,
        fail_fast=True,
        description="token ids to continue, in place of prompt; no token is added",
    )
    max_new_tokens: int | None = Field(
        64, ge=1, le=MAX_NEW_TOKENS, description="maximum number of tokens to generate; null is until the context ends"
    )
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
    priority: Priority = Field("normal", description=PRIORITY_HELP)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=TIMEOUT_HELP)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_CACHE_SALT, description=CACHE_SALT_HELP)
    response_format: ResponseFormat | None = Field(None, description=RESPONSE_FORMAT_HELP)
    regex: Regex | None = Field(None, description=REGEX_HELP)
    grammar: Grammar | None = Field(None, description=GRAMMAR_HELP)
    stream: bool = Field(False, description="respond with server-sent events")

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if self.prompt is None and self.token_ids is None:
            raise refusal("prompt is missing; send prompt (text) or token_ids (integers)", "prompt")
        if self.prompt is not None and self.token_ids is not None:
            raise refusal("token_ids and prompt are both given; send one of them", "token_ids")
        if self.stream and self.prompt_logprobs is not None:
            raise refusal("prompt_logprobs is not part of a stream; send stream false", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> GenerateRequest:
        self._constraint = to_constraint(self.response_format, self.regex, self.grammar)
        return self

    def to_params(self, priority: Priority) -> GenerateParams:
        """Return the request as the engine takes it, with the priority that its tenant may have."""
        # `model_dump` would copy the token ids one by one.
        fields = dict(self) | {"priority": priority}
        for name in ("stream", "response_format", "regex", "grammar"):
            del fields[name]
        return GenerateParams(**fields, constraint=self._constraint)


class Usage(BaseModel):
    """Number of tokens of the prompt, and of generated tokens."""

    prompt_tokens: int
    completion_tokens: int


class GenerateResponse(BaseModel):
    """Response body of `POST /v1/generate` without streaming, for one answer.

    `stop_reason` is absent where no stop string and no token of `stop_token_ids` ended the text. `logprobs` and
    `prompt_logprobs` are absent where they were not asked for.
    """

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    stop_reason: str | int | None = None
    logprobs: list[ScoredToken] | None = None
    prompt_logprobs: list[ScoredToken] | None = None


class Choice(BaseModel):
    """One of several answers. `stop_reason` and `logprobs` are absent as in `GenerateResponse`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    logprobs: list[ScoredToken] | None = None


class ChoicesResponse(BaseModel):
    """Response body of `POST /v1/generate` without streaming, for `n` over 1. The usage has the tokens of all."""

    id: str
    adapter: str | None
    version: int | None
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[ScoredToken] | None = None


def answer_pieces(results: Sequence[GenerationResult], params: GenerateParams) -> Iterator[str]:
    """Yield the JSON of a `GenerateResponse`, or of a `ChoicesResponse` for several results, in small pieces.

    Log-probabilities may have 100 MB.
    """
    first = results[0]
    whole: dict[str, Any] = {"id": first.id, "adapter": first.adapter, "version": first.version}
    yield f"{json.dumps(whole, ensure_ascii=False)[:-1]}, "
    if len(results) == 1:
        yield from _member_pieces(first, params)
    else:
        yield '"choices": ['
        for index, result in enumerate(results):
            yield f'{", " if index else ""}{{"index": {index}, '
            yield from _member_pieces(result, params)
            yield "}"
        yield "]"
    completion = sum(result.completion_tokens for result in results)
    usage = json.dumps({"prompt_tokens": first.prompt_tokens, "completion_tokens": completion})
    yield f', "usage": {usage}'
    if params.prompt_logprobs is not None:
        yield ', "prompt_logprobs": '
        yield from logprob_pieces(first.prompt_logprobs)
    yield "}"


def _member_pieces(result: GenerationResult, params: GenerateParams) -> Iterator[str]:
    """Yield the members of an answer, without braces."""
    answer: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
    }
    if result.stop_reason is not None:
        answer["stop_reason"] = result.stop_reason
    yield json.dumps(answer, ensure_ascii=False)[1:-1]
    if params.logprobs is not None:
        yield ', "logprobs": '
        yield from logprob_pieces(result.logprobs)


class GenerateEvent(BaseModel):
    """One event of a stream: the added text and tokens. The last event of an answer adds none and has the usage.

    `index` is absent where `n` is 1. `stop_reason` and `logprobs` are absent as in `GenerateResponse`.
    """

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    index: int | None = None
    stop_reason: str | int | None = None
    logprobs: list[ScoredToken] | None = None


class GenerateEvents(EventWriter):
    """Writes the events of a stream."""

    def __init__(self, params: GenerateParams) -> None:
        self._params = params

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """The event that adds text or tokens."""
        content: dict[str, Any] = {"text": delta.text, "token_ids": delta.token_ids, "finish_reason": None}
        if self._params.logprobs is not None:
            content["logprobs"] = logprobs_content(delta.logprobs)
        return self._event(index, stream, content)

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """The event at the end of one answer."""
        usage = {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens}
        content: dict[str, Any] = {"text": "", "token_ids": [], "finish_reason": result.finish_reason, "usage": usage}
        if result.stop_reason is not None:
            content["stop_reason"] = result.stop_reason
        return self._event(index, stream, content)

    def _event(self, index: int, stream: GenerationStream, content: dict[str, Any]) -> bytes:
        event: dict[str, Any] = {"id": stream.id, "adapter": stream.adapter, "version": stream.version}
        if self._params.n > 1:
            event["index"] = index
        return encode_event(event | content)


class ClassifyRequest(RequestModel):
    """Body of `POST /v1/classify`."""

    model_config = with_example({"adapter": "demo/tickets", "inputs": ["My parcel is late.", "I was charged twice."]})

    adapter: AdapterField = Field(
        None, description="tenant/name, optionally with @alias, @v3 or @digest; or a weighted sum of several"
    )
    adapters: list[AdapterReference] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CLASSIFIERS,
        fail_fast=True,
        description="in place of adapter: every input goes through each of these, of one tenant",
    )
    inputs: ClassifyInputs = Field(description="texts, sentence pairs or images to classify")
    priority: Priority = Field("normal", description=PRIORITY_HELP)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=TIMEOUT_HELP)

    @model_validator(mode="after")
    def _adapter_or_adapters(self) -> ClassifyRequest:
        if self.adapters is not None:
            if self.adapter is not None:
                raise refusal("adapters and adapter are both given; send one of them", "adapters")
        elif self.adapter is None:
            reason = "adapter is missing; send adapter, or adapters for several"
            # A classification needs a head, which the base model has not.
            kind = "refused" if "adapter" in self.model_fields_set else "missing"
            raise PydanticCustomError(kind, "{reason}", {"reason": reason, "field": "adapter"})
        return self


class Classification(BaseModel):
    """The most likely label of one input, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


class LabelSetResult(BaseModel):
    """The labels of one input that may have several or none: those of a probability of at least 0.5."""

    labels: list[str]
    probabilities: dict[str, float] = Field(description="of each label on its own; they do not add up to 1")


class ScoreResult(BaseModel):
    """The number of one input."""

    score: float


class FoundSpan(BaseModel):
    """A span of one input."""

    start: int = Field(description="its first character, counted from 0 in Unicode code points")
    end: int = Field(description="the character after its last one")
    label: str
    score: float = Field(description="mean probability of the tags of its tokens")
    text: str


class SpansResult(BaseModel):
    """The spans of one input, in the order of their places."""

    spans: list[FoundSpan]
    truncated: bool = Field(description="whether the input is longer than 64 windows; its rest has no spans")


class ClassifyResponse(BaseModel):
    """Response body of `POST /v1/classify`. The results are in the order of the inputs.

    Their form is that of the adapter's task: `classify` and `image-classify` (a label, or with several labels an input
    a list of them), `regress` (a number), `token-classify` (spans).
    """

    adapter: str
    version: int | None = Field(description="null for a weighted sum")
    results: list[Classification] | list[LabelSetResult] | list[ScoreResult] | list[SpansResult]


class ClassifyEachResponse(BaseModel):
    """Response body of `POST /v1/classify` with `adapters`. The answers are in the order of the adapters."""

    adapters: list[ClassifyResponse]


def pieces_of_each(results: Sequence[ClassifyResult]) -> Iterator[str]:
    """Yield the JSON of a `ClassifyEachResponse` in small pieces: it may have a hundred thousand numbers."""
    yield '{"adapters":['
    for number, result in enumerate(results):
        if number:
            yield ","
        yield from pieces_of(result)
    yield "]}"


def pieces_of(result: ClassifyResult) -> Iterator[str]:
    """Yield the JSON of a `ClassifyResponse` in small pieces."""
    head = ClassifyResponse(adapter=result.adapter, version=result.version, results=[])
    yield head.model_dump_json().removesuffix("]}")
    for number, row in enumerate(result.results):
        if number:
            yield ","
        yield from _row_pieces(row)
    yield "]}"


def _row_pieces(row: HeadResult) -> Iterator[str]:
    # Nothing is to be checked.
    if isinstance(row, LabelScores):
        yield Classification.model_construct(label=row.label, probabilities=row.probabilities).model_dump_json()
    elif isinstance(row, LabelSet):
        yield LabelSetResult.model_construct(labels=row.labels, probabilities=row.probabilities).model_dump_json()
    elif isinstance(row, Score):
        yield ScoreResult.model_construct(score=row.score).model_dump_json()
    else:
        tail = SpansResult(spans=[], truncated=row.truncated).model_dump_json()
        before, _, after = tail.partition("[]")
        yield f"{before}["
        for number, span in enumerate(row.spans):
            written = FoundSpan.model_construct(**vars(span)).model_dump_json()
            yield f",{written}" if number else written
        yield f"]{after}"


class LoadLoraRequest(RequestModel):
    """Body of `POST /v1/load_lora_adapter`, with vLLM's names."""

    model_config = with_example({"lora_name": "acme/mine", "lora_path": "mine"})

    lora_name: AdapterReference = Field(description="tenant/name to publish the adapter under")
    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="path below the server's lora_path_root, absolute or relative to it",
    )
    load_inplace: bool = Field(False, description="whether an adapter of this name may get a new version")


class UnloadLoraRequest(RequestModel):
    """Body of `POST /v1/unload_lora_adapter`, with vLLM's names."""

    model_config = with_example({"lora_name": "acme/mine"})

    lora_name: AdapterReference = Field(description="tenant/name of the adapter to delete")
    lora_int_id: None = Field(None, description="vLLM's own number of an adapter; only null is accepted")


class PublishedAdapter(BaseModel):
    """Response body of `POST /v1/adapters`."""

    adapter: str
    version: int
    digest: str
    warnings: list[str] = []

    @classmethod
    def of(cls, version: Published, warnings: Sequence[str]) -> PublishedAdapter:
        """A version that was published, and what an import had to say."""
        return cls(adapter=version.adapter, version=version.version, digest=version.digest, warnings=list(warnings))


class AdapterSummary(BaseModel):
    """The latest version of one adapter, as a list shows it."""

    adapter: str
    version: int
    digest: str
    task: Task
    method: str
    base: str
    labels: list[str] | None
    ranks: list[int] = Field(description="distinct ranks of the adapted layers, ascending")
    splits: list[int] = Field(description="distinct splits of the adapted layers, ascending")
    modules: int = Field(description="number of adapted layers")
    has_chat_template: bool = Field(description="whether the adapter brings a chat template")
    parameters: int
    bytes: int
    created_at: str
    tier: Tier = Field(description="where this version is now: on the device, in the host cache, or in the store")
    pinned: bool = Field(description="whether this version is kept on the device")


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


class ListQuery(QueryModel):
    """Query parameters of `GET /v1/adapters`."""

    limit: int = Field(100, ge=1, le=1000, description="maximum number of adapters on a page")
    after: str | None = Field(None, max_length=MAX_REFERENCE, description="the last adapter of the previous page")
    tenant: str | None = Field(None, max_length=MAX_REFERENCE, description="list only adapters of this tenant")
