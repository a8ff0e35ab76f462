"""`POST /v1/embeddings`: pooled hidden states of the base with an adapter."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from sera_serve.base import ImageInput, Pooling
from sera_serve.engine import Priority
from sera_serve.errors import SeraServeError
from sera_serve.server.deps import ContextOf
from sera_serve.server.native.inputs import IMAGE_SCHEMA, image_of
from sera_serve.server.native.sampling import MAX_TOKEN_ID
from sera_serve.server.native.schemas import MAX_TIMEOUT_S, PRIORITY_HELP, TIMEOUT_HELP
from sera_serve.server.openai.answers import to_json
from sera_serve.server.openai.errors import InvalidOpenAIRequest, OpenAIRoute, translated_errors
from sera_serve.server.openai.fields import ModelName, User
from sera_serve.server.openai.texts import adapter_of
from sera_serve.server.strict import RequestModel, refusal, with_example

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

MAX_INPUTS = 2048
# Of all inputs that are lists of tokens: each token is looked at before the request waits for anything.
MAX_TOKENS = 150_000

Encoding = Literal["float", "base64"]


@dataclass(frozen=True)
class EmbeddingInputs:
    """The inputs of a request.

    Attributes:
        values: Texts and images, or all lists of tokens; at least one.
        in_list: Whether the request has them in a list. Errors name an input of a list by its place, `input[0]`.
    """

    values: list[str | ImageInput] | list[Sequence[int]]
    in_list: bool


def _inputs(value: Any) -> EmbeddingInputs:
    """One input, or a list of them: texts and images, or all lists of tokens. Reading stops at the first wrong one.

    Lists of tokens become arrays of int32, and are emptied: the body that they are from is there until the answer is
    sent, and a token takes 40 bytes in a list.
    """
    in_list = False
    if isinstance(value, str | dict):
        value = [value]
    elif not isinstance(value, list) or not value:
        raise refusal(
            "input must be a text, an image, tokens, or a list of texts and images or of such tokens", "input"
        )
    elif isinstance(value[0], str | list | dict):
        in_list = True
    else:
        value = [value]
    if len(value) > MAX_INPUTS:
        raise refusal(f"input has {len(value)} inputs; send at most {MAX_INPUTS} in one request", "input")
    places = [f"input[{index}]" for index in range(len(value))] if in_list else ["input"]
    if not isinstance(value[0], list):
        return EmbeddingInputs(list(map(_text_or_image, value, places)), in_list)
    tokens = 0
    inputs: list[Sequence[int]] = []
    for item, place in zip(value, places, strict=True):
        if not isinstance(item, list) or not item:
            alike = ", as the first input is," if tokens else ""
            raise refusal(f"{place} must be a list of tokens{alike} and not empty", place)
        tokens += len(item)
        if tokens > MAX_TOKENS:
            raise refusal(f"the inputs have more than {MAX_TOKENS} tokens; send fewer in one request", "input")
        if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in item):
            raise refusal(f"{place} must have integers of 0 to {MAX_TOKEN_ID}, the ids of tokens", place)
        inputs.append(array("i", item))
        item.clear()
    return EmbeddingInputs(inputs, in_list)


def _text_or_image(item: Any, place: str) -> str | ImageInput:
    if isinstance(item, str) and item:
        return item
    if isinstance(item, dict) and "image" in item:
        return image_of(item, place)
    reason = ""
    if isinstance(item, dict) and item.keys() == {"text", "text_pair"}:
        reason = "; a sentence pair has no vector: send its texts as two inputs"
    elif isinstance(item, list):
        reason = "; the first input is no list of tokens"
    raise refusal(f'{place} must be a text that is not empty, or {{"image": "<base64>"}}{reason}', place)


_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        IMAGE_SCHEMA,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, IMAGE_SCHEMA]}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class EmbeddingRequest(RequestModel):
    """Body of `POST /v1/embeddings`."""

    model_config = with_example({"model": "demo/tickets", "input": ["My parcel is late.", "I was charged twice."]})

    model: ModelName = Field(description="an adapter's reference, or the name of the base")
    input: Annotated[EmbeddingInputs, PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="a text, an image, tokens, or a list of up to 2,048 texts and images or lists of tokens"
    )
    encoding_format: Encoding | None = Field(
        None, description="float (the default), or base64 of the numbers as little-endian float32"
    )
    dimensions: int | None = Field(None, ge=1, description="only the width of the base's vectors: they are not cut")
    user: User | None = Field(None, description="accepted for clients that send it; kept nowhere")
    pooling: Pooling | None = Field(
        None, description="last_token, cls or mean; null is that of a classifier's adapter, and else the base's own"
    )
    normalize: bool | None = Field(None, description="scale each vector to length 1; null is true")
    priority: Priority | None = Field(None, description=PRIORITY_HELP)
    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description=TIMEOUT_HELP)


class Embedding(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Response body of `POST /v1/embeddings`, in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingResponse)
async def embeddings(body: EmbeddingRequest, context: ContextOf) -> Response:
    """One vector of each input: the pooled last hidden states of the base with the adapter."""
    width = context.engine.base.embedding_size
    if body.dimensions not in (None, width):
        raise InvalidOpenAIRequest(
            f"dimensions is {body.dimensions}; the vectors of this base have {width} numbers, and a part of them "
            "is no embedding: leave dimensions out",
            param="dimensions",
        )
    adapter = adapter_of(body.model, context.engine)
    with ExitStack() as counted:
        with translated_errors("input"), _named_as_sent(body.input):
            account = context.open_account(context.principal(adapter), body.priority)
            work = context.engine.embed(
                adapter,
                body.input.values,
                account.principal,
                pooling=body.pooling,
                normalize=body.normalize is not False,
                priority=account.priority,
                timeout_s=body.timeout_s,
                received_at=context.received_at,
                charge=account.charge_rows,
                counted=counted,
            )
            result = await context.finish(work)
        account.count_embedded(result)
        tokens = sum(result.prompt_tokens)
        head = to_json({"object": "list", "model": body.model})
        usage = to_json({"prompt_tokens": tokens, "total_tokens": tokens})
        content = await context.written(_pieces(head, result.vectors, body.encoding_format or "float", usage))
    return Response(content, media_type="application/json")


@contextmanager
def _named_as_sent(inputs: EmbeddingInputs) -> Iterator[None]:
    """Have an error about an input that is in no list name it as the parser does: the engine counts inputs from 0."""
    try:
        yield
    except SeraServeError as error:
        if not inputs.in_list and error.param == "input[0]":
            error.param = "input"
            error.message = error.message.replace("input 0 ", "input ", 1).replace("input[0]", "input", 1)
        raise


def _pieces(head: str, vectors: Sequence[NDArray[np.float32]], encoding: Encoding, usage: str) -> Iterator[str]:
    """Yield the JSON of an answer, a vector at a time. `head` and `usage` are JSON objects."""
    yield f'{head[:-1]},"data":['
    for index, vector in enumerate(vectors):
        value: str | list[float]
        if encoding == "base64":
            value = base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()
        else:
            value = vector.tolist()
        written = to_json({"object": "embedding", "index": index, "embedding": value})
        yield f",{written}" if index else written
    yield f'],"usage":{usage}}}'
