"""The bundles of a store by their digests: reading them, and telling damage from absence."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from adapters_store.backends.interface import Backend
from adapters_store.errors import AdapterNotFound, BundleTooLarge, InvalidBundle, StoreCorrupted
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import AdapterConfig
from adapters_store.format.containers import config_of
from adapters_store.format.safetensors_file import BundleLimits, header_of
from adapters_store.names import check_digest
from adapters_store.records import AdapterFacts, VersionRecord

# The header of most bundles, configuration included, is shorter.
_HEADER_BYTES = 64 << 10
# Bytes, about, of facts that are read from bundles because their version's record has none.
_FACTS_BYTES = 16 << 20


class StoredBundles:
    """What `AdapterStore` does by digest alone."""

    def __init__(self, backend: Backend, limits: BundleLimits) -> None:
        """Read from a backend, within limits."""
        self._backend = backend
        self._limits = limits
        self._facts = FactsCache(_FACTS_BYTES)

    def load(self, digest: str) -> AdapterBundle:
        """Read the bundle of a digest; every check of an upload is made again, and the digest taken anew.

        Raises:
            AdapterNotFound: It was deleted.
            StoreCorrupted: The file is not what was published.
        """
        with self.loading(digest) as bundle:
            pass
        return bundle

    @contextmanager
    def loading(self, digest: str) -> Iterator[AdapterBundle]:
        """`load` whose digest is checked at the end of the block; meanwhile it is computed beside the block.

        What the block has made of the bundle is worth nothing if the end of the block raises StoreCorrupted.
        """
        with self._damage_typed(digest):
            data = self._read(digest, self._size(digest))
            bundle = AdapterBundle.from_bytes(data, self._limits, kept_tables=True)
        try:
            yield bundle
        except Exception:
            # The damage may have caused it.
            self._check_digest(bundle, digest)
            raise
        self._check_digest(bundle, digest)

    def config(self, digest: str) -> AdapterConfig:
        """The configuration of a bundle, without reading its tensors; raises as `load` does."""
        with self._damage_typed(digest):
            size = self._size(digest)
            head = self._read(digest, min(size, _HEADER_BYTES))
            header = header_of(
                lambda nbytes: bytes(head[:nbytes] if nbytes <= len(head) else self._read(digest, nbytes)),
                size,
                self._limits,
            )
            return AdapterConfig.from_json(config_of(header, self._limits))

    def file_bytes(self, digest: str) -> int:
        """The bytes of a bundle's file; raises as `load` does."""
        with self._damage_typed(digest):
            return self._size(digest)

    def has(self, digest: str) -> bool:
        """Whether a bundle is in the store."""
        return self._backend.bundle_bytes(check_digest(digest)) is not None

    def _is_stored(self, digest: str) -> bool:
        """Whether the bundle of a digest is there, and is not damaged."""
        try:
            self.load(digest)
        except (AdapterNotFound, StoreCorrupted):
            return False
        return True

    def _facts_of(self, record: VersionRecord) -> AdapterFacts:
        if record.facts is not None:
            return record.facts
        # A digest's content never changes.
        facts = self._facts.get(record.digest)
        if facts is None:
            facts = AdapterFacts.of(self.config(record.digest))
            self._facts.put(record.digest, facts)
        return facts

    def _size(self, digest: str) -> int:
        size = self._backend.bundle_bytes(check_digest(digest))
        if size is None:
            raise self._no_bundle(digest)
        if size > self._limits.max_bytes:
            raise BundleTooLarge(f"it has {size} bytes; the limit is {self._limits.max_bytes}", param="bundle")
        return size

    def _read(self, digest: str, nbytes: int) -> memoryview:
        data = self._backend.read_bundle(digest, nbytes)
        if data is None:
            raise self._no_bundle(digest)
        return data

    @contextmanager
    def _damage_typed(self, digest: str) -> Iterator[None]:
        try:
            yield
        except InvalidBundle as error:
            place = self._backend.bundle_location(digest)
            raise StoreCorrupted(f"{place} is damaged ({error}); publish it again", param=place) from error

    def _check_digest(self, bundle: AdapterBundle, digest: str) -> None:
        if bundle.digest != digest:
            place = self._backend.bundle_location(digest)
            raise StoreCorrupted(f"{place} is damaged (its digest is {bundle.digest}); publish it again", param=place)

    def _no_bundle(self, digest: str) -> AdapterNotFound:
        return AdapterNotFound(f"bundle {digest} is not in the store; publish it again", param="digest")


class FactsCache:
    """Facts by digest, least recently used first out, bounded by their size in memory: labels may be long."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._facts: OrderedDict[str, AdapterFacts] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> AdapterFacts | None:
        """The facts of a digest, or None."""
        with self._lock:
            if (facts := self._facts.get(digest)) is not None:
                self._facts.move_to_end(digest)
            return facts

    def put(self, digest: str, facts: AdapterFacts) -> None:
        """Keep facts, and drop those used least recently where there are too many."""
        with self._lock:
            if digest in self._facts:
                return
            self._facts[digest] = facts
            self._bytes += _bytes_of(facts)
            while self._bytes > self._max_bytes:
                _, dropped = self._facts.popitem(last=False)
                self._bytes -= _bytes_of(dropped)


def _bytes_of(facts: AdapterFacts) -> int:
    # Four bytes a character at most, some 60 for a string, some 2,000 for the models around them.
    return 2000 + sum(60 + 4 * len(label) for label in facts.labels or ())
