"""Receives an uploaded adapter: a multipart form with the fields `name` and `bundle`, and perhaps `config`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from adapters_store import AdapterBundle, BundleLimits, PeftFiles, parse_adapter, peft_from_bytes, writable_memory
from adapters_store.errors import InvalidAdapterName
from sera_serve.errors import Overloaded, counted
from sera_serve.server.auth import caller_of
from sera_serve.server.native.upload_form import FORM_TYPE, FormPart, FormReader, UploadNotWritten
from sera_serve.server.strict import UnsupportedMediaType, media_type

logger = logging.getLogger("sera_serve.server")

# Bytes that are parsed at once, on a thread.
_CHUNK_BYTES = 64 << 10
_RETRY_AFTER_S = 5
# The fields of the form that are files, and the most bytes of each; the body has a limit of its own.
_FILES: dict[str, int | None] = {"bundle": None, "config": 1 << 20}
_REMEDY = "send multipart/form-data with the fields bundle (a file) and name (text): curl -F name=... -F bundle=@..."


class TooManyUploads(Overloaded):
    """As many uploads are under way as the server allows."""

    code = "too_many_uploads"


class UploadSlots:
    """Counts the uploads under way; used on the event loop alone."""

    def __init__(self, limit: int) -> None:
        """`limit` is the most uploads under way at once."""
        self._limit = limit
        self._tenant_limit = max(1, limit // 2)
        self._taken: Counter[str | None] = Counter()

    def count(self) -> int:
        """Number of uploads under way."""
        return self._taken.total()

    @contextmanager
    def take(self, tenant: str | None = None) -> Iterator[None]:
        """Count one upload of a tenant's key, or of a caller without a key.

        A key may have half of all uploads under way: a tenant whose uploads are slow leaves room for the others'. The
        tenant of a caller without a key is in the form, which is not read yet.

        Raises:
            TooManyUploads: No more may begin.
        """
        if self._taken.total() >= self._limit:
            raise TooManyUploads(
                f"the server has {counted(self._taken.total(), 'upload')} under way, the most that it takes; send the "
                "upload again later",
                retry_after=_RETRY_AFTER_S,
            )
        if tenant is not None and self._taken[tenant] >= self._tenant_limit:
            raise TooManyUploads(
                f"this tenant has {counted(self._taken[tenant], 'upload')} under way, the most of one tenant; send the "
                "upload again later",
                retry_after=_RETRY_AFTER_S,
            )
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]


@dataclass(frozen=True)
class Upload:
    """A received form. A small bundle is in memory, a larger one in a temporary file.

    Attributes:
        name: `tenant/name`.
        bundle: The bundle, or the PEFT checkpoint.
        config: PEFT's `adapter_config.json`, for a checkpoint that is a single safetensors file; else None.
    """

    name: str
    bundle: FormPart
    config: FormPart | None

    def read(self, max_bytes: int) -> AdapterBundle | PeftFiles:
        """Read the file and tell by its content what it is; a bundle is validated. Blocks.

        Raises:
            InvalidBundle: One of the subclasses that FORMAT.md lists for bundles; of a PEFT checkpoint also
                PickledCheckpoint or UnsupportedAdapter.
        """
        # The tensors share this memory, so the memory must be writable.
        data = view = writable_memory(self.bundle.nbytes)
        file = self.bundle.opened()
        while view and (count := file.readinto(view)):  # type: ignore[attr-defined]
            view = view[count:]
        limits = BundleLimits(max_bytes=max_bytes)
        config = None if self.config is None else self.config.opened().read()
        # The tensors may share the memory of the whole file, and keep all of it.
        found = peft_from_bytes(data, limits, config)
        # What is no safetensors file and no archive is refused here, with or without a configuration.
        return AdapterBundle.from_bytes(data, limits) if found is None else found


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """Receive the form of an upload. The temporary file is deleted when the context ends.

    The upload counts as under way from before its first byte is read until its temporary file is deleted.

    Raises:
        MissingField, UnknownField, InvalidRequest, InvalidAdapterName: The form is refused.
        SeraServeError: As `receive_form`.
    """
    async with receive_form(request, _FILES, _REMEDY) as form:
        yield _checked(form)


@asynccontextmanager
async def receive_form(request: Request, kept: Mapping[str, int | None], remedy: str) -> AsyncIterator[FormReader]:
    """Receive a form. Its temporary files are deleted when the context ends.

    The upload counts as under way from before its first byte is read until its temporary files are deleted.

    Args:
        request: The request.
        kept: Fields whose files are kept, as in `FormReader`.
        remedy: What a form of this route looks like, for messages.

    Raises:
        UnsupportedMediaType: The body is no form.
        InvalidForm: The form cannot be read.
        BodyTooLarge: The body exceeds the limit of its route.
        TooManyUploads: As many uploads as the setting `max_uploads` are under way, or half as many of the tenant.
        UploadNotWritten: A temporary file could not be written.
    """
    if media_type(request) != FORM_TYPE:
        raise UnsupportedMediaType(f"the body must be a form; {remedy}", param="Content-Type")
    reader = FormReader(request.headers["content-type"], kept, remedy)
    slots: UploadSlots = request.app.state.upload_slots
    with slots.take(caller_of(request).tenant):
        try:
            await _receive(request, reader)
            yield reader
        except UploadNotWritten as error:
            # Only the operator can act on a full disk.
            logger.error("request %s could not be received", request.state.request_id, exc_info=error)
            raise
        finally:
            # Deleting a large file takes time. A request that is cancelled must delete its file too.
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(reader.close)


async def _receive(request: Request, reader: FormReader) -> None:
    # A hand-over to a thread for each packet would cost more than the parsing.
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= _CHUNK_BYTES:
            await run_in_threadpool(reader.feed, bytes(waiting))
            waiting.clear()
    await run_in_threadpool(reader.finish, bytes(waiting))


def _checked(form: FormReader) -> Upload:
    fields = form.fields(("bundle", "name"), ("config",))
    name = fields["name"].text
    try:
        parse_adapter(name)
    except InvalidAdapterName as error:
        raise InvalidAdapterName(error.message, param="name") from None
    return Upload(name, fields["bundle"], fields.get("config"))
