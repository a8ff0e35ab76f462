"""The step that a thread runs: attention functions are found by name, and know no object of the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sera_serve.engine.loop.attention import StepContext


class _CurrentStep(threading.local):
    context: StepContext | None = None


_current = _CurrentStep()


@contextmanager
def running(context: StepContext) -> Iterator[None]:
    """Within the block, `context` is this thread's step; blocks must not nest."""
    if _current.context is not None:
        raise RuntimeError("a step is already running on this thread")
    _current.context = context
    try:
        yield
    finally:
        _current.context = None


def step_under_way() -> StepContext:
    """This thread's step; raises RuntimeError outside one."""
    if _current.context is None:
        raise RuntimeError("the model runs outside a step")
    return _current.context
