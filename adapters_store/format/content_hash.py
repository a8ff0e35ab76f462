"""SHA-256 of a bundle's bytes, computed beside what else is done with them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

# Bytes from which it takes less time to start a thread than to wait: 1 MiB takes 0.6 ms. A hash of many bytes does not
# hold the interpreter's lock.
_FROM = 1 << 20


def content_hash(manifest: str, data: Sequence[memoryview]) -> str:
    """SHA-256, in hexadecimal, of the manifest's length (8 bytes, little-endian), the manifest and the data."""
    encoded = manifest.encode()
    digest = hashlib.sha256(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def hash_meanwhile(manifest: str, data: Sequence[memoryview]) -> Callable[[], str]:
    """Begin to compute `content_hash`; the result waits for it. The data must not change until then."""
    if sum(part.nbytes for part in data) < _FROM:
        return lambda: content_hash(manifest, data)
    found: list[str] = []
    # A daemon, because nobody waits for it where the bundle is refused.
    thread = threading.Thread(
        target=lambda: found.append(content_hash(manifest, data)), name="bundle-hash", daemon=True
    )
    thread.start()

    def wait() -> str:
        thread.join()
        return found[0]

    return wait
