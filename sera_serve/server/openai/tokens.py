"""`POST /tokenize` and `POST /detokenize`, with the bodies of vLLM."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, model_validator

from sera_serve.errors import PromptTooLong
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.native.sampling import TokenId
from sera_serve.server.native.schemas import MAX_TOKEN_IDS
from sera_serve.server.openai.answers import to_json, with_member
from sera_serve.server.openai.chat_schemas import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from sera_serve.server.openai.errors import OpenAIRoute, translated_errors
from sera_serve.server.openai.fields import ModelName
from sera_serve.server.openai.texts import Conversation, Texts, TextsOf, adapter_of, check_token_count
from sera_serve.server.strict import RequestModel, refusal, with_example

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])


class TokenizeRequest(RequestModel):
    """Body of `POST /tokenize`: a text, or a conversation."""

    model_config = with_example({"prompt": "The little cat found a map."})

    model: ModelName | None = Field(None, description="whose chat template renders messages; null is the base")
    prompt: str | None = Field(None, min_length=1, description="a text; send it or messages")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="a conversation, as the chat template writes it; send it or prompt"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="functions that the chat template names; only with messages"
    )
    add_generation_prompt: bool | None = Field(
        None, description="begin the assistant's message; true by default; only with messages"
    )
    add_special_tokens: bool | None = Field(None, description="by default true for a prompt, false for messages")
    return_token_strs: bool | None = Field(None, description="name the tokens too; false by default")

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("send either prompt or messages", "prompt")
        for name in ("tools", "add_generation_prompt"):
            if self.messages is None and getattr(self, name) is not None:
                raise refusal("tools and add_generation_prompt belong to messages; leave them out", name)
        return self


class TokenizeResponse(BaseModel):
    """Response body of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model_config = with_example({"tokens": [4, 5, 6]})

    model: ModelName | None = Field(None, description="all models have the base's tokens")
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] = Field(
        description="token ids; the text has special tokens too"
    )


class DetokenizeResponse(BaseModel):
    """Response body of `POST /detokenize`."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, context: ContextOf, texts: TextsOf) -> Response:
    """The tokens of a text, or of a conversation as the model's chat template writes it."""
    adapter, tenant = _entered(body.model, context)
    with translated_errors("prompt" if body.messages is None else "messages"):
        work = texts.executor.run_in_turn(tenant, _tokenize, body, adapter, context, texts)
        content = await context.finish(work)
    return Response(content, media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextOf, texts: TextsOf) -> DetokenizeResponse:
    """The text of tokens. Special tokens are part of the text."""
    adapter, tenant = _entered(body.model, context)
    check_token_count(body.tokens, context.engine, "tokens")
    work = texts.executor.run_in_turn(tenant, _detokenize, body.tokens, adapter, context, texts)
    return DetokenizeResponse(prompt=await context.finish(work))


def _entered(model: str | None, context: RequestContext) -> tuple[str | None, str]:
    """Charge a request, and return the adapter that it names, and its tenant."""
    adapter = None if model is None else adapter_of(model, context.engine)
    tenant = context.principal(adapter).tenant
    context.accounting.enter(context.request.state, tenant)
    return adapter, tenant


def _tokenize(body: TokenizeRequest, adapter: str | None, context: RequestContext, texts: Texts) -> bytes:
    engine = context.engine
    special = body.add_special_tokens
    if body.messages is None:
        text = body.prompt or ""
        _check_there(adapter, context)
    else:
        conversation = Conversation(
            body.messages, body.tools or (), add_generation_prompt=body.add_generation_prompt is not False
        )
        prompt = texts.chat_prompt(conversation, adapter)
        text, special = prompt.text, bool(special)
    most = engine.base.preprocessor.max_characters(engine.context_tokens)
    if len(text) > most:
        raise PromptTooLong(
            f"the text has {len(text)} characters; the context holds at most {most}; shorten it", param="prompt"
        )
    tokens = texts.encode(text, special is not False)
    content = to_json({"count": len(tokens), "max_model_len": engine.context_tokens, "tokens": tokens})
    if body.return_token_strs:
        names = to_json([texts.tokens.name_of(token) for token in tokens])
        content = with_member(content, "token_strs", names)
    return content.encode()


def _detokenize(tokens: list[int], adapter: str | None, context: RequestContext, texts: Texts) -> str:
    _check_there(adapter, context)
    return texts.decode(tokens)


def _check_there(adapter: str | None, context: RequestContext) -> None:
    """Raise AdapterNotFound for an adapter that the store does not have. All have the base's tokens."""
    if adapter is not None:
        context.store.resolve(adapter)
