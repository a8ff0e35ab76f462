"""An address of its own for operators: metrics and health apart from what clients can reach."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sera_serve.errors import InvalidConfiguration
from sera_serve.server.errors import error_content
from sera_serve.server.refusals import new_request_id

METRICS_PATH = "/metrics"
_ELSEWHERE = "the metrics have an address of their own, the setting metrics_address"
_OPERATORS_PATHS = (METRICS_PATH, "/healthz", "/readyz")


class MetricsAddress:
    """Serves `/metrics` on one port alone, and on that port nothing but metrics and health."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        """Wrap an app. `port` is the port of the operators' address."""
        self.app = app
        self.port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] == "http":
            path = scope["path"]
            is_operator = scope["server"][1] == self.port
            scope.setdefault("state", {})["is_operator"] = is_operator
            served = path in _OPERATORS_PATHS if is_operator else path != METRICS_PATH
            if not served:
                known = ", ".join(_OPERATORS_PATHS)
                message = f"no such path; this address has {known}" if is_operator else f"no such path; {_ELSEWHERE}"
                answer = error_content(404, message, "not_found")
                response = JSONResponse(answer, 404, {"X-Request-Id": new_request_id()})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def parse_address(text: str, server_port: int = 0) -> tuple[str, int]:
    """Read `metrics_address`, such as "127.0.0.1:9100" or "[::1]:9100"; port 0 picks a free one.

    Args:
        text: The setting.
        server_port: The server's own port; 0 while nobody knows it.

    Returns:
        Host and port.

    Raises:
        InvalidConfiguration: The text is no host and port, or the port is the server's own.
    """
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or text != parts.netloc or "@" in text:
        raise InvalidConfiguration(
            f'metrics_address is {text!r}: write host:port, such as "127.0.0.1:9100"', param="metrics_address"
        )
    if port and port == server_port:
        raise InvalidConfiguration(
            f"metrics_address is {text!r}: the server itself has port {port}; choose another port",
            param="metrics_address",
        )
    return host, port
