"""Cancels the work for a request when the client disconnects."""

# Streams, plain routes and the error handlers all use this file, and it needs none of them.

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from sera_serve.server.loop_watch import measured_with_request

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed the connection before the response was ready."""


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, or cancel `work` when the client disconnects.

    Args:
        receive: The ASGI channel of the request. The body must have been read already.
        work: Must release everything that it holds when it is cancelled.

    Raises:
        ClientDisconnected: The client disconnected. `work` has ended.
    """
    task = asyncio.ensure_future(measured_with_request(work))
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
