"""Errors as OpenAI's clients expect them: a bad request is 400 and never 422, an unknown model is 404."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from adapters_store.errors import AdapterNotFound, InvalidAdapterName, StoreError
from sera_serve.errors import SeraServeError
from sera_serve.server.errors import validation_problem
from sera_serve.server.strict import StrictRoute

# Fields of the engine by their names in these routes.
_PARAMS = {"adapter": "model", "token_ids": "prompt", "max_new_tokens": "max_tokens"}


class InvalidOpenAIRequest(SeraServeError):
    """The request cannot be served as it is."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class ModelNotFound(SeraServeError):
    """No adapter, and not the base, has the name that `model` has."""

    code = "model_not_found"
    status = 404


class OpenAIRoute(StrictRoute):
    """A strict route whose refusals have the status codes that OpenAI's clients map to their exceptions."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the translation around it."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            with translated_errors():
                return await handle(request)

        return translated


@contextmanager
def translated_errors(prompt: str = "prompt") -> Iterator[None]:
    """Turn refusals of the engine and the store into those of this interface.

    Args:
        prompt: The field that holds the prompt.
    """
    try:
        yield
    except RequestValidationError as error:
        message, code, param = validation_problem(error)
        raise InvalidOpenAIRequest(message, param=param, code=code) from error
    except (AdapterNotFound, InvalidAdapterName) as error:
        raise ModelNotFound(f"{error.message}; GET /v1/models lists the models", param="model") from error
    except (SeraServeError, StoreError) as error:
        param = error.param
        if param is not None:
            field, bracket, place = param.partition("[")
            field = _PARAMS.get(field, field)
            param = (prompt if field == "prompt" else field) + bracket + place
        if error.status == 422:
            raise InvalidOpenAIRequest(error.message, param=param, code=error.code) from error
        error.param = param
        raise
