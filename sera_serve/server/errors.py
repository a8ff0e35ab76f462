"""Error responses: every failure becomes `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import http
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from adapters_store.errors import StoreError
from sera_serve.errors import SeraServeError, counted
from sera_serve.server.disconnect import ClientDisconnected
from sera_serve.server.methods import allow_header, near_path, routes_of_path

logger = logging.getLogger("sera_serve.server")

CLIENT_CLOSED = 499
CLIENT_CLOSED_CODE = "client_closed"
"""In the log alone: nobody is there to get it."""
_MAX_MESSAGE = 600
_MAX_PARAM = 200
_MAX_SHOWN = 60
_SUBJECTS = ("Input", "String", "List", "Tuple", "Dictionary")
CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# What pydantic calls a type among several.
_TYPE_NAMES = frozenset({"bool", "float", "int", "str"})
_TYPE_PREFIXES = ("constrained-", "dict[", "function-", "list[", "literal[")
VALIDATION_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "json_invalid": "invalid_json",
}


class ErrorDetail(BaseModel):
    """What went wrong, and what the client can do about it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Body of every response with a status of 400 or more."""

    error: ErrorDetail


# OpenAI's clients send a request again after these statuses, unless the header forbids it. Another try would meet the
# same conflict (409), take as long (504), or find the disk as full (507).
SHOULD_RETRY = "x-should-retry"
REPEATED_IN_VAIN = (409, 504, 507)
# What the metrics count as refusals: overload, a deadline, a stopped engine.
COUNTED_STATUSES = (429, 503, 504)


class BodyTooLarge(SeraServeError):
    """The body exceeds the limit of its route. The rest of the body is not read."""

    code = "body_too_large"
    status = 413


def error_type(status: int) -> str:
    """Return the error type of a status, as clients of OpenAI's API expect it."""
    return _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")


def error_content(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of an `ErrorResponse`. Text that came from the client is cut to a limit."""
    detail = {
        "message": _printable(message, _MAX_MESSAGE),
        "type": error_type(status),
        "param": None if param is None else _printable(param, _MAX_PARAM),
        "code": code,
    }
    return {"error": detail}


@contextmanager
def renamed_fields(names: Mapping[str, str | None]) -> Iterator[None]:
    """Name the fields of refusals as a route does.

    Args:
        names: The route's own names by those of the shared code; None stands for a field that the route does not have.
    """
    try:
        yield
    except (SeraServeError, StoreError) as error:
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise


def describe(error: Exception, request_id: str) -> tuple[int, dict[str, Any], int | None]:
    """Return (status, JSON, seconds to wait before another try or None) of a failure.

    A fault of the server itself is logged with its traceback. The client learns only the request id of such a fault.
    """
    if isinstance(error, SeraServeError | StoreError):
        retry_after = getattr(error, "retry_after", 1 if error.status in (429, 503) else None)
        if error.status == 507:
            # The client gets the message too, but only the operator can act on a full disk. The cause has the path.
            logger.error("request %s could not be written: %s: %s", request_id, error.message, error.__cause__)
        if error.status != 500:
            return error.status, error_content(error.status, error.message, error.code, error.param), retry_after
        code = error.code
    else:
        code = "internal_error"
    logger.error("request %s failed", request_id, exc_info=error)
    message = f"the server failed to answer; the server's log has the reason under request id {request_id}"
    return 500, error_content(500, message, code), None


class ErrorAnswer(JSONResponse):
    """The response of a failure. Its code goes into the request's line of the log."""

    def __init__(self, content: dict[str, Any], status: int, headers: Mapping[str, str] | None = None) -> None:
        """Make the response of what `error_content` returns."""
        super().__init__(content, status, headers)
        self._code: str = content["error"]["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        note_code(scope, self._code)
        await super().__call__(scope, receive, send)


def note_code(scope: Scope, code: str) -> None:
    """Put the code of a failure into the request's line of the log."""
    record = scope["state"].get("record")
    # What is refused before `RequestLifecycle` has no line.
    if record is not None:
        record.code = code


def error_response(error: Exception, request_id: str) -> ErrorAnswer:
    """Return the response for any failure."""
    status, content, retry_after = describe(error, request_id)
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in REPEATED_IN_VAIN:
        headers[SHOULD_RETRY] = "false"
    return ErrorAnswer(content, status, headers)


# The log has the traceback of a fault of the server, or of its disk. Its thread writes it later.
_LOGGED = (500, 507)


def forget_frames(error: BaseException, status: int) -> None:
    """Drop the tracebacks of an error that was answered with a status, and of those that led to it.

    Frames refer to errors and errors to frames. As cycles, they would keep the body of a refused request, and all that
    was made of it, until the next collection.
    """
    if status in _LOGGED:
        return
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        each = found.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            found += [each.__cause__, each.__context__]


def add_error_handlers(app: FastAPI) -> None:
    """Handle every exception that a route raises. `RequestLifecycle` handles exceptions from outside the routes."""
    app.add_exception_handler(SeraServeError, _forgetting(_typed))
    app.add_exception_handler(StoreError, _forgetting(_typed))
    app.add_exception_handler(RequestValidationError, _forgetting(_invalid))
    app.add_exception_handler(HTTPException, _forgetting(_http))
    app.add_exception_handler(ClientDisconnected, _forgetting(_closed))
    app.add_exception_handler(ClientDisconnect, _forgetting(_closed))


_Handler = Callable[[Request, Exception], Awaitable[Response]]


def _forgetting(handle: _Handler) -> _Handler:
    async def handled(request: Request, error: Exception) -> Response:
        response = await handle(request, error)
        forget_frames(error, response.status_code)
        return response

    return handled


async def _typed(request: Request, error: Exception) -> Response:
    failure = cast(SeraServeError | StoreError, error)
    if failure.status in COUNTED_STATUSES:
        request.app.state.metrics.count_refusal(failure.code)
    return error_response(error, request.state.request_id)


async def _invalid(request: Request, error: Exception) -> Response:
    message, code, param = validation_problem(cast(RequestValidationError, error))
    status = 400 if code == "invalid_json" else 422
    return ErrorAnswer(error_content(status, message, code, param), status)


def validation_problem(error: RequestValidationError) -> tuple[str, str, str | None]:
    """Return (message, code, param) of a request that is not of its form."""
    errors = error.errors()
    first, others = _first_problem(list(errors))
    message, param = _readable(first)
    more = f" (and {others} more)" if others else ""
    return message + more, VALIDATION_CODES.get(first["type"], "invalid_value"), param


def _first_problem(errors: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Return the first of pydantic's errors, and how many others there are.

    A field that may be of several types has an error for each, under the type's name. They become one error of the
    field: what it may be, or what is wrong within it where the value is of one of the types.
    """
    first = errors[0]
    at = next((i for i, part in enumerate(first["loc"]) if _is_type(part)), None)
    if at is None:
        return first, len(errors) - 1
    field = first["loc"][:at]
    members = [error for error in errors if error["loc"][:at] == field and len(error["loc"]) > at]
    others = len(errors) - len(members)
    within = next((error for error in members if len(error["loc"]) > at + 1), None)
    if within is not None:
        return {**within, "loc": (*field, *within["loc"][at + 1 :])}, others
    wanted = [error["msg"].removeprefix("Input should be ") for error in members]
    return {**first, "loc": field, "msg": f"Input should be {' or '.join(dict.fromkeys(wanted))}"}, others


def _is_type(part: int | str) -> bool:
    return isinstance(part, str) and (part in _TYPE_NAMES or part.startswith(_TYPE_PREFIXES))


def _readable(error: dict[str, Any]) -> tuple[str, str | None]:
    """Return (message, param) of one of pydantic's errors."""
    context = error.get("ctx") or {}
    if "unknown" in context and (place := _path(error["loc"])):
        name = context["unknown"]
        return f"{name!r} is not a field of {place}; {context['hint']}", f"{place}.{name}"
    if "reason" in context:
        return str(context["reason"]), context.get("field") or context.get("unknown") or _path(error["loc"]) or None
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {context.get('error')}", None
    path = _path(error["loc"])
    if not path:
        return "the body must be a JSON object with the fields of this request", None
    if error["type"] == "missing":
        return f"{path} is missing; send it", path
    if error["type"] == "extra_forbidden":
        kind = "a query parameter" if error["loc"][0] == "query" else "a field"
        return f"{path!r} is not {kind} of this request; leave it out", path
    # pydantic's "Input should be ..." becomes "top_p is 3: it should be ..."; "String should have ..." likewise.
    subject, verb, rest = error["msg"].partition(" should ")
    reason = f"it{verb}{rest}" if verb and subject in _SUBJECTS else error["msg"]
    return f"{path} is {shown(error.get('input'))}: {reason}", path


def shown(value: Any) -> str:
    """Return a JSON value for a message. Only the start of a value is looked at: a client chooses its size."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {counted(len(value), 'item')}"
    text = repr(value[:_MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


async def _http(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    status = failure.status_code
    message, headers = failure.detail, failure.headers
    routes: Sequence[BaseRoute] = request.app.state.routes
    if status == 404:
        near = near_path(routes, request.scope)
        message = f"no such path; {f'did you mean {near}?' if near else 'GET /docs lists the paths'}"
    elif status == 405:
        allowed = allow_header(routes_of_path(routes, request.scope))
        message, headers = f"{request.method[:16]} is not allowed here; allowed are {allowed}", {"Allow": allowed}
    code = CODES.get(status, http.HTTPStatus(status).phrase.lower().replace(" ", "_"))
    return ErrorAnswer(error_content(status, message, code), status, headers)


async def _closed(request: Request, error: Exception) -> Response:
    # The client is gone. The log and the metrics show the status, and nginx uses the same one.
    note_code(request.scope, CLIENT_CLOSED_CODE)
    return Response(status_code=CLIENT_CLOSED)


def _printable(text: str, limit: int) -> str:
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return cut.encode("utf-8", "replace").decode("utf-8")
