"""`GET /console` and the files of its page. The page loads nothing from another host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from sera_serve.server.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, include_in_schema=False)

_PAGE = "index.html"
_FOLDERS = ("js", "vendor")
# Only files of these types are served. The licences and the notes beside them stay in the package.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script, no eval, no other host. A text never becomes markup: the browser refuses it (trusted types).
_POLICY = (
    "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser asks each time whether a file has changed, and then gets a 304 without the file.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class StaticFile:
    """A file of the page.

    Attributes:
        content: Its bytes.
        media_type: The value of Content-Type.
        etag: A strong validator: the SHA-256 of the content, in quotation marks.
    """

    content: bytes
    media_type: str
    etag: str


@router.get("/console")
async def console_page(request: Request) -> Response:
    """Return the page."""
    return await _answer(request, _PAGE)


@router.get("/console/")
async def console_page_with_slash() -> Response:
    """Send a browser to the page. The page's own links are relative to `/console`."""
    return Response(status_code=308, headers={"Location": "../console"})


@router.get("/console/{file:path}")
async def console_file(file: str, request: Request) -> Response:
    """Return a file that the page loads. Answers 404 for any other name."""
    return await _answer(request, file)


@cache
def static_files() -> dict[str, StaticFile]:
    """Return the files of the page by their path below `/console/`. Read once; no name of a client is ever a path."""
    root = Path(__file__).parent
    found = {}
    for path in (*root.iterdir(), *(path for folder in _FOLDERS for path in (root / folder).rglob("*"))):
        media_type = _MEDIA_TYPES.get(path.suffix)
        if media_type is not None:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            found[path.relative_to(root).as_posix()] = StaticFile(content, media_type, etag)
    return found


async def _answer(request: Request, name: str) -> Response:
    file = (await run_in_threadpool(static_files)).get(name)
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "ETag": file.etag}
    if file.etag in _validators(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _validators(header: str) -> list[str]:
    """The validators of If-None-Match. A proxy that changes the encoding makes a strong validator weak."""
    return [validator.strip().removeprefix("W/") for validator in header.split(",")]
