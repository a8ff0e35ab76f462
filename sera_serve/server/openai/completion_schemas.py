"""Bodies of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from sera_serve.engine import MAX_CHOICES
from sera_serve.server.native.sampling import MAX_LOGPROBS, MAX_TOKEN_ID
from sera_serve.server.native.schemas import MAX_NEW_TOKENS, MAX_TOKEN_IDS
from sera_serve.server.openai.fields import GenerationFields
from sera_serve.server.strict import refusal, with_example

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt, or a list of them, each text or token ids. Reading stops at the first wrong element."""
    if isinstance(value, str):
        return [_one_prompt(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise refusal("prompt must be a text, a list of token ids, or a list of several such prompts", "prompt")
    if isinstance(value[0], int):
        return [_one_prompt(value, "prompt")]
    if len(value) > MAX_CHOICES:
        raise refusal(f"prompt has {len(value)} prompts; send at most {MAX_CHOICES} in one request", "prompt")
    return [_one_prompt(each, f"prompt[{index}]") for index, each in enumerate(value)]


def _one_prompt(value: Any, field: str) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise refusal(f"{field} is empty; send some text", field)
        return value
    if not isinstance(value, list) or not value:
        raise refusal(f"{field} must be a text or a list of token ids, and have one at least", field)
    if len(value) > MAX_TOKEN_IDS:
        raise refusal(f"{field} has {len(value)} token ids; send at most {MAX_TOKEN_IDS}", field)
    wrong = _wrong_token(value)
    if wrong is not None:
        raise refusal(f"{field}[{wrong}] must be a token id: an integer of 0 to {MAX_TOKEN_ID}", f"{field}[{wrong}]")
    return value


def _wrong_token(value: list[Any]) -> int | None:
    """The place of an element that is no token id, or None. A loop over a million elements would stall the server."""
    kinds = list(map(type, value))
    if others := set(kinds) - {int}:
        return min(map(kinds.index, others))
    for extreme in (min(value), max(value)):
        if not 0 <= extreme <= MAX_TOKEN_ID:
            return value.index(extreme)
    return None


Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`."""

    model_config = with_example({"model": "demo/pirate", "prompt": "The little cat found a map.", "max_tokens": 40})

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "suffix": (("",), "the models continue a text and fill no gap; leave it out"),
    }

    prompt: Prompts = Field(description="a text, token ids, or a list of up to 128 texts or lists of token ids")
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_NEW_TOKENS,
        description="most tokens to generate; absent: until the context ends; 0 only with echo",
    )
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="only the value of n, which is the default")
    echo: bool | None = Field(
        None, description="put the prompt before the text, and its log-probabilities too; false by default"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="log-probabilities of each token and of this many likeliest ones"
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise refusal("best_of is supported only where it equals n; send n alone, and choose yourself", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens is 0: it must be at least 1, or echo must be true", "max_tokens")
        if self.echo and self.stream and self.logprobs is not None:
            raise refusal(
                "echo with logprobs is not supported in a stream; leave stream out, or one of the other two", "echo"
            )
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise refusal(
                f"{len(self.prompt)} prompts with n {self.choices} make more than {MAX_CHOICES} answers; send fewer",
                "n",
            )
        return self


class CachedTokens(BaseModel):
    """Details of the prompt's tokens. Absent in requests to the base model without a key."""

    cached_tokens: int


class TokenUsage(BaseModel):
    """Number of tokens of the prompts, of the generated tokens, and of both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens of one text; four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """Response body of `POST /v1/completions`, and of each event of its stream. An event has parts of the text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None
