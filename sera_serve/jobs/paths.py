"""Where the files of training jobs lie: below `jobs/` in the directory of a store."""

from __future__ import annotations

from pathlib import Path

from adapters_store import STORE_MARK


class JobPaths:
    """Paths below `jobs/`. Their names are ids that this server made; no text of a client is part of a path."""

    def __init__(self, store: Path) -> None:
        """Name the paths of a store. Makes nothing."""
        self.root = store.absolute() / "jobs"
        self.files = self.root / "files"
        self.runs = self.root / "runs"
        self.lock = self.root / "lock"

    def make(self) -> None:
        """Make the directories, which only the server's own user may read.

        Raises:
            OSError: The store is not there, as where its disk is not mounted, or cannot be written.
        """
        self.root.parent.joinpath(STORE_MARK).stat()
        for folder in (self.root, self.files, self.runs):
            folder.mkdir(mode=0o700, exist_ok=True)

    def file(self, file_id: str) -> Path:
        """The bytes of an uploaded file."""
        return self.files / file_id

    def lock_of(self, base: str) -> Path:
        """The lock of the server that runs the jobs of a base, a `base_id`."""
        return self.root / f"lock-{base}"

    def run(self, job_id: str) -> Path:
        """The directory of a job's process: its orders, progress, checkpoints and result."""
        return self.runs / job_id
