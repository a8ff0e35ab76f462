"""Files that survive a kill and a power cut, and locks that die with their owner."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk: without it a rename may not survive a power cut."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents durably; a no-op where it exists."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
    sync_directory(path.parent)


def put_file(target: Path, write: Callable[[Path], None], scratch: Path, *, replace: bool = True) -> None:
    """Make `target` appear whole or not at all, durable when this returns.

    Args:
        target: Path to create.
        write: Writes the content to the path that it is given.
        scratch: Directory on the same file system, for the unfinished file.
        replace: Whether a file already there is replaced; else `FileExistsError`.
    """
    unfinished = scratch / uuid.uuid4().hex
    try:
        write(unfinished)
        sync_file(unfinished)
        if replace:
            unfinished.replace(target)
        else:
            target.hardlink_to(unfinished)
        sync_directory(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def put_text(target: Path, text: str, scratch: Path, *, replace: bool = True) -> None:
    """`put_file` for a small text."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    put_file(target, write, scratch, replace=replace)


@contextmanager
def file_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `flock` on `path` across threads and processes; the kernel releases it when its owner dies."""
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Explicit, because a child forked meanwhile shares the open file and would keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Like an exclusive `file_lock`, but yields False at once where another holds it."""
    with _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
