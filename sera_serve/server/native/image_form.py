"""`POST /v1/classify` as a form: an adapter and image files, as `curl -F adapter=... -F image=@photo.jpg` sends it."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Response
from starlette.routing import Match
from starlette.types import Scope

from sera_serve.engine import ImageInput
from sera_serve.errors import ImageTooLarge, InvalidRequest
from sera_serve.server.deps import ContextOf
from sera_serve.server.native.schemas import MAX_REFERENCE, pieces_of
from sera_serve.server.native.upload_form import FORM_TYPE, FormReader, InvalidForm, form_content
from sera_serve.server.strict import StrictRoute

_REMEDY = (
    "send multipart/form-data with the fields adapter (text) and image (one file or more): "
    "curl -F adapter=tenant/name -F image=@photo.jpg"
)
FORM_SCHEMA = form_content(
    ["adapter", "image"],
    {
        "adapter": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_REFERENCE,
            "description": "tenant/name, optionally with @alias, @v3 or @digest",
        },
        "image": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "minItems": 1,
            "description": "JPEG, PNG or WebP files, each a field of this name",
        },
    },
)


class FormRoute(StrictRoute):
    """A route for bodies that are forms. Another route of the same path reads JSON."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match by path and method, where the body is a form."""
        match, child = super().matches(scope)
        if match is Match.FULL and not _is_form(scope):
            return Match.NONE, {}
        return match, child


router = APIRouter(route_class=FormRoute, tags=["inference"])


@router.post("/v1/classify", include_in_schema=False, openapi_extra={"requestBody": {"content": FORM_SCHEMA}})
async def classify_form(context: ContextOf) -> Response:
    """Classify each image file with the head of an adapter."""
    content_type = context.request.headers["content-type"]
    body = await context.request.body()
    adapter, images = await context.run(context.executors.forms, _read, body, content_type, context.settings.max_images)
    account = context.open_account(context.principal(adapter), None)
    options = account.principal, account.priority, None, context.received_at, account.charge_rows
    with ExitStack() as counted:
        result = await context.finish(context.engine.classify(adapter, images, *options, counted))
        account.count_classified([result])
        content = await context.written(pieces_of(result))
    return Response(content, media_type="application/json")


def _read(body: bytes, content_type: str, max_images: int) -> tuple[str, list[ImageInput]]:
    """The adapter and the files of a form. Blocks.

    Raises:
        InvalidForm: The form cannot be read.
        ImageTooLarge: It has more than `max_images` images.
        MissingField, UnknownField, InvalidRequest: A field is missing, unknown, of the wrong kind, or there twice.
    """
    # One field and one file more tell what is wrong.
    reader = FormReader(
        content_type, {"image": None}, _REMEDY, max_parts=max_images + 2, in_memory=len(body), repeats=True
    )
    try:
        try:
            reader.finish(body)
        except InvalidForm:
            if sum(part.name == "image" and part.is_file for part in reader.parts) > max_images:
                # As where the images are in JSON. The rest of the form was not read.
                raise ImageTooLarge(
                    f"the form has more than {max_images} images; send at most {max_images} in one request",
                    param="image",
                ) from None
            raise
        adapter = reader.fields(("adapter", "image"))["adapter"].text
        files = [part.opened().read() for part in reader.parts if part.name == "image"]
    finally:
        reader.close()
    if not 1 <= len(adapter) <= MAX_REFERENCE:
        raise InvalidRequest(
            f"form field adapter must have 1 to {MAX_REFERENCE} characters, such as tenant/name", param="adapter"
        )
    return adapter, [ImageInput(file, f"image[{index}]") for index, file in enumerate(files)]


def _is_form(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(value.partition(b";")[0].strip().lower() == FORM_TYPE.encode() for value in kinds)
