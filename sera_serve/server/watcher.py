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

from adapters_store import BundleLimits, StoreError, StoreUnavailable, parse_adapter
from adapters_store.errors import AdapterNotFound, InvalidAdapterName, StoreWriteFailed
from adapters_store.format.containers import CONFIG_FILE
from adapters_store.format.safetensors_file import MODEL_FILE
from sera_serve.access import AccessDatabaseError, Actor
from sera_serve.errors import EngineUnavailable, Overloaded, SeraServeError
from sera_serve.server.deps import Executors
from sera_serve.server.publishing import Publisher, read_source
from sera_serve.threads import BoundedExecutor

logger = logging.getLogger("sera_serve.watch")

POLL_S = 1.0
# An adapter is read after so many polls without a change, and withdrawn after so many polls without it.
_QUIET_POLLS = 2
# What the disk or the database refused is tried again after so many polls.
_RETRY_POLLS = 30
# The time between two polls is at least so many times that of a poll.
_IDLE_SHARE = 4
# Files of one adapter that are looked at.
_MAX_FILES = 256
_SUFFIXES = (".safetensors", ".tar", ".zip")
_ACTOR = Actor("watch")
# Refusals that have nothing to do with the adapter.
_PASSING = (StoreWriteFailed, StoreUnavailable, AccessDatabaseError)

# (path, bytes, time of change, inode) of each file of one adapter.
Signature = tuple[tuple[str, int, int, int], ...]


@dataclass
class _Entry:
    """One adapter of the directory.

    Attributes:
        path: Where it lies.
        signature: What it looked like in the last poll; None if a file vanished while it was looked at.
        quiet: Polls since it last changed.
        handled: Whether this state of it was published or refused.
        is_old: Whether this state may be older than the watch: nobody has seen it come.
    """

    path: str
    signature: Signature | None
    quiet: int = 0
    handled: bool = False
    is_old: bool = False


class WatchedDirectory:
    """What a directory of adapters holds, from poll to poll. Its methods block; one thread at a time calls them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, _Entry] = {}
        # Path and signature of what was published. An adapter that is absent for a moment comes back as it was.
        self._published: dict[str, tuple[str, Signature | None]] = {}
        # Tenants and adapters that no poll has been able to read; None before the first poll.
        self._unread: set[str] | None = None
        # The file systems of the directory ("") and of its tenants' folders, as of the last poll that took their word.
        self._devices: dict[str, int] = {}
        # Polls in a row in which a published adapter was absent.
        self._absent: dict[str, int] = {}
        # The last refusal of each adapter that is tried again.
        self._refusals: dict[str, str] = {}
        # What was complained of so far, and in the poll under way: a complaint whose reason lasts is not repeated.
        self._complaints: set[str] = set()
        self._current: set[str] = set()

    def poll(self) -> tuple[list[str], list[str]]:
        """Look at the directory.

        Returns:
            Names of adapters that are new or changed and quiet since, and names of published ones that are gone: after
            several polls without them, because network file systems hide files for moments.

        What is absent because a file system was unmounted is not gone.

        Raises:
            OSError: The directory cannot be read, or is not there. Nothing counts as gone then.
        """
        found, present, unread = self._scan()
        before = self._unread
        self._unread = unread if before is None else before & unread
        missing = self._published.keys() - present
        self._absent = {name: self._absent.get(name, 0) + 1 for name in missing}
        gone = sorted(name for name, polls in self._absent.items() if polls >= _QUIET_POLLS)
        self._entries = {name: entry for name, entry in self._entries.items() if name in present}
        # What is gone without a publication is forgotten; what was published is still to be withdrawn.
        kept = present | self._published.keys()
        self._refusals = {name: text for name, text in self._refusals.items() if name in kept}
        ready = []
        for name, (path, signature) in found.items():
            entry = self._entries.get(name)
            if entry is None or signature is None or (entry.path, entry.signature) != (path, signature):
                is_old = entry is None and (before is None or not before.isdisjoint((name, parse_adapter(name)[0])))
                handled = signature is not None and self._published.get(name) == (path, signature)
                self._entries[name] = _Entry(path, signature, handled=handled, is_old=is_old)
                continue
            entry.quiet += 1
            if not entry.handled and entry.quiet >= _QUIET_POLLS:
                ready.append(name)
        return ready, gone

    def path(self, name: str) -> str:
        """Where an adapter lies."""
        return self._entries[name].path

    def is_old(self, name: str) -> bool:
        """Whether an adapter looks as it did when the watch began."""
        return self._entries[name].is_old

    def is_unchanged(self, name: str) -> bool:
        """Whether an adapter still looks as in the last poll."""
        entry = self._entries[name]
        return _signature(entry.path) == entry.signature

    def mark_handled(self, name: str, published: bool) -> None:
        """Leave an adapter alone until it changes; `published` says whether it is withdrawn when it vanishes."""
        entry = self._entries[name]
        entry.handled = True
        self._refusals.pop(name, None)
        if published:
            self._published[name] = entry.path, entry.signature

    def forget(self, name: str) -> None:
        """An adapter was withdrawn."""
        self._published.pop(name, None)
        self._refusals.pop(name, None)

    def try_later(self, name: str, refusal: str) -> bool:
        """Leave an adapter alone for a while. Returns whether the refusal is another one than the last."""
        if (entry := self._entries.get(name)) is not None:
            entry.quiet = _QUIET_POLLS - _RETRY_POLLS
        if name in self._absent:
            self._absent[name] = _QUIET_POLLS - _RETRY_POLLS
        is_new = self._refusals.get(name) != refusal
        self._refusals[name] = refusal
        return is_new

    def _scan(self) -> tuple[dict[str, tuple[str, Signature | None]], set[str], set[str]]:
        """What the adapters look like, the names of all that are there, and the tenants and names that are unreadable.

        Unreadable ones count as there.
        """
        found: dict[str, tuple[str, Signature | None]] = {}
        present: set[str] = set()
        self._current = set()
        unread: set[str] = set()
        devices = {"": self.root.stat().st_dev}
        with os.scandir(self.root) as tenants:
            folders = sorted(tenants, key=lambda entry: entry.name)
        for folder in folders:
            if folder.name.startswith("."):
                continue
            try:
                devices[folder.name] = Path(folder.path).stat().st_dev
                if not folder.is_dir():
                    self._complain(f"{folder.path} is left out: it lies in no tenant's folder; {self._move(folder)}")
                    continue
                entries = sorted(os.scandir(folder.path), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                # It vanished between two calls.
                continue
            except OSError as error:
                self._complain(f"{folder.path} cannot be read; what it held stays as it is: {error}")
                present.update(name for name in self._published if name.startswith(f"{folder.name}/"))
                unread.add(folder.name)
                continue
            if any(entry.name == CONFIG_FILE for entry in entries):
                # Its weights alone would be published as an adapter of a tenant of that name.
                self._complain(f"{folder.path} is an adapter's folder, and should be a tenant's; {self._move(folder)}")
                entries = [entry for entry in entries if entry.name not in (CONFIG_FILE, MODEL_FILE)]
                # The weights may be an adapter that was there before.
                present.add(f"{folder.name}/{_stem(MODEL_FILE)}")
            for entry in entries:
                try:
                    self._look_at(folder.name, entry, found)
                except OSError as error:
                    self._complain(f"{entry.path} cannot be read; its adapter stays as it is: {error}")
                    # What is no directory any more may have been one.
                    unread.update(f"{folder.name}/{stem}" for stem in (entry.name, _stem(entry.name)))
        present |= unread | found.keys()
        present |= self._unmounted(devices, self._published.keys() - present)
        # A complaint whose reason is gone may come again.
        self._complaints &= self._current
        return found, present, unread

    def _move(self, entry: os.DirEntry[str]) -> str:
        return f"move it to {self.root}/TENANT/{entry.name}"

    def _unmounted(self, devices: dict[str, int], missing: set[str]) -> set[str]:
        """Those of the missing adapters that lay on a file system that is not there any more."""
        moved = {place for place, device in devices.items() if self._devices.get(place, device) != device}
        lost = {name for name in missing if not moved.isdisjoint(("", parse_adapter(name)[0]))}
        for place in sorted(moved):
            if names := sorted(name for name in lost if not place or name.startswith(f"{place}/")):
                self._complain(
                    f"{self.root / place} lies on another file system than before, so what it lacks stays as it is "
                    f"({names[0]}{' and more' * (len(names) > 1)}); mount it again, or start the server again",
                )
                devices[place] = self._devices[place]
        self._devices = self._devices | devices
        return lost

    def _look_at(self, tenant: str, entry: os.DirEntry[str], found: dict[str, tuple[str, Signature | None]]) -> None:
        """Add an entry to `found`; raises OSError where it cannot be read."""
        if entry.name.startswith("."):
            return
        stem = entry.name
        if not entry.is_dir():
            stem = _stem(entry.name)
            if stem == entry.name:
                self._complain(f"{entry.path} is neither a directory nor {', '.join(_SUFFIXES)}")
                return
        name = f"{tenant}/{stem}"
        try:
            parse_adapter(name)
        except InvalidAdapterName as error:
            self._complain(f"{entry.path} is left out: {error.message}")
            return
        if name in found:
            self._complain(f"{entry.path} is left out: {found[name][0]} has the same name")
            return
        found[name] = (entry.path, _signature(entry.path))

    def _complain(self, message: str) -> None:
        self._current.add(message)
        if message not in self._complaints:
            self._complaints.add(message)
            logger.warning("%s", message)


@asynccontextmanager
async def watching(
    root: Path | None, publisher: Publisher, executors: Executors, limits: BundleLimits
) -> AsyncIterator[None]:
    """Keep the store in step with a directory while the block runs; None watches nothing."""
    if root is None:
        yield
        return
    # Of its own: a disk that never answers must keep no other work waiting, and must not delay the end.
    looking = BoundedExecutor("watching", 1, 1)
    watched = WatchedDirectory(root)
    task = asyncio.create_task(_watch(watched, publisher, executors, limits, looking))
    try:
        yield
    finally:
        looking.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(
    directory: WatchedDirectory,
    publisher: Publisher,
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
                await executors.changing.run(_withdraw, directory, name, publisher)
            for name in ready:
                await executors.publishing.run(_publish, directory, name, publisher, limits)
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
        except Exception as error:
            if repr(error) != unreadable:
                unreadable = repr(error)
                logger.exception("the watched directory %s was not read because of an unexpected error", directory.root)
        await asyncio.sleep(max(POLL_S, _IDLE_SHARE * took))


def _publish(directory: WatchedDirectory, name: str, publisher: Publisher, limits: BundleLimits) -> None:
    path = directory.path(name)
    try:
        # A link must not lead into what another tenant has, or out of the directory.
        source = read_source(path, limits, within=directory.root / parse_adapter(name)[0])
        if not directory.is_unchanged(name):
            # It is being written again. The next polls see the change.
            return
        bundle, warnings = publisher.checked(source)
        # An earlier server may have published it, and a newer version may have come by another way since.
        is_old = directory.is_old(name)
        is_known = is_old and publisher.store.has_content(name, bundle.digest)
        published = publisher.publish(bundle, name, _ACTOR, keep_latest=is_old)
    except _PASSING as error:
        if directory.try_later(name, error.message):
            logger.error("%s is not published yet, and is tried again: %s", path, error.message)
        return
    except (SeraServeError, StoreError) as error:
        directory.mark_handled(name, published=False)
        logger.error("%s is not published, until it changes: %s", path, error.message)
        return
    except Exception:
        # One adapter must not end the watch of the others.
        directory.mark_handled(name, published=False)
        logger.exception("%s is not published, until it changes, because of an unexpected error", path)
        return
    directory.mark_handled(name, published=True)
    if is_known:
        # So it was at the end of an earlier watch, which has said this and the warnings.
        return
    logger.info("%s is published as %s@v%d", path, name, published.version)
    for warning in warnings:
        logger.warning("%s: %s", path, warning)


def _withdraw(directory: WatchedDirectory, name: str, publisher: Publisher) -> None:
    try:
        publisher.remove(name, _ACTOR)
        logger.info("%s is withdrawn: it vanished from %s", name, directory.root)
    except AdapterNotFound:
        # Somebody else deleted it.
        pass
    except (StoreError, AccessDatabaseError) as error:
        if directory.try_later(name, error.message):
            logger.error("%s vanished and cannot be withdrawn yet: %s", name, error.message)
        return
    except EngineUnavailable:
        raise
    except Exception:
        logger.exception("%s vanished and stays published because of an unexpected error; delete it by hand", name)
    directory.forget(name)


def _stem(name: str) -> str:
    """The name of a file without the suffix of an adapter; the same name if it has none."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def _signature(path: str) -> Signature | None:
    """What the files of an adapter look like; None where a file vanishes meanwhile. Raises OSError otherwise."""
    try:
        return tuple(sorted(_files(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(path: str) -> Iterator[tuple[str, int, int, int]]:
    if not Path(path).is_dir():
        yield _state(path)
        return
    # An adapter has its files at most one level down.
    folders = [path]
    count = 0
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
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
