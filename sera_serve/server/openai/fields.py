"""The fields that routes which generate share: sampling, limits, streaming, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from sera_serve.engine import MAX_CHOICES, MIN_REPETITION_PENALTY, ConstraintSpec, GenerateParams, Priority
from sera_serve.server.native.sampling import MAX_TOKEN_ID, LogitBias, TokenId
from sera_serve.server.native.schemas import (
    CACHE_SALT_HELP,
    MAX_CACHE_SALT,
    MAX_NEW_TOKENS,
    MAX_REFERENCE,
    MAX_TIMEOUT_S,
    PRIORITY_HELP,
    TIMEOUT_HELP,
    StopString,
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
from sera_serve.server.strict import RequestModel, refusal

MAX_STOP = 16
MAX_USER = 512
_MAX_METADATA, _MAX_METADATA_KEY, _MAX_METADATA_VALUE = 16, 64, 512


def _stop(value: Any) -> Any:
    """One string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def check_metadata(value: Any) -> Any:
    """Refuse notes that are too many, too long, or not texts. What is no object is left to the type."""
    if not isinstance(value, dict):
        return value
    if len(value) > _MAX_METADATA:
        raise refusal(f"metadata has {len(value)} keys; send at most {_MAX_METADATA}", "metadata")
    for key, text in value.items():
        if len(key) > _MAX_METADATA_KEY or not isinstance(text, str) or len(text) > _MAX_METADATA_VALUE:
            raise refusal(
                f"metadata must have keys of at most {_MAX_METADATA_KEY} characters, and strings of at most "
                f"{_MAX_METADATA_VALUE}",
                "metadata",
            )
    return value


Metadata = Annotated[dict[str, str], BeforeValidator(check_metadata)]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP, fail_fast=True),
    BeforeValidator(_stop, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)]),
]
User = Annotated[str, Field(max_length=MAX_USER)]

METADATA_HELP = (
    f"up to {_MAX_METADATA} strings of {_MAX_METADATA_VALUE} characters, by names of {_MAX_METADATA_KEY} characters"
)
STREAM_OPTIONS_HELP = "what a stream has beside its text; refused without stream: true"


class Obfuscation(RequestModel):
    """Options of a stream whose last event has the usage."""

    include_obfuscation: bool | None = Field(None, description="only false: this server adds no padding to events")

    @model_validator(mode="after")
    def _no_obfuscation(self) -> Obfuscation:
        if self.include_obfuscation:
            raise refusal("include_obfuscation is not supported; leave it out", "stream_options.include_obfuscation")
        return self


class StreamOptions(Obfuscation):
    """What a stream has beside its text."""

    include_usage: bool | None = Field(None, description="send the usage as one more event before [DONE]")


class OpenAIFields(RequestModel):
    """The fields of every route that generates. Null is the same as absence."""

    # What the text must conform to, or None for any text.
    _form: ConstraintSpec | None = PrivateAttr(None)
    # By name: the values that ask for nothing, and why other values are refused.
    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    model: ModelName = Field(description="an adapter's reference, or the name of the base")
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default; 0 takes the likeliest token")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="sample among the likeliest tokens whose probabilities reach this sum; 1, the default, is all",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        le=MAX_TOKEN_ID,
        description="sample among so many likeliest tokens; 0, the default, and -1 are all",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="sample among tokens with at least this part of the highest probability; 0, the default, is all",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_TOKEN_ID, description="makes a sampled answer repeatable; absent: a seed is drawn"
    )
    stop: StopStrings | None = Field(
        None,
        description=f"a string, or up to {MAX_STOP} of them, that end the text; the text leaves them out",
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP, fail_fast=True)] | None = Field(
        None, description="tokens that end the text, beside the model's own; the text leaves them out"
    )
    logit_bias: LogitBias | None = Field(
        None, description="by token id as a string, added to the token's logit: -100 to 100"
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="subtracted from the logits of tokens that were generated before; 0 by default"
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="subtracted from a token's logit for each time that it was generated before; 0 by default",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=MIN_REPETITION_PENALTY,
        le=2,
        description="makes tokens of the prompt and the output less likely; below 1 likelier; 1, the default, changes "
        "nothing",
    )
    ignore_eos: bool | None = Field(None, description="go on after the model's end tokens; false by default")
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_NEW_TOKENS,
        description="tokens before an end token, or a stop string, may end the text; 0 by default",
    )
    regex: Regex | None = Field(None, description=REGEX_HELP)
    grammar: Grammar | None = Field(None, description=GRAMMAR_HELP)
    stream: bool | None = Field(None, description="respond with server-sent events; false by default")
    user: User | None = Field(None, description="accepted for clients that send it; kept nowhere")
    safety_identifier: User | None = Field(None, description="accepted for clients that send it; kept nowhere")
    metadata: Metadata | None = Field(
        None, description=f"{METADATA_HELP}; accepted for clients that send it; kept nowhere"
    )
    priority: Priority | None = Field(None, description=PRIORITY_HELP)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=TIMEOUT_HELP)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_CACHE_SALT, description=CACHE_SALT_HELP)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = dict(value)
        for name, (neutral, reason) in cls.unsupported.items():
            if name in kept:
                given = kept.pop(name)
                # `True == 1`: the types must agree too.
                if given is not None and not any(given == none and type(given) is type(none) for none in neutral):
                    raise refusal(f"{name} is not supported: {reason}", name)
        return kept

    def check_stream_options(self, options: Obfuscation | None) -> None:
        """Refuse options of a stream where no stream is asked for. Call it in a validator."""
        if options is not None and not self.stream:
            raise refusal(
                "stream_options is given without stream; send stream: true, or leave it out", "stream_options"
            )

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return 1

    def params(
        self,
        adapter: str | None,
        priority: Priority,
        *,
        prompt: str | None = None,
        token_ids: list[int] | None = None,
        max_new_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        constraint: ConstraintSpec | None = None,
        add_special_tokens: bool = True,
    ) -> GenerateParams:
        """Return the request as the engine takes it, for one prompt, with the priority that its tenant may have."""
        top_k = self.top_k or 0
        return GenerateParams(
            adapter=adapter,
            prompt=prompt,
            token_ids=token_ids,
            add_special_tokens=add_special_tokens,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, top_k),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=self.stop or [],
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            n=self.choices,
            constraint=constraint or self._form,
            priority=priority,
            timeout_s=self.timeout_s,
            cache_salt=self.cache_salt,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class GenerationFields(OpenAIFields):
    """The fields that completions and chat completions have beside those of sampling."""

    max_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="most tokens to generate; absent: until the context ends"
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="answers to each prompt; 1 by default")
    response_format: ResponseFormat | None = Field(None, description=RESPONSE_FORMAT_HELP)
    stream_options: StreamOptions | None = Field(None, description=STREAM_OPTIONS_HELP)

    @model_validator(mode="after")
    def _one_form(self) -> GenerationFields:
        self._form = to_constraint(self.response_format, self.regex, self.grammar)
        return self

    @model_validator(mode="after")
    def _stream_options_of_a_stream(self) -> GenerationFields:
        self.check_stream_options(self.stream_options)
        return self

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def sends_usage(self) -> bool:
        """Whether a stream has an event for the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
