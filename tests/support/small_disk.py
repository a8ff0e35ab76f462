"""Disks that are full: real file systems of a few MiB where this user may mount them, and a fault-injected twin."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[Path]:
    """Mount something on `path`, which is made; skips the test where this user may not mount.

    Args:
        path: The mount point.
        options: Arguments of `mount` before the mount point.
    """
    path.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a real file system cannot be mounted here ({made.stderr.strip()}); the injected faults still run")
    try:
        yield path
    finally:
        # Lazily: a failed test may hold a file open.
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def small_disk(path: Path, mib: int = 4, files: int = 400) -> Any:
    """A file system of `mib` MiB and `files` files, mounted on `path`, as a context."""
    return mounted(path, "-t", "tmpfs", "-o", f"size={mib}m,nr_inodes={files}", "tmpfs")


def fill_bytes(disk: Path) -> None:
    """Take all space of a disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2


def fill_files(disk: Path) -> None:
    """Take all files of a disk; its bytes stay free."""
    folder = disk / "files"
    folder.mkdir()
    for index in range(10**6):
        try:
            (folder / str(index)).touch()
        except OSError:
            return


class FullDisk:
    """No more file can be made, except for each one that is removed. Every call that makes one is refused by ENOSPC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        self.refused = 0
        real_open, real_os_open = builtins.open, os.open

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" in mode and isinstance(path, str):
                self._take(path)
            return real_open(path, mode, *args, **kwargs)

        def os_opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self._take(path)
            return real_os_open(path, flags, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(os, "open", os_opened)
        monkeypatch.setattr(os, "mkdir", self._taking(os.mkdir))
        for name in ("unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._giving(getattr(os, name)))

    def _take(self, path: Any) -> None:
        if Path(path).exists():
            return
        if not self.free:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self.free -= 1

    def _taking(self, call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
            self._take(path)
            call(path, *args, **kwargs)

        return wrapped

    def _giving(self, call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
            call(path, *args, **kwargs)
            self.free += 1

        return wrapped
