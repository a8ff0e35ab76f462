"""Who a request acts for."""

from __future__ import annotations

from dataclasses import dataclass

# The tenant of requests without an adapter; no adapter's tenant can begin with "_".
BASE_TENANT = "_base"


@dataclass(frozen=True)
class Principal:
    """Who a request acts for. The HTTP layer decides it, and the engine only reads it.

    Attributes:
        tenant: Who is charged, limited and counted.
        key_id: The key that the request was sent with, or None where the server asks for no key.
        scopes: What the request may do.
    """

    tenant: str
    key_id: str | None = None
    scopes: frozenset[str] = frozenset({"infer", "publish", "train"})


BASE_PRINCIPAL = Principal(BASE_TENANT)
"""Of a request to the base model on a server that asks for no key."""
