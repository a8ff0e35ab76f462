"""Stricter requests than the framework's: one reading of the JSON, and nothing sent that is not looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from sera_serve.errors import InvalidRequest, SeraServeError


class UnsupportedMediaType(SeraServeError):
    """The body is not of the type that the route takes."""

    code = "unsupported_media_type"
    status = 415


def media_type(request: Request) -> str:
    """The media type of the body, lower case, without parameters; empty if none is given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(data: bytes) -> Any:
    """Parse JSON that has one meaning: UTF-8, no key twice, no NaN, no lone surrogates.

    Raises:
        json.JSONDecodeError: With what is wrong.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        # A lone surrogate is legal in JSON's escapes, but is no text and could not be sent back.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("not UTF-8", "", error.start) from error
    except UnicodeEncodeError as error:
        raise json.JSONDecodeError("a string holds half of a surrogate pair", "", 0) from error
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from error
    return value


class StrictRequest(Request):
    """A request whose `json` is `parse_json`."""

    async def json(self) -> Any:
        """The body's JSON value; raises json.JSONDecodeError, which the framework turns into a typed answer."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that refuses bodies of another type than JSON, and query parameters that it does not read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind the checks."""
        handle = super().get_route_handler()
        reads_json = self.body_field is not None
        reads_query = bool(self.dependant.query_params)

        async def checked(request: Request) -> Response:
            if request.query_params and not reads_query:
                name = next(iter(request.query_params))[:64]
                raise InvalidRequest(f"query parameter {name!r} is not read here; leave it out", param=name)
            if reads_json and media_type(request) != "application/json":
                raise UnsupportedMediaType(
                    "the body must be JSON; send the header Content-Type: application/json", param="Content-Type"
                )
            strict = StrictRequest(request.scope, request.receive)
            if reads_json:
                # Read here, because the framework would turn the refusal of a long body into a status 400.
                await strict.body()
            return await handle(strict)

        return checked


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:64]!r} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
