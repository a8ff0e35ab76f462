"""Fields of `POST /v1/generate` that adjust the choice of tokens, and log-probabilities in answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from sera_serve.engine import MAX_CHOICES, MAX_LOGIT_BIAS, MIN_REPETITION_PENALTY, TokenLogprobs
from sera_serve.server.strict import RequestModel, refusal

MAX_TOKEN_ID = (1 << 31) - 1
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_MIN_TOKENS = 1 << 20
# Tokens with log-probabilities that are encoded at once: a millisecond, in which an event loop does nothing else.
_ENCODED_AT_ONCE = 32
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


def _logit_bias(value: Any) -> dict[int, float]:
    """Keys of a JSON object are strings. Reading stops at the first wrong entry."""
    if not isinstance(value, dict):
        raise refusal('logit_bias must be an object of token ids, such as {"42": -100}', "logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise refusal(f"logit_bias has {len(value)} entries; send at most {MAX_LOGIT_BIAS}", "logit_bias")
    read: dict[int, float] = {}
    for key, bias in value.items():
        if not isinstance(key, str) or _TOKEN_ID.fullmatch(key) is None or int(key) > MAX_TOKEN_ID:
            raise refusal(f"logit_bias has the key {str(key)[:64]!r}; a key must be a token id", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise refusal(f"logit_bias of token {key} must be a number of -100 to 100", "logit_bias")
        read[int(key)] = float(bias)
    return read


_LOGIT_BIAS_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIAS,
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS_SCHEMA)]


class SamplingFields(RequestModel):
    """What adjusts the choice of tokens, beside temperature, top_p and top_k."""

    min_p: float = Field(
        0.0, ge=0, le=1, description="sample among tokens with at least this part of the highest probability; 0 is all"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from the logits of tokens that were generated before"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from a token's logit for each time that it was generated before"
    )
    repetition_penalty: float = Field(
        1.0,
        ge=MIN_REPETITION_PENALTY,
        le=2,
        description="makes tokens of the prompt and the output less likely; below 1 likelier; 1 changes nothing",
    )
    logit_bias: LogitBias = Field(
        default_factory=dict, description="by token id, added to the token's logit: -100 to 100"
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKENS,
        fail_fast=True,
        description="tokens that end the text, beside the model's own; the text leaves them out",
    )
    ignore_eos: bool = Field(False, description="go on after the model's end tokens")
    min_tokens: int = Field(
        0, ge=0, le=MAX_MIN_TOKENS, description="tokens before an end token, or a stop string, may end the text"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="answers to the prompt; with more than one, choices has them")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="return the log-probability of each generated token and of this many most likely tokens",
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="the same for the tokens of the prompt; not with stream"
    )


class LikelyToken(BaseModel):
    """A likely token at one position, and its log-probability."""

    token_id: int
    logprob: float


class ScoredToken(BaseModel):
    """A token and its log-probability, null for the first token of a prompt; and the most likely tokens there."""

    token_id: int
    logprob: float | None
    top: list[LikelyToken]


def logprobs_content(logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Return the JSON of a list of `ScoredToken`."""
    return [
        {
            "token_id": one.token,
            "logprob": one.logprob,
            "top": [{"token_id": token, "logprob": logprob} for token, logprob in one.top],
        }
        for one in logprobs
    ]


def logprob_pieces(logprobs: Sequence[TokenLogprobs]) -> Iterator[str]:
    """Yield the same as text, some tokens at a time."""
    yield "["
    for first in range(0, len(logprobs), _ENCODED_AT_ONCE):
        part = json.dumps(logprobs_content(logprobs[first : first + _ENCODED_AT_ONCE]), separators=(",", ":"))[1:-1]
        yield f",{part}" if first else part
    yield "]"
