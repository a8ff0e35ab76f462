"""The log of requests: one line each, and one more for a slow one. Never a prompt, unless a setting says so."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import Message, Receive, Scope

from sera_serve.config import ServeSettings
from sera_serve.server.accounting import RequestRecord
from sera_serve.server.loop_watch import route_of
from sera_serve.server.scopes import needed_scope

# Not "sera_serve.access", which is the package of keys.
logger = logging.getLogger("sera_serve.requests")


class RequestLog:
    """Writes a line for each request, at level INFO, and for each slow one a line at level WARNING.

    A line is a record with the attribute `fields`: a mapping of short values, for `commands.logs` to format. The event
    loop does no more for a line than to make the mapping.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Read the settings `slow_request_s` and `log_prompts`."""
        self._slow_s = settings.slow_request_s
        self._body_bytes = settings.log_prompts

    def listen(self, receive: Receive, body: bytearray) -> Receive:
        """Return `receive`, which then puts the start of the body into `body` where the settings ask for prompts."""
        most = self._body_bytes
        if not most:
            return receive

        async def heard() -> Message:
            message = await receive()
            if len(body) < most:
                body.extend(message.get("body", b"")[: most - len(body)])
            return message

        return heard

    def write(self, scope: Scope, record: RequestRecord, status: int, seconds: float, body: bytearray) -> None:
        """Write the lines of one request.

        Args:
            scope: Of the request, after its response.
            record: What the request did.
            status: Of the response; 500 if there was none.
            seconds: From the start of the request to the end of its response.
            body: What `listen` has put into it.
        """
        is_slow = self._slow_s is not None and seconds >= self._slow_s
        if not is_slow and not logger.isEnabledFor(logging.INFO):
            return
        fields = self._fields(scope, record, status, seconds, body)
        # Not by `logger.info(..., extra=...)`, which looks for the caller's file and line first.
        if logger.isEnabledFor(logging.INFO):
            _emit(logging.INFO, "request", fields)
        if is_slow:
            _emit(logging.WARNING, "slow request", fields)

    def _fields(
        self, scope: Scope, record: RequestRecord, status: int, seconds: float, body: bytearray
    ) -> dict[str, Any]:
        state = scope["state"]
        caller = state.get("caller")
        key = None if caller is None else caller.key
        client = scope.get("client")
        route = route_of(scope)
        fields = {
            "request_id": state["request_id"],
            "trace_id": state.get("trace_id"),
            "method": scope["method"][:16],
            "route": route,
            "status": status,
            "code": record.code,
            "seconds": round(seconds, 6),
            "address": None if client is None else client[0],
            "tenant": record.tenant or (None if key is None else key.tenant),
            "key_id": None if key is None else key.id,
            "adapter": record.adapter,
            "version": record.version,
            "prompt_tokens": record.prompt_tokens or None,
            "completion_tokens": record.completion_tokens or None,
            "inputs": record.inputs or None,
            "waited_s": None if record.waited_s is None else round(record.waited_s, 6),
            "first_token_s": None if record.first_token_s is None else round(record.first_token_s, 6),
        }
        # Other bodies have secrets, files and bundles.
        if body and needed_scope(scope["method"], route) == "infer":
            fields["body"] = body.decode("utf-8", "replace")
        return {name: value for name, value in fields.items() if value is not None}


def _emit(level: int, message: str, fields: dict[str, Any]) -> None:
    content = {"name": logger.name, "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    logger.handle(logging.makeLogRecord(content | {"fields": fields}))
