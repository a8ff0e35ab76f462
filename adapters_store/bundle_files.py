"""The content-addressed files of a store: `bundles/<digest>.safetensors`, each a single-file bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager

from adapters_store.bundle import AdapterBundle
from adapters_store.config import AdapterConfig
from adapters_store.containers import config_of
from adapters_store.durable import names_in, put_file, sync_directory
from adapters_store.errors import AdapterNotFound, InvalidBundle, StoreCorrupted
from adapters_store.names import check_digest
from adapters_store.records import Collected
from adapters_store.safetensors_file import BundleLimits, read_header


class BundleFiles:
    """Bundles by digest. Reading takes no lock; callers of `put` and `keep_only` hold the store's locks."""

    def __init__(self, folder: str, scratch: str, limits: BundleLimits) -> None:
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
            os.stat(path)
            bundle = AdapterBundle.load(path, self._limits)
        if bundle.digest != digest:
            raise StoreCorrupted(
                f"{path} is damaged (its digest is {bundle.digest}); publish it again",
                param=path,
            )
        return bundle

    def config(self, digest: str) -> AdapterConfig:
        """Read a bundle's configuration only; see `AdapterStore.config`."""
        path = self._path(digest)
        with self._damage_typed(path):
            return AdapterConfig.from_json(config_of(read_header(path, self._limits), self._limits))

    def keep_only(self, digests: Set[str]) -> Collected:
        """Remove every other file."""
        doomed = [name for name in names_in(self._folder) if name.split(".")[0] not in digests]
        paths = [f"{self._folder}/{name}" for name in doomed]
        nbytes = sum(os.stat(path).st_size for path in paths)
        for path in paths:
            os.unlink(path)
        if paths:
            sync_directory(self._folder)
        return Collected(tuple(name.split(".")[0] for name in doomed), nbytes)

    def _write(self, bundle: AdapterBundle, path: str) -> None:
        bundle.save_file(path)
        config_of(read_header(path, self._limits), self._limits)

    def _path(self, digest: str) -> str:
        return f"{self._folder}/{check_digest(digest)}.safetensors"

    @contextmanager
    def _damage_typed(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, InvalidBundle) as error:
            if not os.path.exists(path):
                digest = os.path.basename(path).removesuffix(".safetensors")
                raise AdapterNotFound(
                    f"bundle {digest} is not in the store; publish it again", param="digest"
                ) from error
            raise StoreCorrupted(f"{path} is damaged ({error}); publish it again", param=path) from error
