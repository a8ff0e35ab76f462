"""A real server on a real socket, in a thread of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from sera_serve.commands.serve import bound_socket, http_config
from sera_serve.config import ServeSettings
from sera_serve.server.graceful import GracefulServer

GRACE_S = 2


@contextmanager
def live_server(app: FastAPI) -> Iterator[str]:
    """Serve `app` as the command does, with the app's own settings and a short grace time.

    Yields the URL, and shuts the server down gracefully at the end.
    """
    # An app that is not the server's own has no settings, no metrics and no engine.
    state = app.state
    settings = getattr(state, "settings", ServeSettings()).model_copy(update={"shutdown_grace_s": GRACE_S})
    count_refusal = state.metrics.count_refusal if hasattr(state, "metrics") else lambda code: None
    config = http_config(app, settings, count_refusal, log_level="warning")
    server = GracefulServer(config, GRACE_S, state.engine.stop if hasattr(state, "engine") else lambda: None)
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
