"""One forward pass at a time, where two threads compute on the same cores."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from torch import nn


class Turns:
    """A lock that is passed on in the order in which it was asked for, so that neither of two threads starves.

    A plain lock would go to whichever thread runs, which may well be the one that just gave it back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = 0
        self._serving = 0
        self._owner: int | None = None

    def __enter__(self) -> None:
        self.take()

    def take(self) -> None:
        """Wait for the turn of this thread."""
        with self._changed:
            turn = self._asked
            self._asked += 1
            self._changed.wait_for(lambda: self._serving == turn)
            self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Pass the turn on, if it is this thread's."""
        with self._changed:
            if self._owner == threading.get_ident():
                self._owner = None
                self._serving += 1
                self._changed.notify_all()


def take_turns(model: nn.Module, turns: Turns) -> None:
    """Have each forward pass of `model` take a turn."""

    def before(*unused: Any) -> None:
        turns.take()

    def after(*unused: Any) -> None:
        # Also called where `before` never was, because something failed earlier.
        turns.release()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)
