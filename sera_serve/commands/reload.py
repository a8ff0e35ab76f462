"""SIGHUP: reads the settings again, and gives a running server those that it can take without a restart."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters_store import StoreError
from sera_serve.config import RELOADED, ServeSettings
from sera_serve.errors import SeraServeError

logger = logging.getLogger("sera_serve.server")

Apply = Callable[[Any], None]
"""Takes the new value of one setting; a SeraServeError refuses it, and the old value stays."""


@contextmanager
def hangup_noted() -> Iterator[threading.Event]:
    """Note SIGHUP, which ends a process by default, until a server takes the signal itself.

    A base loads for minutes, and whoever has changed the settings does not know whether it is loaded.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGHUP, lambda number, frame: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGHUP, before)


class SettingsReloader:
    """Reads the settings again when asked. Any thread may ask; one reading runs at a time."""

    def __init__(self, settings: ServeSettings, read: Callable[[], ServeSettings], apply: Mapping[str, Apply]) -> None:
        """Begin with the settings that the server was started with.

        Args:
            settings: The present ones.
            read: Reads them again, from the same file, flags and variables; raises InvalidConfiguration.
            apply: By setting, what takes a new value. These are the settings of `RELOADED`.
        """
        if set(apply) != RELOADED:
            raise ValueError(f"{sorted(apply)} are applied, and {sorted(RELOADED)} are to be")
        self._settings = settings
        self._read = read
        self._apply = apply
        self._lock = threading.Lock()

    def request(self) -> None:
        """Reload on a thread of its own. For signal handlers: returns at once."""
        threading.Thread(target=self.reload, name="reload", daemon=True).start()

    def reload(self) -> None:
        """Read the settings and apply what has changed. What is refused is logged, and stays as it was. Blocks."""
        with self._lock:
            try:
                read = self._read()
            except SeraServeError as error:
                logger.error("the settings were read again and are refused, all stay as they were: %s", error.message)
                return
            before, after = self._settings.model_dump(), read.model_dump()
            changed = [name for name in after if after[name] != before[name]]
            applied: dict[str, Any] = {}
            for name in changed:
                if name not in self._apply:
                    logger.warning("%s has changed, and only a restart of the server can change it", name)
                    continue
                try:
                    self._apply[name](after[name])
                except (SeraServeError, StoreError) as error:
                    logger.error("%s stays as it was: %s", name, error.message)
                else:
                    applied[name] = after[name]
            self._settings = self._settings.model_copy(update=applied)
            logger.info("the settings were read again; changed: %s", ", ".join(applied) or "none")
