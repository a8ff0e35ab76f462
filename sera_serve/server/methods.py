"""HTTP methods beyond those of the routes: HEAD, OPTIONS, and the Allow header; and paths that are nearly a route's."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sera_serve.server.strict import refuse_body

# A longer path is not looked for, and would not fit into a message.
_MAX_PATH = 200
HEADERS_ONLY = "sera_serve.headers_only"
"""Key of the scope of a request whose response has no body."""
# What vLLM and SGLang call it.
_OTHER_NAMES = {"/health": "/healthz"}


def routes_of_path(routes: Sequence[BaseRoute], scope: Scope) -> list[Route]:
    """Return the routes that serve the path of a request, for any method."""
    return [route for route in routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]


def allow_header(routes: Sequence[Route]) -> str:
    """Return the value of the Allow header for a path with these routes. A router names one route's methods alone."""
    methods = {method for route in routes for method in route.methods or ()}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods | {"OPTIONS"}))


def near_path(routes: Sequence[BaseRoute], scope: Scope) -> str | None:
    """Return the path that a request for an unknown path may have meant, or None.

    Clients are set up with a base URL without /v1, with it twice or after another prefix, and with slashes too many.
    Probes are set up for another server.
    """
    path: str = scope["path"]
    if len(path) > _MAX_PATH:
        return None
    plain = "/" + "/".join(part for part in path.split("/") if part)
    for near in (_OTHER_NAMES.get(plain, plain), f"/v1{plain}", plain[max(0, plain.rfind("/v1/")) :]):
        if near != path and routes_of_path(routes, {**scope, "path": near}):
            return near
    return None


class HeadAndOptions:
    """Answers HEAD as GET, and OPTIONS with the methods of the path.

    The HTTP server sends no body in response to HEAD. OPTIONS of an unknown path is left to the app, which answers 404.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        method = scope.get("method")
        if method == "HEAD":
            # A copy: the HTTP server must still see HEAD. A stream, which may last for hours, reads `HEADERS_ONLY` and
            # ends after its headers. The outer middleware reads the route.
            as_get = {**scope, "method": "GET", HEADERS_ONLY: True}
            try:
                await self.app(as_get, receive, send)
            finally:
                scope["route"] = as_get.get("route")
        elif method == "OPTIONS" and (matched := routes_of_path(self.routes, scope)):
            scope["route"] = matched[0]
            refuse_body(scope)
            await Response(status_code=204, headers={"Allow": allow_header(matched)})(scope, receive, send)
        else:
            await self.app(scope, receive, send)
