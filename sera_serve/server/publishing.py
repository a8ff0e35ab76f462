"""Publishes an adapter from what was read of it, a bundle or a PEFT checkpoint, and deletes adapters."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, PeftFiles, Published, peft_from_path
from adapters_store.errors import AdapterNotFound, InvalidBundle, MissingFile, StoreError
from sera_serve.access import AccessControl, Actor, AuditLog, Holdings
from sera_serve.engine import ServingEngine


@dataclass(frozen=True)
class PublishedSource:
    """A version that was published.

    Attributes:
        version: The version.
        warnings: What an import had to say.
    """

    version: Published
    warnings: tuple[str, ...]


def publish(
    source: AdapterBundle | PeftFiles,
    name: str,
    engine: ServingEngine,
    store: AdapterStore,
    access: AccessControl,
    holdings: Holdings,
) -> PublishedSource:
    """Check what was read, and publish it as the next version of `name`. Blocks.

    Raises:
        InvalidBundle, AdapterTooLarge, AdapterOverflow, ImportMismatch: It is refused; the store is unchanged.
        QuotaExceeded: The tenant may not have so much.
        StoreError: It cannot be written.
        AccessDatabaseError: Nobody knows whether shares of an older adapter of this name are left.
    """
    bundle, warnings = checked(source, engine)
    return PublishedSource(publish_within(bundle, name, store, access, holdings), warnings)


def publish_within(
    bundle: AdapterBundle, name: str, store: AdapterStore, access: AccessControl, holdings: Holdings
) -> Published:
    """Publish a bundle within the quotas of its tenant; raises as `publish` does. Blocks."""
    if store.has_content(name, bundle.digest) is None:
        # A kill may have come between the deletion of an older adapter of this name and the end of its shares.
        _end_shares(name, access)
    added = holdings.check_publish(name, bundle.digest, bundle.file_bytes)
    published = store.publish(bundle, name=name)
    holdings.note_published(name, added)
    return published


def checked(source: AdapterBundle | PeftFiles, engine: ServingEngine) -> tuple[AdapterBundle, tuple[str, ...]]:
    """The bundle of what was read, and an import's warnings; raises as `publish` does."""
    if isinstance(source, PeftFiles):
        imported = engine.import_checkpoint(source)
        return imported.bundle, imported.warnings
    engine.check_bundle(source)
    return source, ()


def remove(
    reference: str,
    engine: ServingEngine,
    store: AdapterStore,
    access: AccessControl,
    holdings: Holdings,
    audit: AuditLog,
    actor: Actor,
) -> None:
    """Delete an adapter, or one version of it, and record it. Shares end with the last version. Blocks.

    Raises:
        AdapterNotFound, VersionInUse: As `AdapterStore.delete`.
        AccessDatabaseError: The adapter is deleted, and its shares are not; deleting it again ends them.
    """
    name = reference.partition("@")[0]
    try:
        freed = store.delete(reference)
        for digest in freed.digests:
            engine.mark_deleted(digest)
        holdings.note_deleted(reference)
        audit.record("adapter.delete", actor, tenant=reference.partition("/")[0], target=reference)
        # Pins of content that other adapters have too. A store that cannot be read is asked again with the next pin.
        with suppress(StoreError):
            engine.drop_deleted_pins()
    except AdapterNotFound:
        # A command may have deleted it, and been killed before the end of its shares.
        if reference == name:
            _end_shares(name, access)
        raise
    if freed.adapter_gone:
        _end_shares(name, access)


def record_publication(version: Published, audit: AuditLog, actor: Actor) -> None:
    """Record that a version was published. Blocks."""
    tenant = version.adapter.partition("/")[0]
    audit.record(
        "adapter.publish", actor, tenant=tenant, target=version.adapter, version=version.version, digest=version.digest
    )


def _end_shares(name: str, access: AccessControl) -> None:
    # Another adapter of its name must begin without shares.
    access.shares.remove_all(name)
    access.refresh()


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
