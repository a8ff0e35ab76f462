"""The folder of one training run: named by what decides its result, held by one process, gone when published."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sera_serve.errors import SeraServeError

_LOCK = "lock"


class RunInProgress(SeraServeError):
    """Another process is training the same adapter from the same data."""

    code = "run_in_progress"
    status = 409


def run_digest(identity: Mapping[str, Any]) -> str:
    """A name for a run, 16 hexadecimal digits: equal for equal settings, data and base."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def run_folder(adapter_dir: Path, digest: str, *, resume: bool) -> Iterator[Path]:
    """The run's folder, made and locked; deleted, with parents it leaves empty, when the block ends without an error.

    Args:
        adapter_dir: Folder for the runs of one adapter.
        digest: See `run_digest`.
        resume: Whether to keep what a killed run left there.

    Raises:
        RunInProgress: The folder is in use.
    """
    folder = adapter_dir / digest
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInProgress(
                f"another process is training this adapter in {folder}; wait for it, or give --work-dir"
            ) from error
        if not resume:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        yield folder
        shutil.rmtree(folder)
    for parent in [adapter_dir, *adapter_dir.parents][:3]:
        try:
            parent.rmdir()
        except OSError:
            # Other runs are kept there.
            break
