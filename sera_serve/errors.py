"""Typed errors of the runtime: each has an HTTP status, a stable code, the field at fault and the remedy."""

from __future__ import annotations


class SeraServeError(Exception):
    """Base class of the runtime's errors.

    Attributes:
        message: What is wrong and how to correct it, for a person.
        param: The request field or option at fault, or None.
        code: Stable snake_case identifier, for programs.
        status: HTTP status of the response.
    """

    code: str = "internal_error"
    status: int = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SeraServeError):
    """A field of the request has a value that the server cannot use."""

    code = "invalid_request"
    status = 422


class PromptTooLong(InvalidRequest):
    """The prompt and the requested tokens together exceed the context length of the base model."""

    code = "context_length_exceeded"


class UnsupportedTask(InvalidRequest):
    """The adapter or the base model does not support the requested task."""

    code = "unsupported_task"


class InvalidImage(InvalidRequest):
    """An image of the request cannot be decoded, or is not of a kind that is read."""

    code = "invalid_image"


class ImageTooLarge(InvalidRequest):
    """An image has more bytes or pixels than the server reads, or the request has too many images."""

    code = "image_too_large"


class ConstraintUnsatisfiable(InvalidRequest):
    """The request's constraint allows no token where a token has to come."""

    code = "constraint_unsatisfiable"


class InvalidConfiguration(SeraServeError):
    """A setting, adapter configuration or command-line option cannot work."""

    code = "invalid_configuration"
    status = 422


class BaseNotFound(InvalidConfiguration):
    """The base model could not be loaded."""

    code = "base_not_found"


class AdapterOverflow(SeraServeError):
    """The adapter's values overflow: what it computes is infinite or not a number."""

    code = "adapter_overflow"
    status = 422


class AdapterTooLarge(SeraServeError):
    """The adapter is larger than the whole device pool."""

    code = "adapter_too_large"
    status = 422


class Overloaded(SeraServeError):
    """The server is full. The client may send the request again after `retry_after` seconds."""

    code = "overloaded"
    status = 503

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class TenantOverloaded(Overloaded):
    """The request's tenant has too many requests in flight. Other tenants may still be served."""

    code = "tenant_overloaded"
    status = 429


class TooManyInFlight(TenantOverloaded):
    """The request's tenant has as many requests in flight as its own limit allows."""

    code = "quota_exceeded"


class DeadlineExceeded(SeraServeError):
    """The request did not finish within the time that the client allowed."""

    code = "deadline_exceeded"
    status = 504


class CannotPin(SeraServeError):
    """The adapter cannot be pinned now: pins would take too much of the pool, or the adapter is being deleted."""

    code = "cannot_pin"
    status = 409


class EngineUnavailable(SeraServeError):
    """The engine is not running. The server answers 503 until the server is restarted."""

    code = "engine_unavailable"
    status = 503


class BaseOverflow(EngineUnavailable):
    """The base model alone gives logits that are infinite or not a number for this input."""

    code = "base_overflow"


def counted(number: int, noun: str) -> str:
    """A number of things for a message: "1 request", "2 requests"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
