"""Shares: which adapters a tenant lets other tenants use."""

from __future__ import annotations

import time

from adapters_store import check_part, parse_adapter
from sera_serve.access.database import AccessDatabase
from sera_serve.access.quotas import QuotaExceeded
from sera_serve.errors import InvalidRequest

EVERYONE = "*"
"""In place of a tenant: every tenant."""
# Every server holds all shares in memory, and reads them again when one changes.
MAX_SHARES = 1000
MAX_SHARES_OF_TENANT = 10_000


class Shares:
    """The shares in a database. A share is of an adapter with all of its versions.

    Every method blocks, and raises AccessDatabaseError.
    """

    def __init__(self, database: AccessDatabase) -> None:
        """Use a database."""
        self._database = database

    def add(self, adapter: str, tenant: str) -> None:
        """Let a tenant, or `EVERYONE`, use an adapter. Idempotent. The caller checks that the adapter exists.

        Raises:
            InvalidAdapterName: `adapter` or `tenant` is not of its form.
            InvalidRequest: `tenant` is the adapter's own.
            QuotaExceeded: The adapter, or its tenant, has as many shares as may be.
        """
        owner, _ = parse_adapter(adapter)
        if tenant != EVERYONE:
            check_part(tenant, "with")
        if tenant == owner:
            raise InvalidRequest(f"{adapter} is {tenant}'s own; name another tenant, or *", param="with")
        with self._database.writing() as connection:
            done = connection.execute("INSERT OR IGNORE INTO shares VALUES (?, ?, ?)", (adapter, tenant, time.time()))
            if not done.rowcount:
                return
            for what, most, first, end in (
                (adapter, MAX_SHARES, adapter, adapter + "\0"),
                # The character after the slash.
                (owner, MAX_SHARES_OF_TENANT, owner + "/", owner + "0"),
            ):
                query = "SELECT count(*) FROM shares WHERE adapter >= ? AND adapter < ?"
                (count,) = connection.execute(query, (first, end)).fetchone()
                if count > most:
                    # The block takes the new one back.
                    raise QuotaExceeded(
                        f"{what} has {most} shares, the most that may be; end some: one with {EVERYONE!r} is for all",
                        param="with",
                    )

    def remove(self, adapter: str, tenant: str) -> bool:
        """End a share. Returns whether there was one."""
        # The bytes of a command line need not be text, and the database takes text alone. Tenants are ASCII.
        if not tenant.isascii():
            return False
        with self._database.writing() as connection:
            done = connection.execute("DELETE FROM shares WHERE adapter = ? AND tenant = ?", (adapter, tenant))
            return done.rowcount > 0

    def remove_all(self, adapter: str) -> None:
        """End all shares of an adapter that was deleted: another one of its name begins without any."""
        if self.of(adapter):
            with self._database.writing() as connection:
                connection.execute("DELETE FROM shares WHERE adapter = ?", (adapter,))

    def of(self, adapter: str) -> list[str]:
        """The tenants that may use an adapter, sorted; `EVERYONE` first."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT tenant FROM shares WHERE adapter = ? ORDER BY tenant", (adapter,))
            return [str(tenant) for (tenant,) in rows]

    def all(self) -> dict[str, frozenset[str]]:
        """The tenants by adapter."""
        found: dict[str, set[str]] = {}
        with self._database.reading() as connection:
            for adapter, tenant in connection.execute("SELECT adapter, tenant FROM shares"):
                found.setdefault(str(adapter), set()).add(str(tenant))
        return {adapter: frozenset(tenants) for adapter, tenants in found.items()}
