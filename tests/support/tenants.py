"""Keys of tenants, and clients that send them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from sera_serve.access import SCOPES, AccessDatabase, CreatedKey, Keys

ALL_BUT_ADMIN = tuple(scope for scope in SCOPES if scope != "admin")


def make_key(store: Path, tenant: str, *scopes: str, lifetime_s: float | None = None) -> CreatedKey:
    """Make a key as the command does; every scope but admin where none is named."""
    database = AccessDatabase(store)
    try:
        return Keys(database).create(tenant, scopes or ALL_BUT_ADMIN, lifetime_s=lifetime_s)
    finally:
        database.close()


def revoke_key(store: Path, identifier: str) -> None:
    """Revoke a key as the command does."""
    database = AccessDatabase(store)
    try:
        Keys(database).revoke(identifier)
    finally:
        database.close()


def bearer(secret: str) -> dict[str, str]:
    """The header of a key."""
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def clients(url: str, secrets: dict[str, str]) -> Iterator[dict[str, httpx.Client]]:
    """A client for each secret, by its name."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(httpx.Client(base_url=url, timeout=30, headers=bearer(secret)))
            for name, secret in secrets.items()
        }
