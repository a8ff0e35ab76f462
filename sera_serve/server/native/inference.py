"""`POST /v1/generate` and `POST /v1/classify`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from fastapi import APIRouter, Response

from sera_serve.engine import GenerateParams, Priority
from sera_serve.server.accounting import Account
from sera_serve.server.deps import ContextOf
from sera_serve.server.long_answers import Write
from sera_serve.server.native.image_form import FORM_SCHEMA
from sera_serve.server.native.schemas import (
    ChoicesResponse,
    ClassifyEachResponse,
    ClassifyRequest,
    ClassifyResponse,
    GenerateEvent,
    GenerateEvents,
    GenerateRequest,
    GenerateResponse,
    answer_pieces,
    pieces_of,
    pieces_of_each,
)
from sera_serve.server.openapi import stream_of
from sera_serve.server.sse import Admit, EventStream, collect
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["inference"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse | ChoicesResponse,
    responses={200: {"content": stream_of(GenerateEvent)}},
)
async def generate(body: GenerateRequest, context: ContextOf) -> Response:
    """Continue a prompt with an adapter, or with the base model alone."""
    account = context.open_account(context.principal(body.adapter), _asked(body))
    params = body.to_params(account.priority)
    admit = partial(context.engine.generate_choices, params, account.principal, context.received_at)
    if body.stream:
        return EventStream(admit, GenerateEvents(params), account)
    content = await context.finish(_complete(admit, params, account, context.written))
    return Response(content, media_type="application/json")


async def _complete(admit: Admit, params: GenerateParams, account: Account, write: Write) -> bytes:
    _, results = await collect(admit, account)
    return await write(answer_pieces(results, params))


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse | ClassifyEachResponse,
    openapi_extra={"requestBody": {"content": FORM_SCHEMA}},
)
async def classify(body: ClassifyRequest, context: ContextOf) -> Response:
    """Classify each input with the head of an adapter, or with each of several."""
    several = body.adapters
    principal = context.principal(body.adapter) if several is None else context.principal_of_all(several)
    account = context.open_account(principal, _asked(body))
    options = account.principal, account.priority, body.timeout_s, context.received_at, account.charge_rows
    with ExitStack() as counted:
        if several is None:
            assert body.adapter is not None
            result = await context.finish(context.engine.classify(body.adapter, body.inputs, *options, counted))
            account.count_classified([result])
            pieces = pieces_of(result)
        else:
            results = await context.finish(context.engine.classify_each(several, body.inputs, *options, counted))
            account.count_classified(results)
            pieces = pieces_of_each(results)
        content = await context.written(pieces)
    # The framework would check the answer against its own form again.
    return Response(content, media_type="application/json")


def _asked(body: GenerateRequest | ClassifyRequest) -> Priority | None:
    """The priority that a request names."""
    return body.priority if "priority" in body.model_fields_set else None
