"""Strict requests: JSON with one meaning; every field, query parameter and body is either read or refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from starlette.types import Scope

from adapters_store import parse_json
from sera_serve.errors import InvalidRequest, SeraServeError
from sera_serve.loop_turns import LoopTurns
from sera_serve.server.accounting import Accounting
from sera_serve.server.auth import caller_of, check_scope
from sera_serve.server.scopes import needed_scope

# Longer ones are refused before they are parsed. A boundary of a form has at most 70 characters.
_MAX_CONTENT_TYPE = 256
# Of a list of jobs: 16 pairs of metadata and a page.
_MAX_QUERY = 18
# Lists, objects and keys of a body; no request has a use for more.
_MAX_MEMBERS = 20_000
# Bytes that are parsed in 1 ms, whatever they are. Longer bodies take turns, and so do short ones of which many come.
_SHORT_BODY = 8 << 10
# Items of all lists; a prompt of 131,072 token ids is one of the longest.
_MAX_ITEMS = 160_000
# Of a body that is longer than max_body_mib, as images may be. Some encoders write each "/" of base64 as "\\/".
_MAX_QUOTES = 20_000
_BYTES_AN_ESCAPE = 32
_JSON_PARAMETERS = {"", "charset=utf-8", 'charset="utf-8"'}


class UnsupportedMediaType(SeraServeError):
    """The route does not accept the media type, the charset or the encoding of the body."""

    code = "unsupported_media_type"
    status = 415


class UnexpectedBody(SeraServeError):
    """The request has a body, and its method takes none."""

    code = "unexpected_body"
    status = 400


class RequestModel(BaseModel):
    """A JSON request body with strict types. Unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_field(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name[:64], known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                reason = f"{name[:64]!r} is not a field of this request; {hint}"
                # The response also names the place, which is known outside.
                raise PydanticCustomError(
                    "extra_forbidden", "{reason}", {"reason": reason, "unknown": name[:64], "hint": hint}
                )
        return value


class QueryModel(BaseModel):
    """The query parameters of a route. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


def with_example(body: dict[str, Any]) -> ConfigDict:
    """Return the configuration of a model whose example in the OpenAPI document is `body`, for the demo's adapters.

    A page over the document fills a form with the example. Without one, the page makes up a value for each field, and
    no route takes all fields at once.
    """
    return ConfigDict(json_schema_extra={"examples": [body]})


def refusal(message: str, field: str | None) -> PydanticCustomError:
    """Return a validation error with its own message. `field` becomes `param` of the error response."""
    # The braces of a message must not be read as a template.
    return PydanticCustomError("refused", "{reason}", {"reason": message, "field": field})


def media_type(request: Request) -> str:
    """Return the media type of the body in lower case, without parameters. Empty if the header is absent."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class StrictRequest(Request):
    """A request whose `json` method uses `parse_json`."""

    async def json(self) -> Any:
        """Return the body's JSON value. FastAPI turns a json.JSONDecodeError into a validation error of its message."""
        body = await self.body()
        turns: LoopTurns = self.app.state.engine.loop_turns()
        owner = caller_of(self).owner
        if len(body) <= _SHORT_BODY:
            await turns.short_turn(owner)
            return self._parsed(body)
        async with turns.turn(owner):
            return self._parsed(body)

    def _parsed(self, body: bytes) -> Any:
        if len(body) > self.app.state.settings.max_body_mib << 20:
            _check_long(body)
        try:
            return parse_json(body, _MAX_MEMBERS, _MAX_ITEMS)
        except json.JSONDecodeError as error:
            # Where the text is not JSON, as opposed to JSON that is not taken, the parser knows the place.
            if not error.doc:
                raise
            place = f"{error.msg} at line {error.lineno}, column {error.colno}"
            raise json.JSONDecodeError(place, error.doc, error.pos) from error


def _check_long(body: bytes) -> None:
    """Check that a body, longer than those of texts may be, is mostly long strings such as base64.

    Parsing takes the interpreter from everything else. 14 MiB of base64 take 80 ms of a core, the worst body that
    passes 160 ms, and 14 MiB of short strings or of escapes a second.

    Raises:
        json.JSONDecodeError: It has too many strings or escapes, or other characters than those of ASCII.
    """
    if not body.isascii() or body.count(b'"') > _MAX_QUOTES or body.count(b"\\") > len(body) // _BYTES_AN_ESCAPE:
        raise json.JSONDecodeError(
            "a body of this length may only have images: at most so many strings, escapes and other characters", "", 0
        )


class StrictRoute(APIRoute):
    """A route that refuses what it would not read: query parameters, bodies, encodings, other media types.

    A route reads a body if it has a body parameter, or if its `openapi_extra` describes a request body.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the checks before it."""
        handle = super().get_route_handler()
        reads_json = self.body_field is not None
        # Of a route that reads JSON: another route of its path reads forms.
        reads_form = "requestBody" in (self.openapi_extra or {})
        reads_body = reads_json or reads_form
        reads_query = bool(self.dependant.query_params)
        (needed,) = {needed_scope(method, self.path) for method in self.methods or ()}

        async def checked(request: Request) -> Response:
            caller = caller_of(request)
            check_scope(caller, needed)
            if needed == "infer" and caller.tenant is not None:
                # Before the body is read. Without keys, the body tells the tenant.
                accounting: Accounting = request.app.state.accounting
                accounting.enter(request.state, caller.tenant)
            content_type = _check_headers(request)
            if not reads_body:
                refuse_body(request.scope)
            if request.scope["query_string"]:
                _check_query(request, reads_query)
            if reads_json and not _is_json(content_type):
                raise UnsupportedMediaType(
                    "the body must be JSON in UTF-8; send the header Content-Type: application/json"
                    f"{', or files as a form (multipart/form-data)' if reads_form else ''}",
                    param="Content-Type",
                )
            strict = StrictRequest(request.scope, request.receive)
            if reads_json:
                # The body is read here. FastAPI would turn the refusal of a long body into a status 400.
                await strict.body()
            return await handle(strict)

        return checked


def refuse_body(scope: Scope) -> None:
    """Check that a request has no body, by its headers alone.

    Raises:
        UnexpectedBody: The request announces a body.
    """
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")):
            raise UnexpectedBody(f"{scope['method'][:16]} takes no body here; send the request without a body")


def _check_headers(request: Request) -> str:
    """Return the Content-Type. Raises UnsupportedMediaType if it is ambiguous, or if the body is encoded."""
    content_type: str | None = None
    name: bytes
    value: bytes
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            if content_type is not None:
                raise UnsupportedMediaType("the header Content-Type appears twice; send it once", param="Content-Type")
            content_type = value.decode("latin-1")
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedMediaType(
                "the body has a Content-Encoding; send the body as it is, without the header", param="Content-Encoding"
            )
    if content_type is None:
        return ""
    if len(content_type) > _MAX_CONTENT_TYPE:
        # Parsers of its parameters take quadratic time.
        raise UnsupportedMediaType(f"the header Content-Type exceeds {_MAX_CONTENT_TYPE} bytes", param="Content-Type")
    return content_type


def _check_query(request: Request, reads_query: bool) -> None:
    """Raise InvalidRequest if a query parameter is not read, or appears twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    if not reads_query:
        name = names[0][:64] if names else None
        raise InvalidRequest(f"this route reads no query parameters; leave {name or 'the query'!r} out", param=name)
    if len(names) > _MAX_QUERY:
        raise InvalidRequest(f"the query has {len(names)} parameters; send at most {_MAX_QUERY}")
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"query parameter {name[:64]!r} appears twice; send it once", param=name[:64])


def _is_json(content_type: str) -> bool:
    kind, *parameters = (part.strip() for part in content_type.lower().split(";"))
    return kind == "application/json" and set(parameters) <= _JSON_PARAMETERS
