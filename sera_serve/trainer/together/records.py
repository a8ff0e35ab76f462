"""Which jobs of a plan are published already, so that a plan that was killed does not train them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from adapters_store import AdapterStore, BaseInfo, StoreError
from adapters_store.backends.durable import put_text
from sera_serve.trainer.checkpoint import run_digest
from sera_serve.trainer.settings import FILES, TrainSettings


class PublishedJobs:
    """A folder with one small file for each published job, named by the settings, data and base of the job."""

    def __init__(
        self, folder: Path, store: AdapterStore, base: BaseInfo, *, resume: bool, owns_parent: bool = True
    ) -> None:
        """Use the folder; without `resume`, forget what it holds. A parent that the user has named is not owned."""
        self._folder = folder
        self._owns_parent = owns_parent
        self._store = store
        self._base = base.model_dump()
        # Found out once for each job: a file that changes while its job trains was not what the job read.
        self._paths: dict[str, Path] = {}
        if not resume:
            self.clear()

    def load(self, settings: TrainSettings) -> dict[str, Any] | None:
        """Return the result of a job that was published and not deleted since, or None."""
        try:
            value = json.loads(self._path(settings).read_text())
            is_there = self._store.has_content(settings.name, value["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return value if is_there else None

    def save(self, settings: TrainSettings, result: dict[str, Any]) -> None:
        """Write the result of a job. It is durable when this returns."""
        path = self._path(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        put_text(str(path), json.dumps(result), str(path.parent))

    def clear(self) -> None:
        """Forget all jobs, and delete the folder, and its parent where that is owned and empty."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._owns_parent:
            # Checkpoints of other runs may be there.
            with contextlib.suppress(OSError):
                self._folder.parent.rmdir()

    def _path(self, settings: TrainSettings) -> Path:
        if settings.name not in self._paths:
            files = {name: contents_digest(path) for name in FILES if (path := getattr(settings, name)) is not None}
            identity: dict[str, Any] = {"settings": settings.identity(), "files": files, "base": self._base}
            if settings.init_from is not None:
                identity["init_from"] = self._digest(settings.init_from)
            self._paths[settings.name] = self._folder / f"{run_digest(identity)}.json"
        return self._paths[settings.name]

    def _digest(self, reference: str) -> str:
        try:
            return self._store.resolve(reference).digest
        except StoreError:
            # The run itself refuses the reference.
            return reference


def contents_digest(path: Path) -> str:
    """Compute the sha256 of a file, or of all files of a folder with their names; of another path, return its text."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest() if files else str(path)
