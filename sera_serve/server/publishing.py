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
class Publisher:
    """Publishes and deletes adapters of one app. Its methods block."""

    engine: ServingEngine
    store: AdapterStore
    access: AccessControl
    holdings: Holdings
    audit: AuditLog

    def checked(self, source: AdapterBundle | PeftFiles) -> tuple[AdapterBundle, tuple[str, ...]]:
        """Check what was read, and return its bundle, and what an import had to say.

        Raises:
            InvalidBundle, AdapterTooLarge, AdapterOverflow, ImportMismatch: It is refused.
        """
        if isinstance(source, PeftFiles):
            imported = self.engine.import_checkpoint(source)
            return imported.bundle, imported.warnings
        self.engine.check_bundle(source)
        return source, ()

    def publish(self, bundle: AdapterBundle, name: str, actor: Actor, *, keep_latest: bool = False) -> Published:
        """Publish a bundle that was checked as the next version of `name`, and record that.

        With `keep_latest` (see `AdapterStore.publish`), a publication that changes nothing is not recorded.

        Raises:
            QuotaExceeded: The tenant may not have so much.
            StoreError: It cannot be written.
            AccessDatabaseError: Nobody knows whether shares of an older adapter of this name are left.
        """
        held = self.store.has_content(name, bundle.digest)
        if held is None:
            # A kill may have come between the deletion of an older adapter of this name and the end of its shares.
            self._end_shares(name)
        added = self.holdings.check_publish(name, bundle.digest, bundle.file_bytes)
        published = self.store.publish(bundle, name=name, keep_latest=keep_latest)
        self.holdings.note_published(name, added)
        # A watched directory shows at each start of a server what it has shown before.
        if not (keep_latest and held):
            record_publication(published, self.audit, actor)
        return published

    def remove(self, reference: str, actor: Actor) -> None:
        """Delete an adapter, or one version of it, and record it. Shares end with the last version.

        Raises:
            AdapterNotFound, VersionInUse: As `AdapterStore.delete`.
            AccessDatabaseError: The adapter is deleted, and its shares are not; deleting it again ends them.
        """
        name = reference.partition("@")[0]
        try:
            freed = self.store.delete(reference)
            for digest in freed.digests:
                self.engine.mark_deleted(digest)
            self.holdings.note_deleted(reference)
            self.audit.record("adapter.delete", actor, tenant=reference.partition("/")[0], target=reference)
            # Pins of content that other adapters have too. A store that cannot be read is asked with the next pin.
            with suppress(StoreError):
                self.engine.drop_deleted_pins()
        except AdapterNotFound:
            # A command may have deleted it, and been killed before the end of its shares.
            if reference == name:
                self._end_shares(name)
            raise
        if freed.adapter_gone:
            self._end_shares(name)

    def _end_shares(self, name: str) -> None:
        # Another adapter of its name must begin without shares.
        self.access.shares.remove_all(name)
        self.access.refresh()


def record_publication(version: Published, audit: AuditLog, actor: Actor) -> None:
    """Record that a version was published. Blocks."""
    tenant = version.adapter.partition("/")[0]
    audit.record(
        "adapter.publish", actor, tenant=tenant, target=version.adapter, version=version.version, digest=version.digest
    )


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
