"""Files that survive a kill and a power cut, and locks that the kernel frees when their owner dies.

Paths are plain strings wherever a client chooses a part of them. `pathlib` interns every part of every path, and
CPython 3.12 never gives interned strings back, so that requests for ever new names would fill its memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

_MANY = 64


def sync(path: str) -> None:
    """Flush a file's content, or a directory's entries, to the disk.

    Without the flush of its directory a rename may not survive a power cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(paths: Collection[str]) -> None:
    """Flush the entries of directories; of very many by one flush of everything, which takes seconds, not minutes."""
    if len(paths) > _MANY:
        os.sync()
        return
    for path in paths:
        sync(path)


def make_directory(path: str, within: str | None = None) -> None:
    """Make a directory and its missing parents durably; a no-op where it exists.

    Args:
        path: The directory.
        within: A directory above it that is never made: without it, `FileNotFoundError`.
    """
    if os.path.isdir(path):
        return
    if path == within:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    parent = os.path.dirname(path)
    make_directory(parent, within)
    with suppress(FileExistsError):
        os.mkdir(path)
    sync(parent)


def make_empty_file(path: str) -> None:
    """Make an empty file, a no-op where it exists; durable once its directory is flushed."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def names_in(folder: str) -> list[str]:
    """Names in a directory, sorted; none where there is no such directory."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def put_file(target: str, write: Callable[[str], None], scratch: str, *, replace: bool = True) -> None:
    """Make `target` appear whole or not at all, durable when this returns.

    Args:
        target: Path to create.
        write: Writes the content to the path in its argument.
        scratch: Directory on the same file system, for the unfinished file.
        replace: Whether a file under that path is replaced; else `FileExistsError`.
    """
    unfinished = f"{scratch}/{uuid.uuid4().hex}"
    try:
        write(unfinished)
        sync(unfinished)
        if replace:
            os.replace(unfinished, target)
        else:
            os.link(unfinished, target)
        sync(os.path.dirname(target))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def put_text(target: str, text: str, scratch: str, *, replace: bool = True) -> None:
    """`put_file` for a small text."""

    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    put_file(target, write, scratch, replace=replace)


@contextmanager
def file_lock(path: str, *, shared: bool = False, create: bool = True, wait: bool = True) -> Iterator[None]:
    """Hold `flock` on `path` across threads and processes; the kernel releases it when its owner dies.

    Args:
        path: The lock's file.
        shared: Whether other sharers may hold it, too.
        create: Whether the file is made where it is absent; else `FileNotFoundError`.
        wait: Whether to wait for another owner; else `BlockingIOError`.
    """
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            # Explicit: a child that was forked meanwhile shares the open file and would keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def try_file_lock(path: str, *, shared: bool = False) -> Iterator[bool]:
    """Like `file_lock`, but yields False at once where another owner holds the lock."""
    with ExitStack() as held:
        is_free = False
        with suppress(BlockingIOError):
            held.enter_context(file_lock(path, shared=shared, wait=False))
            is_free = True
        yield is_free
