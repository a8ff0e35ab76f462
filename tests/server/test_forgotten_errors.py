"""What a refused request sent, and what was made of it, is gone with its answer, not with the next collection."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient

from sera_serve.errors import InvalidRequest, SeraServeError
from sera_serve.server import sse
from sera_serve.server.errors import add_error_handlers, forget_frames
from support.live_server import wait_until
from support.no_collection import no_collection
from support.stub_engine import FAILS_LATER


@pytest.fixture(name="no_collection")
def _no_collection() -> Iterator[None]:
    with no_collection():
        yield


class Used:
    """What a request uses."""


def fail(used: Used) -> None:
    """Raise an error that refers to this frame, which refers to the error."""
    error = ValueError("the first cause")
    raise error


def refuse(used: Used) -> None:
    try:
        fail(used)
    except ValueError as error:
        raise InvalidRequest("no") from error


def translate(used: Used) -> None:
    try:
        refuse(used)
    except SeraServeError:
        # The cause is the error's context alone.
        raise InvalidRequest("no, in other words") from None


def test_an_answered_error_keeps_nothing(no_collection: None) -> None:
    app = FastAPI()
    add_error_handlers(app)
    used: list[weakref.ref[Used]] = []

    @app.get("/")
    async def route(request: Request) -> None:
        request.state.request_id = "r"
        mine = Used()
        used.append(weakref.ref(mine))
        translate(mine)

    async def main() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://x") as client:
            assert (await client.get("/")).status_code == 422
        assert [each() for each in used] == [None]

    asyncio.run(main())


def test_errors_that_refer_to_each_other_are_forgotten() -> None:
    first, second = ValueError("first"), ValueError("second")
    for error, other in ((first, second), (second, first)):
        try:
            raise error from other
        except ValueError as caught:
            assert caught.__traceback__ is not None
    for status in (500, 507):
        # The log's thread has yet to write what led to the error.
        forget_frames(first, status)
        assert first.__traceback__ is not None and second.__traceback__ is not None
    forget_frames(first, 422)
    assert first.__traceback__ is None and second.__traceback__ is None


def test_an_error_in_a_stream_keeps_nothing(url: str, no_collection: None, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[weakref.ref[Exception]] = []
    describe = sse.describe

    def noted(error: Exception, request_id: str) -> object:
        failures.append(weakref.ref(error))
        return describe(error, request_id)

    monkeypatch.setattr(sse, "describe", noted)
    body = {"adapter": "demo/writer", "prompt": FAILS_LATER, "stream": True, "n": 2}
    assert "error" in httpx.post(f"{url}/v1/generate", json=body).text
    # The client may be told before the server's last step of the request.
    wait_until(lambda: [each() for each in failures] == [None])
