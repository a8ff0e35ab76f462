"""`/v1/files`: files of training rows, checked as they come, and the metrics of jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from sera_serve.errors import InvalidRequest
from sera_serve.jobs import TrainingFile
from sera_serve.jobs.files import Purpose
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.native.upload_form import FormReader, form_content
from sera_serve.server.native.uploads import receive_form
from sera_serve.server.openai.errors import OpenAIRoute
from sera_serve.server.strict import QueryModel
from sera_serve.server.training import DEFAULT_TENANT

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

FilePath = Annotated[str, Path(description="the id of a file, as its upload answered")]

PURPOSE = "fine-tune"
MAX_ID = 64
_MAX_FILENAME = 255
_REMEDY = "send multipart/form-data with the fields file (a file) and purpose (fine-tune) alone"
_BLOCK_BYTES = 256 << 10
_UPLOAD_FORM = form_content(
    ["file", "purpose"],
    {
        "file": {"type": "string", "format": "binary", "description": "JSONL: one row a line"},
        "purpose": {"type": "string", "enum": [PURPOSE], "description": "only fine-tune"},
    },
)
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


class FileObject(BaseModel):
    """A file, as OpenAI's clients read it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="seconds since 1970")
    expires_at: int | None = Field(default=None, description="always null: a file stays until it is deleted")
    filename: str
    purpose: Purpose
    status: Literal["processed"] = Field(
        default="processed", description="every row was checked before the upload's answer"
    )
    status_details: str | None = Field(default=None, description="always null")


class FileList(BaseModel):
    """Response body of `GET /v1/files`."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileQuery(QueryModel):
    """Query parameters of `GET /v1/files`."""

    after: str | None = Field(None, max_length=MAX_ID, description="the last file of the previous page")
    limit: int = Field(1000, ge=1, le=10_000, description="most files on a page")
    order: Literal["asc", "desc"] = Field("desc", description="by time: oldest first, or newest first")
    purpose: str | None = Field(None, max_length=MAX_ID, description="only files of this purpose")


class DeletedFile(BaseModel):
    """Response body of `DELETE /v1/files/{file_id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool


@router.post("/v1/files", openapi_extra={"requestBody": {"required": True, "content": _UPLOAD_FORM}})
async def create_file(context: ContextOf) -> FileObject:
    """Keep a file of training rows. Each row has been checked when this answers."""
    async with receive_form(context.request, {"file": None}, _REMEDY) as form:
        source, filename = _checked(form)
        # To its end: the check reads the temporary file.
        work = context.training.checking.run_to_end(context.caller.tenant, _add, context, filename, source)
        return await context.finish(work)


@router.get("/v1/files", response_model=FileList)
async def list_files(query: Annotated[FileQuery, Query()], context: ContextOf) -> Response:
    """The files, a page at a time."""
    # Many files are written as JSON on the thread, too.
    page = await context.run(context.executors.listing, _page, context, query)
    return Response(page, media_type="application/json")


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: FilePath, context: ContextOf) -> FileObject:
    """One file, without its content."""
    return _object(
        await context.run(context.executors.changing, context.training.files.get, file_id, context.caller.seen_tenant)
    )


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: FilePath, context: ContextOf) -> DeletedFile:
    """Delete a file that no unfinished job needs."""
    await context.run(context.executors.changing, _delete, context, file_id)
    return DeletedFile(id=file_id, deleted=True)


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=_CONTENT)
async def retrieve_content(file_id: FilePath, context: ContextOf) -> Response:
    """The bytes of a file, as they were uploaded; the metrics of a job as CSV."""
    # A client that leaves meanwhile leaves nothing open: a file that nobody holds is closed.
    files, scope = context.training.files, context.caller.seen_tenant
    found, source = await context.run(context.executors.changing, files.open, file_id, scope)
    headers = {"Content-Length": str(found.nbytes), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(_blocks(source), media_type="application/octet-stream", headers=headers)


def _checked(form: FormReader) -> tuple[BinaryIO, str]:
    """The file of a form, and its name."""
    fields = form.fields(("file", "purpose"))
    file, purpose = fields["file"], fields["purpose"]
    if purpose.text != PURPOSE:
        raise InvalidRequest(
            f"purpose is {purpose.text[:64]!r}; this server keeps files for fine-tune alone", param="purpose"
        )
    if len(file.filename) > _MAX_FILENAME or not file.filename.isprintable():
        raise InvalidRequest(
            f"the name of the file must have at most {_MAX_FILENAME} characters, all printable; rename it", param="file"
        )
    return file.opened(), file.filename


def _add(context: RequestContext, filename: str, source: BinaryIO) -> FileObject:
    tenant = context.caller.tenant or DEFAULT_TENANT
    file = context.training.files.add(tenant, filename, source)
    context.record("file.create", tenant, file.id, bytes=file.nbytes, rows=file.rows)
    return _object(file)


def _delete(context: RequestContext, file_id: str) -> None:
    file = context.training.files.delete(file_id, context.caller.seen_tenant)
    context.record("file.delete", file.tenant, file.id)


def _page(context: RequestContext, query: FileQuery) -> str:
    scope = context.caller.seen_tenant
    files, has_more = context.training.files.page(scope, query.after, query.limit, query.order, query.purpose)
    data = [_object(file) for file in files]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    ).model_dump_json()


async def _blocks(source: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while block := await run_in_threadpool(source.read, _BLOCK_BYTES):
            yield block
    finally:
        source.close()


def _object(file: TrainingFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.nbytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
    )
