"""`GET /docs`: the interactive page of the interface. Its script comes from the server: no other host is asked."""

from __future__ import annotations

import importlib.resources
from functools import cache

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html

from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, include_in_schema=False)

_FILES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}
# The page's own script is inline, and Swagger UI sets styles and images that way.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)


@router.get("/docs")
async def docs_page() -> Response:
    """Return the page. It reads /openapi.json, and sends what a person tries to this server."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="sera-serve",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon.png",
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


def _add_file(name: str, media_type: str) -> None:
    @router.get(f"/docs/{name}")
    async def file() -> Response:
        return Response(_content(name), media_type=media_type, headers={"Cache-Control": "max-age=86400"})


for _name, _media_type in _FILES.items():
    _add_file(_name, _media_type)


@cache
def _content(name: str) -> bytes:
    """Read a file of the package fastapi-offline, which carries Swagger UI: once, 1.7 MB for all of them."""
    return (importlib.resources.files("fastapi_offline") / "static" / name).read_bytes()
