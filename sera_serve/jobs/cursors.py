"""Where deleted items stood in lists: a client that deletes a page of items names the last of them for the next page.

Files and jobs are listed by their number, and an id does not tell the number. So the numbers of deleted items are kept
for a while.
"""

from __future__ import annotations

import sqlite3
from typing import Literal

# Of one tenant: as many as the largest page has. A client names the last item of its page.
_MAX_KEPT = 10_000


def place_of(
    connection: sqlite3.Connection, table: Literal["files", "jobs"], item_id: str, tenant: str | None
) -> int | None:
    """The number of a file or a job, which may have been deleted; None where the tenant has, and had, none of this id.

    `tenant` None sees those of all tenants.
    """
    for source in (table, "deleted_items"):
        row = connection.execute(f"SELECT number, tenant FROM {source} WHERE id = ?", (item_id,)).fetchone()
        if row is not None and tenant in (None, row[1]):
            return int(row[0])
    return None


def keep_place(connection: sqlite3.Connection, item_id: str, tenant: str, number: int) -> None:
    """Note the number of a file or a job that is deleted in this transaction; the oldest notes are deleted."""
    connection.execute(
        "INSERT OR REPLACE INTO deleted_items (id, tenant, number) VALUES (?, ?, ?)", (item_id, tenant, number)
    )
    connection.execute(
        "DELETE FROM deleted_items WHERE seq IN "
        "(SELECT seq FROM deleted_items WHERE tenant = ? ORDER BY seq DESC LIMIT -1 OFFSET ?)",
        (tenant, _MAX_KEPT),
    )
