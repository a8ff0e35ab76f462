"""Errors of the clients, by what went wrong. All of them are `SeraError`."""

from __future__ import annotations

import copyreg
import json
from typing import Any

_MAX_SHOWN = 300


class SeraError(Exception):
    """Base class of the clients' errors.

    Attributes:
        message: What is wrong, and what can be done about it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell how `pickle` and `copy` rebuild the error: by its attributes.

        `Exception` would call `__init__` with the message alone. A process pool then breaks, or hangs.
        """
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class SeraConnectionError(SeraError):
    """The server gave no whole answer.

    Attributes:
        sent: Whether a part of the request may have reached the server. Then the request may have had its effects.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class SeraTimeoutError(SeraConnectionError):
    """The client's own time limit ran out."""


class InvalidAnswerError(SeraError):
    """The server's answer has another form than this client knows. The address may be that of another service."""


class SeraAPIError(SeraError):
    """The server refused the request, or failed. Subclasses tell the kind.

    Attributes:
        message: The server's text: what is wrong, and the remedy.
        type: The server's family of the error, such as `invalid_request_error`; None where the answer has none.
        param: The field, tensor or parameter at fault, or None.
        code: Stable identifier, such as `adapter_not_found`; None where the answer has none.
        status: HTTP status. It is 200 of an error that ended a stream.
        request_id: The id by which the server's log names the request, or None.
        retry_after: Seconds after which the server asked to try again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str | None,
        param: str | None,
        code: str | None,
        status: int,
        request_id: str | None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.param = param
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        """Return the message with code, status and request id."""
        request = "" if self.request_id is None else f", {self.request_id}"
        return f"{self.message} ({self.code or 'no code'}, status {self.status}{request})"


class InvalidRequestError(SeraAPIError):
    """The request cannot be served as it is."""


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit the context."""


class InvalidAdapterError(InvalidRequestError):
    """An uploaded adapter was refused; `param` names the tensor or the field."""


class AuthenticationError(SeraAPIError):
    """The server needs a key, or does not accept this one."""


class PermissionDeniedError(SeraAPIError):
    """The server does not do this for this client or this key."""


class NotFoundError(SeraAPIError):
    """There is no such path, adapter or model."""


class AdapterNotFoundError(NotFoundError):
    """There is no adapter, or model, of this name."""


class ConflictError(SeraAPIError):
    """The state of the adapter does not allow this now."""


class RateLimitError(SeraAPIError):
    """The tenant has too many requests in flight, or has used up what it may use in a minute."""


class UnavailableError(SeraAPIError):
    """The server is full, stopping, or cannot reach its store."""


class RequestTimeoutError(SeraAPIError):
    """The request arrived too slowly, or was not finished within its `timeout_s`."""


class ServerError(SeraAPIError):
    """The server failed; its log has the reason under the request id."""


_INVALID_ADAPTER = (
    *("invalid_bundle", "not_safetensors", "header_too_large", "invalid_header", "truncated", "invalid_archive"),
    *("missing_file", "unexpected_file", "invalid_config", "unsupported_format", "missing_tensor"),
    *("unexpected_tensor", "wrong_shape", "wrong_dtype", "not_finite", "wrong_base", "unknown_module"),
    *("unsupported_adapter", "pickled_checkpoint", "import_mismatch", "bundle_too_large", "adapter_overflow"),
    *("wrong_task", "adapter_too_large"),
)
_BY_CODE: dict[str, type[SeraAPIError]] = {
    "context_length_exceeded": ContextLengthError,
    "adapter_not_found": AdapterNotFoundError,
    "model_not_found": AdapterNotFoundError,
    "deadline_exceeded": RequestTimeoutError,
    **dict.fromkeys(_INVALID_ADAPTER, InvalidAdapterError),
}
_BY_STATUS: dict[int, type[SeraAPIError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: RequestTimeoutError,
    409: ConflictError,
    429: RateLimitError,
    503: UnavailableError,
    504: RequestTimeoutError,
}
# An error in a stream has no status of its own.
_BY_TYPE: dict[str, type[SeraAPIError]] = {
    "invalid_request_error": InvalidRequestError,
    "authentication_error": AuthenticationError,
    "permission_error": PermissionDeniedError,
    "not_found_error": NotFoundError,
    "timeout_error": RequestTimeoutError,
    "rate_limit_error": RateLimitError,
    "service_unavailable_error": UnavailableError,
    "server_error": ServerError,
}


def api_error(
    status: int,
    body: bytes,
    request_id: str | None = None,
    retry_after: float | None = None,
    target: str | None = None,
) -> SeraAPIError:
    """Return the typed error of an answer's body. A body of another form, such as a proxy's, gives no code.

    `target` is where a redirection leads. The client does not follow it: the key would go to another server.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    detail = content.get("error") if isinstance(content, dict) else None
    fields = detail if isinstance(detail, dict) else {}
    message, kind, param, code = (_text(fields, name) for name in ("message", "type", "param", "code"))
    if message is None:
        shown = body[:_MAX_SHOWN].decode("utf-8", "replace").strip()
        if target is not None:
            shown = f"it leads to {target[:_MAX_SHOWN]!r}; give the client the server's own address as base_url"
        message = f"the answer has status {status}, and is no error of sera-serve: {shown or 'it is empty'}"
    return _class_of(status, kind, code)(
        message, type=kind, param=param, code=code, status=status, request_id=request_id, retry_after=retry_after
    )


def _class_of(status: int, kind: str | None, code: str | None) -> type[SeraAPIError]:
    found = _BY_CODE.get(code or "") or _BY_STATUS.get(status) or _BY_TYPE.get(kind or "")
    if found is not None:
        return found
    if status >= 500:
        return ServerError
    return InvalidRequestError if status >= 400 else SeraAPIError


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None
