"""`/v1/models`: the base and the adapters as OpenAI's clients know them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from adapters_store import AdapterSummary, Task, parse_ref
from sera_serve.base import BaseKind
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidRequest
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.native.schemas import MAX_REFERENCE
from sera_serve.server.openai.errors import ModelNotFound, OpenAIRoute
from sera_serve.server.strict import QueryModel
from sera_serve.server.visible_adapters import visible_page
from sera_serve.threads import pause

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

ModelPath = Annotated[str, Path(description="the base's name, or an adapter's, optionally with @alias, @v3 or @digest")]

# What most adapters of a base are for.
_TASKS: dict[BaseKind, Task] = {
    "decoder": "generate",
    "encoder": "classify",
    "vision": "image-classify",
    "dual": "retrieve",
}

MAX_MODELS = 10_000
# Adapters that are read in one turn: the lists of other clients have their turns between them.
_AT_ONCE = 1000


class Model(BaseModel):
    """The base, or an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970; 0 for the base")
    owned_by: str = Field(description="the adapter's tenant")
    root: str = Field(description="the version that the id stands for now; of the base, its own name")
    parent: str | None = Field(description="the base that the adapter was made for")
    task: Task


class ModelList(BaseModel):
    """Response body of `GET /v1/models`. `last_id` is the `after` of the next page where `has_more` is true."""

    object: Literal["list"] = "list"
    data: list[Model]
    has_more: bool
    last_id: str | None


class DeletedModel(BaseModel):
    """Response body of `DELETE /v1/models/{model}`."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelQuery(QueryModel):
    """Query parameters of `GET /v1/models`."""

    # OpenAI's clients read the first page alone, and send no limit.
    limit: int = Field(MAX_MODELS, ge=1, le=MAX_MODELS, description="most adapters on a page")
    after: str | None = Field(None, max_length=MAX_REFERENCE, description="the last model of the previous page")


@router.get("/v1/models", response_model=ModelList)
async def list_models(query: Annotated[ModelQuery, Query()], context: ContextOf) -> Response:
    """The base first, then the adapters in order of their ids, a page at a time."""
    return Response(await _list(context, query), media_type="application/json")


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: ModelPath, context: ContextOf) -> Model:
    """The base by its name, or an adapter by its reference, which may carry @alias, @v3 or @digest."""
    _check_name(model)
    return await context.run(context.executors.changing, _one, context, model)


@router.delete("/v1/models/{model:path}")
async def delete_model(model: ModelPath, context: ContextOf) -> DeletedModel:
    """Delete an adapter, or with @ one version of it; requests under way keep the version they began with."""
    _check_name(model)
    if model == context.engine.base.name:
        raise InvalidRequest(f"{model!r} is the base, which belongs to the server; name an adapter", param="model")
    context.caller.check_change(model)
    await context.run(context.executors.changing, context.publisher.remove, model, context.caller.actor)
    return DeletedModel(id=model)


def _check_name(model: str) -> None:
    if not model:
        raise ModelNotFound("the path ends before the name of a model; GET /v1/models lists them", param="model")
    if len(model) > MAX_REFERENCE:
        raise ModelNotFound(f"the name of a model has at most {MAX_REFERENCE} characters", param="model")


def _one(context: RequestContext, model: str) -> Model:
    if model == context.engine.base.name:
        return _base(context.engine)
    context.caller.check_use(model)
    info = context.store.inspect(model)
    # An id keeps its selector: the model of another version is another model.
    return _adapter(info, model if "@" in model else parse_ref(model).adapter)


async def _list(context: RequestContext, query: ModelQuery) -> bytes:
    """The JSON of a `ModelList`."""
    base = _base(context.engine)
    # After the base come all adapters, whatever its name is.
    after = None if query.after == base.id else query.after
    found = [] if query.after is not None else [base.model_dump_json()]
    last = base.id if found else None
    left = query.limit
    more = True
    while more and left:
        part, following = await context.run(context.executors.listing, _part, context, after, min(left, _AT_ONCE))
        found += part.values()
        left -= len(part)
        last = next(reversed(part), last)
        after, more = following, following is not None
    page = ModelList(data=[], has_more=more, last_id=last).model_dump_json()
    return page.replace('"data":[]', f'"data":[{",".join(found)}]', 1).encode()


def _part(context: RequestContext, after: str | None, limit: int) -> tuple[dict[str, str], str | None]:
    """Some of the adapters, by id, as JSON each; and where the next ones begin. Blocks."""
    page = visible_page(context.caller, context.store, after, limit)
    found = {}
    for info in page.adapters:
        # One call for all of them would hold the interpreter's lock for too long.
        pause()
        # An adapter with the base's name is left out: the name stands for the base. As the `after` of the next page,
        # it would begin the list again.
        if info.adapter != context.engine.base.name:
            found[info.adapter] = _adapter(info, info.adapter).model_dump_json()
    return found, page.next


def _base(engine: ServingEngine) -> Model:
    name = engine.base.name
    task = _TASKS[engine.base.kind]
    return Model(id=name, created=0, owned_by="sera-serve", root=name, parent=None, task=task)


def _adapter(info: AdapterSummary, name: str) -> Model:
    return Model(
        id=name,
        created=int(datetime.fromisoformat(info.created_at).timestamp()),
        owned_by=info.adapter.partition("/")[0],
        root=f"{info.adapter}@v{info.version}",
        parent=info.base,
        task=info.task,
    )
