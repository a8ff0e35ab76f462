"""One adapter's records in a local store: its versions and aliases. `LocalBackend` takes the locks."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from adapters_store.backends.durable import make_directory, names_in, put_text, sync
from adapters_store.backends.interface import Manifest
from adapters_store.backends.record_files import AliasRecord, RetiredRecord, read_record, record_text, version_text
from adapters_store.errors import StoreCorrupted
from adapters_store.names import LATEST, is_part
from adapters_store.records import VersionRecord

# Changes of a directory within one tick of the file system's clock, 10 ms at most, leave the same time.
_TICK_NS = 100_000_000
# A version that was deleted since a backup may have a higher number than the backup's record.
_MEND_RETIRED = (
    'write {"highest_version": N} to it, with N at least the highest version that the adapter ever had (the audit log '
    "has them)"
)
_VERSION_FILE = re.compile(r"v([1-9][0-9]*)\.json")


class AdapterDirectory:
    """The directory `adapters/<tenant>/<name>` of a store.

    Methods that read take no lock: files are replaced atomically, and a file that vanishes is "not found".
    Methods that write need the adapter's lock and the shared lock of writers.
    """

    def __init__(self, root: str, adapter: str) -> None:
        self.adapter = adapter
        self._root = root
        self._folder = f"{root}/adapters/{adapter}"

    def manifest(self) -> Manifest:
        """The adapter's versions and aliases at one moment."""
        while True:
            versions = tuple(self.versions())
            found = self.aliases() if versions else {}
            # A version comes before the aliases that point to it, and goes after them: while none came and none went,
            # each alias had its version.
            if versions == tuple(self.versions()):
                break
        aliases = {alias: version for alias, version in found.items() if isinstance(version, int)}
        damaged = {alias: damage for alias, damage in found.items() if isinstance(damage, StoreCorrupted)}
        if versions and LATEST not in damaged:
            # A kill may have come between the first version and its alias.
            aliases.setdefault(LATEST, versions[-1])
        highest: int | StoreCorrupted
        try:
            highest = self._highest_retired()
        except StoreCorrupted as error:
            highest = error
        revision = f"{versions} {sorted(aliases.items())} {sorted(damaged)} {highest}"
        return Manifest(versions, aliases, highest, revision, damaged)

    def versions(self) -> list[int]:
        """Version numbers, oldest first; empty for an adapter that does not exist."""
        return sorted(int(match[1]) for match in map(_VERSION_FILE.fullmatch, names_in(self._versions)) if match)

    def aliases(self) -> dict[str, int | StoreCorrupted]:
        """Version by alias, as on the disk; the damage of an alias that is damaged."""
        found: dict[str, int | StoreCorrupted] = {}
        names = (file.removesuffix(".json") for file in names_in(self._aliases) if file.endswith(".json"))
        for alias in filter(is_part, names):
            try:
                if (version := self._alias(alias)) is not None:
                    found[alias] = version
            except StoreCorrupted as error:
                found[alias] = error
        return found

    def alias(self, alias: str) -> int | None:
        """The version that one alias points to."""
        version = self._alias(alias)
        if version is None and alias == LATEST:
            return max(self.versions(), default=None)
        return version

    def record(self, version: int) -> VersionRecord | None:
        """The record of one version."""
        path = self._version_file(version)
        try:
            record = read_record(path, VersionRecord)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if record.version != version:
            raise StoreCorrupted(
                f"{path} describes version v{record.version}; restore it from a backup, or delete it to give up what "
                "it names",
                param=path,
            )
        return record

    def digests(self, skip_damaged: bool) -> dict[int, str]:
        """Digest by version; a damaged record is left out, or else raises `StoreCorrupted`."""
        found = {}
        for version in self.versions():
            try:
                record = self.record(version)
            except StoreCorrupted:
                if not skip_damaged:
                    raise
                continue
            if record is not None:
                found[version] = record.digest
        return found

    def add(self, record: VersionRecord) -> None:
        """Claim a version number; `FileExistsError` if it is taken."""
        make_directory(self._versions, self._root)
        make_directory(self._aliases, self._root)
        put_text(self._version_file(record.version), version_text(record), f"{self._root}/tmp", replace=False)

    def remove_if_empty(self) -> None:
        """Remove the directory of an adapter without versions and aliases; a no-op where there is one."""
        for folder in (self._versions, self._aliases, self._folder):
            with suppress(OSError):
                os.rmdir(folder)

    def set_alias(self, alias: str, version: int) -> None:
        """Move an alias, atomically."""
        make_directory(self._aliases, self._root)
        put_text(self._alias_file(alias), record_text(AliasRecord(version=version)), f"{self._root}/tmp")

    def mend_latest(self) -> None:
        """Point `latest` to the newest version, where it points to a version that is not in this copy of the store."""
        # A damaged alias may have named an older version: its owner points it again.
        with suppress(StoreCorrupted):
            versions, latest = self.versions(), self._alias(LATEST)
            if versions and latest is not None and latest not in versions:
                self.set_alias(LATEST, versions[-1])

    def remove_alias(self, alias: str) -> None:
        """Remove an alias."""
        os.unlink(self._alias_file(alias))
        sync(self._aliases)

    def remove_version(self, version: int) -> None:
        """Delete one version that is not the only one; no alias must point to it any more."""
        self._retire(version)
        os.unlink(self._version_file(version))
        sync(self._versions)

    def move_to_trash(self, trash: str) -> None:
        """Take the whole adapter out of sight in one step: its directory moves to `trash`."""
        self._retire(max(self.versions()))
        os.rename(self._folder, trash)
        sync(os.path.dirname(self._folder))

    # Made when they are needed: every request makes two of these objects and reads one file with each.
    @property
    def _versions(self) -> str:
        return f"{self._folder}/versions"

    @property
    def _aliases(self) -> str:
        return f"{self._folder}/aliases"

    @property
    def _retired(self) -> str:
        return f"{self._root}/retired/{self.adapter}.json"

    def _retire(self, version: int) -> None:
        try:
            highest = max(version, self._highest_retired())
        except StoreCorrupted:
            # Nobody knows the highest. While the record stays as it is, no number is given out.
            return
        make_directory(os.path.dirname(self._retired), self._root)
        put_text(self._retired, record_text(RetiredRecord(highest_version=highest)), f"{self._root}/tmp")

    def _highest_retired(self) -> int:
        try:
            return read_record(self._retired, RetiredRecord, _MEND_RETIRED).highest_version
        except FileNotFoundError:
            return 0

    def _alias(self, alias: str) -> int | None:
        also = "" if alias == LATEST else ", or remove it"
        try:
            return read_record(self._alias_file(alias), AliasRecord, f"point alias {alias!r} again{also}").version
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _version_file(self, version: int) -> str:
        return f"{self._versions}/v{version}.json"

    def _alias_file(self, alias: str) -> str:
        return f"{self._aliases}/{alias}.json"


def version_stamps(root: str, tenant: str) -> dict[str, str]:
    """See `Backend.stamps`: the time of the last change of each adapter's directory of versions, and its inode."""
    now = time.time_ns()
    stamps: dict[str, str] = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(f"{root}/adapters/{tenant}") as entries:
        for entry in entries:
            with suppress(FileNotFoundError, NotADirectoryError):
                state = os.stat(f"{entry.path}/versions")
                settled = abs(now - state.st_mtime_ns) > _TICK_NS
                stamps[f"{tenant}/{entry.name}"] = f"{state.st_mtime_ns}.{state.st_ino}" if settled else ""
    return stamps


def retired_adapters(root: str, tenant: str) -> set[str]:
    """See `Backend.retired`; what does not end as a record is none."""
    names = (file.removesuffix(".json") for file in names_in(f"{root}/retired/{tenant}") if file.endswith(".json"))
    return {f"{tenant}/{name}" for name in filter(is_part, names)}
