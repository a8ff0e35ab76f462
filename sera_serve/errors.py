"""Every refusal of the runtime: a typed error with an HTTP status, a stable code, the field and the remedy."""

from __future__ import annotations


class SeraServeError(Exception):
    """Base of the runtime's errors.

    Attributes:
        message: What is wrong and what to do about it, for a person.
        param: The request field or option at fault, or None.
        code: Stable snake_case identifier, for programs.
        status: HTTP status that the server answers with.
    """

    code: str = "internal_error"
    status: int = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SeraServeError):
    """A field of a request has a value that cannot be served."""

    code = "invalid_request"
    status = 422


class PromptTooLong(InvalidRequest):
    """Prompt and requested tokens together exceed the base model's context."""

    code = "context_length_exceeded"


class UnsupportedTask(InvalidRequest):
    """The adapter or the base model does not serve the task asked of it."""

    code = "unsupported_task"


class InvalidConfiguration(SeraServeError):
    """A setting, adapter configuration or command-line option cannot work."""

    code = "invalid_configuration"
    status = 422


class BaseNotFound(InvalidConfiguration):
    """The base model named could not be loaded."""

    code = "base_not_found"


class AdapterTooLarge(SeraServeError):
    """The adapter is larger than the whole device pool."""

    code = "adapter_too_large"
    status = 422


class Overloaded(SeraServeError):
    """No room for the request now; it may be sent again after `retry_after` seconds."""

    code = "overloaded"
    status = 503

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class TenantOverloaded(Overloaded):
    """The request's tenant has more requests under way than its part; others may still be served."""

    code = "tenant_overloaded"
    status = 429


class DeadlineExceeded(SeraServeError):
    """The time that the client gave its request is over."""

    code = "deadline_exceeded"
    status = 504


class CannotPin(SeraServeError):
    """The adapter cannot be pinned now: pins would take too much of the pool, or it is being deleted."""

    code = "cannot_pin"
    status = 409


class EngineUnavailable(SeraServeError):
    """The engine is not running; the server answers 503 until it is restarted."""

    code = "engine_unavailable"
    status = 503
