"""The OpenAPI document: every status that a route answers, in the server's own error shape."""

from __future__ import annotations

import http
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel

from sera_serve.server.errors import REPEATED_IN_VAIN, SHOULD_RETRY, ErrorResponse
from sera_serve.server.scopes import ROUTES, Needed, is_open
from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)

_SCHEMAS = "#/components/schemas/{model}"
_DESCRIPTION = """Where the server needs a key, send the header `Authorization: Bearer KEY`. Every response has
the header `X-Request-Id`. Every error has the body `ErrorResponse`.

Each path that answers GET answers HEAD too. Each path answers OPTIONS with 204 and the header `Allow`. Another method
is answered 405 with `Allow`, and an unknown path 404."""
# Refused before the route, or by what all routes share.
_ANY_ROUTE = (400, 401, 403, 408, 413, 414, 415, 422, 429, 431, 500, 503)
# The routes by method and path, as the document writes them.
_ROUTES = {(method.lower(), route.replace(":path}", "}")): facts for (method, route), facts in ROUTES.items()}
_OPEN_ROUTE: tuple[Needed, tuple[int, ...]] = ("nothing", ())
_KEY = "key"
_SECURITY_SCHEMES = {
    _KEY: {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "sk-sera-...",
        "description": "A key of the server, or none where the server needs none. "
        "Each route names the scope that its key must have.",
    }
}
# The tag of routes that answer 400 where others answer 422.
_OPENAI = "openai"
_WITH_RETRY_AFTER = (429, 503)


class DocumentedApp(FastAPI):
    """FastAPI with this server's own OpenAPI document.

    FastAPI declares its own error shape for 422, and no other error.
    """

    def __init__(
        self,
        lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
        telemetry: TelemetryConfig | None = None,
    ) -> None:
        # FastAPI's interactive pages are off: they load scripts from another host. The document has a route of its own
        # below, with the checks of the other routes, and so has the page (`docs_page`).
        super().__init__(
            title="sera-serve",
            description=_DESCRIPTION,
            lifespan=lifespan,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            telemetry=telemetry,
        )
        self._making = threading.Lock()
        self.rendered_document: bytes | None = None

    def openapi(self) -> dict[str, Any]:
        """Return the document. Routes must not be added afterwards."""
        if self.openapi_schema is None:
            self.openapi_schema = _with_errors(super().openapi())
        return self.openapi_schema

    def render_document(self) -> bytes:
        """Return the document as JSON, which is made once, however many threads ask at once."""
        with self._making:
            if self.rendered_document is None:
                self.rendered_document = bytes(JSONResponse(self.openapi()).body)
        return self.rendered_document


@router.get("/openapi.json", include_in_schema=False)
async def openapi_document(request: Request) -> Response:
    """Describe the interface for programs."""
    app: DocumentedApp = request.app
    # Anybody may ask, also without a key. The first time takes half a second, for which the event loop must not stand
    # still; and JSON of this size takes 4 ms, which a flood of requests would take from everybody else.
    document = app.rendered_document or await run_in_threadpool(app.render_document)
    return Response(document, media_type="application/json")


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a model that FastAPI does not see. Models within it must be part of another response."""
    schema = model.model_json_schema(ref_template=_SCHEMAS)
    schema.pop("$defs", None)
    return schema


def stream_of(model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return the content of a response that streams server-sent events.

    OpenAPI before 3.2 has one schema for a stream. Tools read it as that of one event, which is an object of `data` and
    `event`.

    Args:
        model: What the data of an event are as JSON, or None for several kinds. Models within it as in `schema_of`.
    """
    data: dict[str, Any] = {"type": "string", "description": "JSON, or [DONE] at the end"}
    if model is not None:
        data["x-json-schema"] = schema_of(model)
    event = {"type": "object", "required": ["data"], "properties": {"data": data, "event": {"type": "string"}}}
    return {"text/event-stream": {"schema": event}}


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    """Put this server's errors in the place of FastAPI's, and say what each route needs. Changes the document."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    own = ErrorResponse.model_json_schema(ref_template=_SCHEMAS)
    schemas.update(own.pop("$defs"))
    schemas["ErrorResponse"] = own
    used = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed, own_statuses = _OPEN_ROUTE if is_open(path) else _ROUTES[method, path]
            statuses = {*_ANY_ROUTE, *own_statuses}
            if _OPENAI in operation.get("tags", ()):
                statuses.remove(422)
                operation["responses"].pop("422", None)
            _require(operation, needed)
            for status in sorted(statuses):
                used.add(status)
                operation["responses"][str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    components["securitySchemes"] = _SECURITY_SCHEMES
    components["responses"] = {f"Error{status}": _error(status) for status in sorted(used)}
    return document


def _require(operation: dict[str, Any], needed: Needed) -> None:
    """Say what a caller must have: nothing, or a key where the server needs one."""
    if needed == "nothing":
        operation["security"] = []
    elif needed == "key":
        operation["security"] = [{_KEY: []}, {}]
    else:
        operation["security"] = [{_KEY: [needed]}, {}]
        operation["description"] += f"\n\nA key needs the scope `{needed}`."


def _error(status: int) -> dict[str, Any]:
    headers = {"X-Request-Id": {"schema": {"type": "string"}, "description": "the request's id in the server's log"}}
    if status in _WITH_RETRY_AFTER:
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "seconds until another try"}
    if status in REPEATED_IN_VAIN:
        headers[SHOULD_RETRY] = {"schema": {"const": "false"}, "description": "the same request would fail again"}
    return {
        "description": http.HTTPStatus(status).phrase,
        "headers": headers,
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model="ErrorResponse")}}},
    }
