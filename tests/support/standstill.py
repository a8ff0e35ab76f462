"""Stops an engine for a while, so that a test can look at waiting requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def standstill() -> Iterator[threading.Event]:
    """Block every forward pass on other threads than the test's own until the block ends.

    Yields what is set once a pass stands still: nothing enters this pass any more.
    """
    stands, proceed = threading.Event(), threading.Event()
    test = threading.current_thread()

    def hold(module: nn.Module, inputs: Any) -> None:
        if threading.current_thread() is not test:
            stands.set()
            proceed.wait(60)

    hook = register_module_forward_pre_hook(hold)
    try:
        yield stands
    finally:
        hook.remove()
        proceed.set()
