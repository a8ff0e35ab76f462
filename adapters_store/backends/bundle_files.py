"""The bundles of a local store, and who refers to them.

`bundles/<digest>.safetensors` is a single-file bundle. `references/<dd>/<digest>/<tenant>@<name>` is an empty file for
each adapter with a version of that digest (dd: the first two digits). A bundle's last reference is therefore known
without a scan: the directory of its references can be removed only when it is empty.

A reference is durable before the version that needs it, and goes after that version. A kill between leaves a
reference or a bundle too many, never too few; `repair` removes them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager, suppress

from adapters_store.backends.durable import make_empty_file, names_in, put_file, sync, sync_directories
from adapters_store.backends.name_index import entry_name
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.containers import config_of
from adapters_store.format.mmap_buffer import reused_memory
from adapters_store.format.safetensors_file import BundleLimits, read_header
from adapters_store.records import Freed


class BundleFiles:
    """Bundles and references by digest.

    Reading takes no lock. `hold` and `release` take the digest's lock, so that no bundle goes between the look at it
    and the new reference. Their callers hold the adapter's lock, callers of all that write the shared lock of writers.
    """

    def __init__(self, root: str, scratch: str, lock: Callable[[str], AbstractContextManager[None]]) -> None:
        """Set up.

        Args:
            root: The store's directory.
            scratch: A directory on the same file system, for unfinished files.
            lock: Takes the lock of a digest.
        """
        self._bundles = f"{root}/bundles"
        self._references = f"{root}/references"
        self._scratch = scratch
        self._lock = lock

    def path(self, digest: str) -> str:
        """The path of a bundle."""
        return f"{self._bundles}/{digest}.safetensors"

    def put(self, bundle: AdapterBundle, limits: BundleLimits) -> None:
        """Write a bundle durably, if a reader with these limits accepts it."""
        # The lock's file must exist before a full disk would refuse it: `discard` needs it then.
        with self._lock(bundle.digest):
            pass

        def write(path: str) -> None:
            bundle.save_file(path)
            config_of(read_header(path, limits), limits)

        put_file(self.path(bundle.digest), write, self._scratch)

    def size(self, digest: str) -> int | None:
        """The bytes of a bundle's file."""
        try:
            return os.stat(self.path(digest)).st_size
        except FileNotFoundError:
            return None

    def read(self, digest: str, nbytes: int) -> memoryview | None:
        """The first bytes of a bundle's file."""
        # Writable memory, so that tensors can share it and a bundle is held once.
        data, path = reused_memory(nbytes), self.path(digest)
        try:
            with open(path, "rb") as file:
                count = file.readinto(data)
        except FileNotFoundError:
            return None
        except OSError as error:
            # The system does not name the file of a descriptor.
            error.filename = path
            raise
        return data[:count]

    def hold(self, digest: str, adapter: str) -> bool:
        """Record durably that an adapter refers to a bundle; False if the bundle is not there."""
        with self._lock(digest):
            if not os.path.exists(self.path(digest)):
                return False
            folder = self._folder(digest)
            shard = os.path.dirname(folder)
            for made in (shard, folder):
                with suppress(FileExistsError):
                    os.mkdir(made)
            make_empty_file(f"{folder}/{entry_name(adapter)}")
            # Each time all three. A killed writer may have made one of them and not flushed it. And the time that this
            # takes must not tell whether another adapter has made them.
            for held in (folder, shard, self._references):
                sync(held)
            return True

    def discard(self, digest: str) -> None:
        """Remove a bundle that no adapter refers to; a no-op where one does."""
        folder = self._folder(digest)
        with self._lock(digest):
            if names_in(folder):
                return
            with suppress(FileNotFoundError):
                os.unlink(self.path(digest))
            with suppress(FileNotFoundError):
                os.rmdir(folder)

    def release(self, digests: Set[str], adapter: str) -> Freed:
        """Remove an adapter's references, and the bundles that nothing refers to any more.

        No flush follows: what a power cut brings back is garbage and nothing else.
        """
        freed, nbytes = [], 0
        for digest in sorted(digests):
            with self._lock(digest):
                if self._remove_reference(digest, adapter):
                    nbytes += self.size(digest) or 0
                    with suppress(FileNotFoundError):
                        os.unlink(self.path(digest))
                    freed.append(digest)
        return Freed(tuple(freed), nbytes)

    def add_references(self, needed: Mapping[str, Set[str]]) -> None:
        """Make sure that the adapters of each digest are recorded; no other process may write meanwhile."""
        touched = set()
        for digest, adapters in needed.items():
            folder = self._folder(digest)
            held = set(names_in(folder))
            if missing := {entry_name(adapter) for adapter in adapters} - held:
                os.makedirs(folder, exist_ok=True)
                for name in missing:
                    make_empty_file(f"{folder}/{name}")
                touched |= {folder, os.path.dirname(folder), self._references}
        sync_directories(touched)

    def repair(self, needed: Mapping[str, Set[str]]) -> Freed:
        """Make references and bundles exactly those of these adapters by digest; no other process may write meanwhile.

        Returns:
            The bundles that were removed.
        """
        self.add_references(needed)
        for shard in names_in(self._references):
            for digest in names_in(f"{self._references}/{shard}"):
                wanted = {entry_name(adapter) for adapter in needed.get(digest, ())}
                folder = f"{self._references}/{shard}/{digest}"
                for name in set(names_in(folder)) - wanted:
                    os.unlink(f"{folder}/{name}")
                if not wanted:
                    os.rmdir(folder)
        unneeded = [name for name in names_in(self._bundles) if name.split(".")[0] not in needed]
        paths = [f"{self._bundles}/{name}" for name in unneeded]
        nbytes = sum(os.stat(path).st_size for path in paths)
        for path in paths:
            os.unlink(path)
        if paths:
            sync(self._bundles)
        return Freed(tuple(name.split(".")[0] for name in unneeded), nbytes)

    def _remove_reference(self, digest: str, adapter: str) -> bool:
        """Whether this was the last reference. Where none is recorded at all, nobody knows, and the bundle stays."""
        folder = self._folder(digest)
        with suppress(FileNotFoundError):
            os.unlink(f"{folder}/{entry_name(adapter)}")
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return False
            raise
        return True

    def _folder(self, digest: str) -> str:
        return f"{self._references}/{digest[:2]}/{digest}"
