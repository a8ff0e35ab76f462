"""Publishes an adapter from what was read of it: a bundle, or a PEFT checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, PeftFiles, Published, peft_from_path
from adapters_store.errors import InvalidBundle, MissingFile
from sera_serve.server.deps import Engine


@dataclass(frozen=True)
class PublishedSource:
    """A version that was published.

    Attributes:
        version: The version.
        warnings: What an import had to say.
    """

    version: Published
    warnings: tuple[str, ...]


def publish(source: AdapterBundle | PeftFiles, name: str, engine: Engine, store: AdapterStore) -> PublishedSource:
    """Check what was read, and publish it as the next version of `name`. Blocks.

    Raises:
        InvalidBundle, AdapterTooLarge, AdapterOverflow, ImportMismatch: It is refused; the store is unchanged.
        StoreError: It cannot be written.
    """
    bundle, warnings = checked(source, engine)
    return PublishedSource(store.publish(bundle, name=name), warnings)


def checked(source: AdapterBundle | PeftFiles, engine: Engine) -> tuple[AdapterBundle, tuple[str, ...]]:
    """The bundle of what was read, and an import's warnings; raises as `publish` does."""
    if isinstance(source, PeftFiles):
        imported = engine.import_checkpoint(source)
        return imported.bundle, imported.warnings
    engine.check_bundle(source)
    return source, ()


def read_source(path: str, limits: BundleLimits, within: Path | None = None) -> AdapterBundle | PeftFiles:
    """Read a bundle or a PEFT checkpoint from a path, and tell by its content what it is. Blocks.

    Args:
        path: A directory or a file.
        limits: Caps.
        within: No file outside this directory is read; None reads any file.

    Raises:
        InvalidBundle: It is refused.
    """
    try:
        found = peft_from_path(path, limits, within)
        return AdapterBundle.load(path, limits, within) if found is None else found
    except InvalidBundle:
        raise
    except OSError as error:
        raise MissingFile(f"it cannot be read ({error.strerror}); check the path and its permissions") from error
