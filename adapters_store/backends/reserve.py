"""Space that a store keeps for deletions: a full store could otherwise not record what it deletes."""

from __future__ import annotations

import os

from adapters_store.backends.durable import make_directory, sync

# A deletion makes at most seven files and directories of a block each: a record and its directory, an alias, its
# unfinished file, three locks. Directories that hold them may grow by a block.
_FILES = 8
_FILE_BYTES = 16 << 10


class Reserve:
    """The files of `reserve/`. Their content means nothing; it is random so that no file system compresses it away."""

    def __init__(self, root: str) -> None:
        """Set up; nothing is written.

        Args:
            root: The store's directory.
        """
        self._root = root
        self._folder = f"{root}/reserve"

    def fill(self) -> None:
        """Make the files that are missing; `OSError` where there is no space for them."""
        make_directory(self._folder, self._root)
        for path in self._paths():
            if os.path.exists(path) and os.stat(path).st_size == _FILE_BYTES:
                continue
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, os.urandom(_FILE_BYTES))
            finally:
                os.close(descriptor)

    def spend(self) -> None:
        """Give the space back to the file system."""
        for path in self._paths():
            if os.path.exists(path):
                os.unlink(path)
        # Some file systems free the space of a file only when its removal is on the disk.
        if os.path.isdir(self._folder):
            sync(self._folder)

    def _paths(self) -> list[str]:
        return [f"{self._folder}/{index}" for index in range(_FILES)]
