"""One adapter's records on disk: its versions and aliases. Locks are the store's business."""

from __future__ import annotations

import os
import re

from adapters_store.durable import make_directory, names_in, put_text, sync_directory
from adapters_store.errors import AdapterNotFound, AmbiguousDigest, StoreCorrupted
from adapters_store.names import LATEST, AdapterRef
from adapters_store.records import AliasRecord, RetiredRecord, VersionRecord, read_record, record_text

_VERSION_FILE = re.compile(r"v([1-9][0-9]*)\.json")
_RACES = 3


class AdapterShelf:
    """The directory `adapters/<tenant>/<name>` of a store.

    Methods that read take no lock: files are replaced atomically, and one that vanishes is "not found".
    Methods that write need the adapter's lock and the store's shared writers' lock.
    """

    def __init__(self, root: str, tenant: str, name: str) -> None:
        self.adapter = f"{tenant}/{name}"
        self._tenant_folder = f"{root}/adapters/{tenant}"
        self._folder = f"{self._tenant_folder}/{name}"
        self._versions = f"{self._folder}/versions"
        self._aliases = f"{self._folder}/aliases"
        self._retired_folder = f"{root}/retired/{tenant}"
        self._retired = f"{self._retired_folder}/{name}.json"
        self._scratch = f"{root}/tmp"

    def versions(self) -> list[int]:
        """Version numbers, oldest first; empty for an adapter that does not exist."""
        return sorted(int(match[1]) for match in map(_VERSION_FILE.fullmatch, names_in(self._versions)) if match)

    def aliases(self) -> dict[str, int]:
        """Version by alias; `latest` is there even where a kill came between a version and its alias."""
        found = {}
        for file in names_in(self._aliases):
            if (version := self._alias(file.removesuffix(".json"))) is not None:
                found[file.removesuffix(".json")] = version
        if LATEST not in found and (versions := self.versions()):
            found[LATEST] = versions[-1]
        return found

    def record(self, version: int) -> VersionRecord:
        """The record of one version, or `AdapterNotFound`."""
        path = self._version_file(version)
        try:
            record = read_record(path, VersionRecord)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._not_found(f"version v{version}") from error
        if record.version != version:
            raise StoreCorrupted(f"{path} describes version v{record.version}", param=path)
        return record

    def find(self, ref: AdapterRef) -> VersionRecord:
        """The version that a reference names.

        Raises:
            AdapterNotFound: No such adapter, version, alias or digest.
            AmbiguousDigest: The prefix fits two versions.
        """
        if ref.by_digest:
            return self._by_digest(str(ref.selector))
        if isinstance(ref.selector, int):
            return self.record(ref.selector)
        for _ in range(_RACES):
            version = self._alias(ref.selector)
            if version is None and ref.selector == LATEST:
                version = max(self.versions(), default=None)
            if version is None:
                break
            try:
                return self.record(version)
            except AdapterNotFound:
                # The version was deleted after the alias was read: where does the alias point now?
                continue
        raise self._not_found(f"alias {ref.selector!r}" if ref.selector != LATEST else None)

    def with_digest(self, digest: str) -> VersionRecord | None:
        """The version with exactly this content, if there is one."""
        return next((record for record in self.records() if record.digest == digest), None)

    def next_version(self) -> int:
        """A number that no version of this adapter has or ever had."""
        return max([*self.versions(), self._highest_retired()], default=0) + 1

    def add(self, record: VersionRecord) -> None:
        """Claim a version number; `FileExistsError` if it is taken."""
        make_directory(self._versions)
        make_directory(self._aliases)
        put_text(self._version_file(record.version), record_text(record), self._scratch, replace=False)

    def point(self, alias: str, version: int) -> None:
        """Move an alias, atomically."""
        make_directory(self._aliases)
        put_text(self._alias_file(alias), record_text(AliasRecord(version=version)), self._scratch)

    def unpoint(self, alias: str) -> None:
        """Remove an alias, or `AdapterNotFound`."""
        try:
            os.unlink(self._alias_file(alias))
        except FileNotFoundError as error:
            raise self._not_found(f"alias {alias!r}") from error
        sync_directory(self._aliases)

    def remove_version(self, version: int) -> None:
        """Delete one version that is not the only one; `latest` must not point to it any more."""
        self._retire(version)
        os.unlink(self._version_file(version))
        sync_directory(self._versions)

    def remove(self, grave: str) -> None:
        """Take the whole adapter out of sight in one step, by moving its directory to `grave`."""
        self._retire(max(self.versions()))
        os.rename(self._folder, grave)
        sync_directory(self._tenant_folder)

    def _retire(self, version: int) -> None:
        highest = max(version, self._highest_retired())
        make_directory(self._retired_folder)
        put_text(self._retired, record_text(RetiredRecord(highest_version=highest)), self._scratch)

    def _highest_retired(self) -> int:
        try:
            return read_record(self._retired, RetiredRecord).highest_version
        except FileNotFoundError:
            return 0

    def _by_digest(self, prefix: str) -> VersionRecord:
        found = [record for record in self.records() if record.digest.startswith(prefix)]
        if len(found) > 1:
            raise AmbiguousDigest(
                f"digest prefix {prefix} fits {len(found)} versions of {self.adapter}; give more digits",
                param="adapter",
            )
        if not found:
            raise self._not_found(f"version with digest {prefix}")
        return found[0]

    def records(self) -> list[VersionRecord]:
        """The records of all versions, oldest first."""
        records = []
        for version in self.versions():
            try:
                records.append(self.record(version))
            except AdapterNotFound:
                continue
        return records

    def _alias(self, alias: str) -> int | None:
        try:
            return read_record(self._alias_file(alias), AliasRecord).version
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _version_file(self, version: int) -> str:
        return f"{self._versions}/v{version}.json"

    def _alias_file(self, alias: str) -> str:
        return f"{self._aliases}/{alias}.json"

    def _not_found(self, what: str | None) -> AdapterNotFound:
        versions = self.versions()
        if not versions:
            return AdapterNotFound(
                f"adapter {self.adapter!r} is not in the store; list what is there, or publish it",
                param="adapter",
            )
        known = ", ".join(f"v{version}" for version in versions[-5:])
        return AdapterNotFound(f"adapter {self.adapter!r} has no {what}; its newest are {known}", param="adapter")
