"""A real server on a real socket, in a thread of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from sera_serve.commands.serve import bound_socket


@contextmanager
def live_server(app: FastAPI) -> Iterator[str]:
    """Serve `app`. Yields the URL, and shuts the server down gracefully at the end."""
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with bound_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    if thread.is_alive():
        raise TimeoutError("the server did not stop")


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until `condition` holds. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {seconds:g} s")
        time.sleep(0.005)
