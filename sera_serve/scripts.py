"""The console scripts. This module imports almost nothing: what they run takes seconds to import."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from typing import NoReturn

_INTERRUPTED = 128 + signal.SIGINT


def serve() -> None:
    """Run `sera-serve`."""
    _main_of("sera_serve.cli")()


def train_adapter() -> None:
    """Run `train_adapter`."""
    _main_of("sera_serve.trainer.cli")()


def _main_of(module: str) -> Callable[[], None]:
    """Import the `main` of a module. An interrupt meanwhile ends the process, without a traceback.

    Nothing is there yet that would have to end well. An exception would not do: libraries catch what their own imports
    raise.
    """
    # A shell starts a script's background jobs with the signal ignored.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return _import(module)
    signal.signal(signal.SIGINT, _end)
    try:
        return _import(module)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _import(module: str) -> Callable[[], None]:
    main: Callable[[], None] = importlib.import_module(module).main
    return main


def _end(number: int, frame: object) -> NoReturn:
    os._exit(_INTERRUPTED)
