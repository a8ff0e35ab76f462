"""Reads an uploaded bundle from a multipart form with exactly the fields `name` and `bundle`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from adapters_store import AdapterBundle, BundleLimits, parse_adapter, writable_memory
from adapters_store.errors import InvalidAdapterName
from sera_serve.errors import InvalidRequest
from sera_serve.server.strict import UnsupportedMediaType, media_type

_FIELDS = ("bundle", "name")
_MAX_FIELD_BYTES = 1024


class InvalidForm(InvalidRequest):
    """The multipart body cannot be parsed."""

    code = "invalid_multipart"
    status = 400


class MissingField(InvalidRequest):
    """A field of the form is missing."""

    code = "missing_field"


class UnknownField(InvalidRequest):
    """The form has an unknown field, or the same field twice."""

    code = "unknown_field"


@dataclass(frozen=True)
class Upload:
    """A received form. A small bundle is in memory, a larger one in a temporary file."""

    name: str
    file: BinaryIO
    nbytes: int

    def read_bundle(self, max_bytes: int) -> AdapterBundle:
        """Read and validate the bundle. Blocks.

        Raises:
            InvalidBundle: FORMAT.md lists the subclasses.
        """
        # The tensors share this memory, so the memory must be writable.
        data = writable_memory(self.nbytes)
        self.file.seek(0)
        view = data
        while view and (count := self.file.readinto(view)):  # type: ignore[attr-defined]
            view = view[count:]
        return AdapterBundle.from_bytes(data, BundleLimits(max_bytes=max_bytes))


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """Receive the form of an upload. The temporary file is deleted when the context ends.

    Raises:
        UnsupportedMediaType, InvalidForm, MissingField, UnknownField, InvalidAdapterName: The form is refused.
        BodyTooLarge: The body exceeds the limit of its route.
    """
    if media_type(request) != "multipart/form-data":
        raise UnsupportedMediaType(
            "the body must be multipart/form-data with the fields bundle and name (curl -F name=... -F bundle=@...)",
            param="Content-Type",
        )
    try:
        form = await request.form(max_files=4, max_fields=4, max_part_size=_MAX_FIELD_BYTES)
    except HTTPException as error:
        raise InvalidForm(f"{error.detail} Send the fields bundle (a file) and name (text).") from error
    try:
        yield _checked(form)
    finally:
        await form.close()


def _checked(form: FormData) -> Upload:
    given = [name for name, _ in form.multi_items()]
    for field in _FIELDS:
        if field not in given:
            raise MissingField(f"form field {field} is missing; send bundle (a file) and name (text)", param=field)
    for field in given:
        if field not in _FIELDS:
            raise UnknownField(f"form field {field!r} is unknown; leave it out", param=field)
        if given.count(field) > 1:
            raise UnknownField(f"form field {field} appears twice; send it once", param=field)
    name, file = form["name"], form["bundle"]
    if not isinstance(name, str):
        raise InvalidRequest("form field name is a file; send it as text", param="name")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("form field bundle is text; send it as a file (curl -F bundle=@...)", param="bundle")
    try:
        parse_adapter(name)
    except InvalidAdapterName as error:
        raise InvalidAdapterName(error.message, param="name") from None
    return Upload(name, file.file, file.size or 0)
