"""Watches a directory of adapters: what appears as `tenant/name` is published, what vanishes is withdrawn.

The directory is polled. Notices of the kernel do not come from network file systems, where such directories usually
lie, and a half-copied adapter needs a time of quiet anyway.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store import AdapterStore, BundleLimits, StoreError, parse_adapter
from adapters_store.errors import AdapterNotFound, InvalidAdapterName
from sera_serve.errors import EngineUnavailable, Overloaded, SeraServeError
from sera_serve.server.deps import Engine, Executors
from sera_serve.server.publishing import publish, read_source
from sera_serve.threads import BoundedExecutor

logger = logging.getLogger("sera_serve.watch")

POLL_S = 1.0
# Polls in which nothing of an adapter changes before it is read.
_QUIET_POLLS = 2
# Where a poll takes long, the time between two polls is so many times as long.
_IDLE_SHARE = 4
# Files of one adapter that are looked at.
_MAX_FILES = 256
_SUFFIXES = (".safetensors", ".tar", ".zip")

# (path, bytes, time of change, inode) of each file of one adapter.
Signature = tuple[tuple[str, int, int, int], ...]


@dataclass
class _Entry:
    """One adapter of the directory.

    Attributes:
        path: Where it lies.
        signature: What it looked like in the last poll.
        quiet: Polls since it last changed.
        handled: Whether this state of it was published or refused.
    """

    path: str
    signature: Signature
    quiet: int = 0
    handled: bool = False


class WatchedDirectory:
    """What a directory of adapters holds, from poll to poll. Its methods block; one thread at a time calls them."""

    def __init__(self, root: Path) -> None:
        """Look at nothing yet."""
        self.root = root
        self._entries: dict[str, _Entry] = {}
        self._published: set[str] = set()
        self._complaints: set[str] = set()

    def poll(self) -> tuple[list[str], list[str]]:
        """Look at the directory.

        Returns:
            Names of adapters that are new or changed and quiet since, and names of published ones that are gone.

        Raises:
            OSError: The directory cannot be read: it was removed or unmounted. Nothing counts as gone then.
        """
        found = self._scan()
        gone = [name for name in sorted(self._published) if name not in found]
        self._entries = {name: entry for name, entry in self._entries.items() if name in found}
        ready = []
        for name, (path, signature) in found.items():
            entry = self._entries.get(name)
            if entry is None or (entry.path, entry.signature) != (path, signature):
                self._entries[name] = _Entry(path, signature)
                continue
            entry.quiet += 1
            if not entry.handled and entry.quiet >= _QUIET_POLLS:
                ready.append(name)
        return ready, gone

    def path(self, name: str) -> str:
        """Where an adapter lies."""
        return self._entries[name].path

    def is_unchanged(self, name: str) -> bool:
        """Whether an adapter still looks as in the last poll."""
        entry = self._entries[name]
        return _signature(entry.path) == entry.signature

    def mark_handled(self, name: str, published: bool) -> None:
        """Leave an adapter alone until it changes; `published` says whether it is withdrawn when it vanishes."""
        self._entries[name].handled = True
        if published:
            self._published.add(name)

    def forget(self, name: str) -> None:
        """An adapter was withdrawn."""
        self._published.discard(name)

    def _scan(self) -> dict[str, tuple[str, Signature]]:
        found: dict[str, tuple[str, Signature]] = {}
        seen: set[str] = set()
        with os.scandir(self.root) as tenants:
            folders = sorted(entry.name for entry in tenants if not entry.name.startswith(".") and entry.is_dir())
        for tenant in folders:
            # A tenant's folder may vanish between two calls.
            with suppress(FileNotFoundError, NotADirectoryError):
                for entry in sorted(os.scandir(self.root / tenant), key=lambda entry: entry.name):
                    self._look_at(tenant, entry, found, seen)
        # A complaint whose reason is gone may come again.
        self._complaints &= seen
        return found

    def _look_at(
        self, tenant: str, entry: os.DirEntry[str], found: dict[str, tuple[str, Signature]], seen: set[str]
    ) -> None:
        if entry.name.startswith("."):
            return
        stem = entry.name
        if not entry.is_dir():
            suffix = next((suffix for suffix in _SUFFIXES if stem.endswith(suffix)), None)
            if suffix is None:
                self._complain(seen, f"{entry.path} is neither a directory nor {', '.join(_SUFFIXES)}")
                return
            stem = stem.removesuffix(suffix)
        name = f"{tenant}/{stem}"
        try:
            parse_adapter(name)
        except InvalidAdapterName as error:
            self._complain(seen, f"{entry.path} is left out: {error.message}")
            return
        if name in found:
            self._complain(seen, f"{entry.path} is left out: {found[name][0]} has the same name")
            return
        signature = _signature(entry.path)
        if signature is not None:
            found[name] = (entry.path, signature)

    def _complain(self, seen: set[str], message: str) -> None:
        seen.add(message)
        if message not in self._complaints:
            self._complaints.add(message)
            logger.warning("%s", message)


@asynccontextmanager
async def watching(
    root: Path | None, engine: Engine, store: AdapterStore, executors: Executors, limits: BundleLimits
) -> AsyncIterator[None]:
    """Keep the store in step with a directory while the block runs; None watches nothing."""
    if root is None:
        yield
        return
    # Of its own: a disk that never answers must keep no other work waiting, and must not delay the end.
    looking = BoundedExecutor("watching", 1, 1)
    task = asyncio.create_task(_watch(WatchedDirectory(root), engine, store, executors, limits, looking))
    try:
        yield
    finally:
        looking.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(
    directory: WatchedDirectory,
    engine: Engine,
    store: AdapterStore,
    executors: Executors,
    limits: BundleLimits,
    looking: BoundedExecutor,
) -> None:
    unreadable = ""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        took = 0.0
        try:
            ready, gone = await looking.run(directory.poll)
            took = loop.time() - began
            unreadable = ""
            for name in gone:
                await executors.changing.run(_withdraw, directory, name, engine, store)
            for name in ready:
                await executors.publishing.run(_publish, directory, name, engine, store, limits)
        except OSError as error:
            # Once, until it is back.
            if str(error) != unreadable:
                unreadable = str(error)
                logger.error("the watched directory %s cannot be read: %s", directory.root, error)
        except Overloaded:
            # Uploads go first; the next poll finds the same again.
            pass
        except EngineUnavailable:
            return
        await asyncio.sleep(max(POLL_S, _IDLE_SHARE * took))


def _publish(directory: WatchedDirectory, name: str, engine: Engine, store: AdapterStore, limits: BundleLimits) -> None:
    path = directory.path(name)
    try:
        source = read_source(path, limits)
        if not directory.is_unchanged(name):
            # It is being written again. The next polls see the change.
            return
        made = publish(source, name, engine, store)
    except (SeraServeError, StoreError) as error:
        directory.mark_handled(name, published=False)
        logger.error("%s is not published, until it changes: %s", path, error.message)
        return
    directory.mark_handled(name, published=True)
    logger.info("%s is published as %s@v%d", path, name, made.version.version)
    for warning in made.warnings:
        logger.warning("%s: %s", path, warning)


def _withdraw(directory: WatchedDirectory, name: str, engine: Engine, store: AdapterStore) -> None:
    try:
        for digest in store.delete(name).digests:
            engine.mark_deleted(digest)
        logger.info("%s is withdrawn: it vanished from %s", name, directory.root)
    except AdapterNotFound:
        # Somebody else deleted it.
        pass
    except StoreError as error:
        logger.error("%s vanished and cannot be withdrawn: %s", name, error.message)
        return
    directory.forget(name)


def _signature(path: str) -> Signature | None:
    """What the files of an adapter look like; None where it vanishes meanwhile or has too many files."""
    try:
        return tuple(sorted(_files(path)))
    except FileNotFoundError:
        return None


def _files(path: str) -> Iterator[tuple[str, int, int, int]]:
    if not Path(path).is_dir():
        yield _state(path)
        return
    # An adapter has its files at most one level down.
    folders = [path]
    count = 0
    for folder in folders:
        for entry in os.scandir(folder):
            count += 1
            if count > _MAX_FILES:
                return
            if entry.is_dir():
                if folder == path:
                    folders.append(entry.path)
                continue
            yield _state(entry.path)


def _state(path: str) -> tuple[str, int, int, int]:
    status = Path(path).stat()
    return path, status.st_size, status.st_mtime_ns, status.st_ino
