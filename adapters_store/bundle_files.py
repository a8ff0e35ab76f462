"""The content-addressed files of a store: `bundles/<digest>.safetensors`, each a single-file bundle."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from adapters_store.bundle import AdapterBundle
from adapters_store.config import AdapterConfig
from adapters_store.containers import config_of
from adapters_store.durable import put_file, sync_directory
from adapters_store.errors import AdapterNotFound, InvalidBundle, StoreCorrupted
from adapters_store.names import check_digest
from adapters_store.records import Collected
from adapters_store.safetensors_file import BundleLimits, read_header


class BundleFiles:
    """Bundles by digest. Reading takes no lock; callers of `put` and `keep_only` hold the store's locks."""

    def __init__(self, folder: Path, scratch: Path, limits: BundleLimits) -> None:
        self._folder = folder
        self._scratch = scratch
        self._limits = limits

    def put(self, bundle: AdapterBundle) -> None:
        """Write a bundle durably; one that is there already is checked, and rewritten if it is damaged.

        Raises:
            InvalidBundle: It exceeds the limits that reading it would apply.
        """
        try:
            self.load(bundle.digest)
        except (AdapterNotFound, StoreCorrupted):
            put_file(self._path(bundle.digest), lambda path: self._write(bundle, path), self._scratch)

    def load(self, digest: str) -> AdapterBundle:
        """Read a bundle; see `AdapterStore.load`."""
        path = self._path(digest)
        with self._damage_typed(path):
            # Opening a missing path is an invalid bundle to the reader; here it is a deleted one.
            path.stat()
            bundle = AdapterBundle.load(path, self._limits)
        if bundle.digest != digest:
            raise StoreCorrupted(
                f"{path} is damaged (its digest is {bundle.digest}); publish it again",
                param=str(path),
            )
        return bundle

    def config(self, digest: str) -> AdapterConfig:
        """Read a bundle's configuration only; see `AdapterStore.config`."""
        path = self._path(digest)
        with self._damage_typed(path):
            return AdapterConfig.from_json(config_of(read_header(path, self._limits), self._limits))

    def keep_only(self, digests: Set[str]) -> Collected:
        """Remove every other file."""
        doomed = [path for path in sorted(self._folder.iterdir()) if path.name.split(".")[0] not in digests]
        nbytes = sum(path.stat().st_size for path in doomed)
        for path in doomed:
            path.unlink()
        if doomed:
            sync_directory(self._folder)
        return Collected(tuple(path.name.split(".")[0] for path in doomed), nbytes)

    def _write(self, bundle: AdapterBundle, path: Path) -> None:
        bundle.save_file(path)
        config_of(read_header(path, self._limits), self._limits)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{check_digest(digest)}.safetensors"

    @contextmanager
    def _damage_typed(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, InvalidBundle) as error:
            if not path.exists():
                raise AdapterNotFound(
                    f"bundle {path.stem} is not in the store; publish it again", param="digest"
                ) from error
            raise StoreCorrupted(f"{path} is damaged ({error}); publish it again", param=str(path)) from error
