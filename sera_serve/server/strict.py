"""Strict requests: JSON with one meaning, no unread field, no unread query parameter, no other media type."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from adapters_store import parse_json
from sera_serve.errors import InvalidRequest, SeraServeError


class UnsupportedMediaType(SeraServeError):
    """The route does not accept the media type of the body."""

    code = "unsupported_media_type"
    status = 415


class RequestModel(BaseModel):
    """A JSON request body with strict types. Unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_field(cls, value: Any) -> Any:
        known = list(cls.model_fields)
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name[:64], known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                raise PydanticCustomError(
                    "extra_forbidden",
                    "{reason}",
                    {"reason": f"{name[:64]!r} is not a field of this request; {hint}", "field": name[:64]},
                )
        return value


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
        """Return the body's JSON value. FastAPI turns a json.JSONDecodeError into a validation error."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that refuses query parameters that it does not read, and bodies that are not JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the checks before it."""
        handle = super().get_route_handler()
        reads_json = self.body_field is not None
        reads_query = bool(self.dependant.query_params)

        async def checked(request: Request) -> Response:
            if request.query_params and not reads_query:
                name = next(iter(request.query_params))[:64]
                raise InvalidRequest(f"this route does not read query parameter {name!r}; leave it out", param=name)
            if reads_json and media_type(request) != "application/json":
                raise UnsupportedMediaType(
                    "the body must be JSON; send the header Content-Type: application/json", param="Content-Type"
                )
            strict = StrictRequest(request.scope, request.receive)
            if reads_json:
                # The body is read here. FastAPI would turn the refusal of a long body into a status 400.
                await strict.body()
            return await handle(strict)

        return checked
