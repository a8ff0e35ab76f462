"""Authentication: decides the `Principal` of a request before the engine sees the request."""

# This file is short because the server has no keys yet. Keys and scopes will be checked here, and nowhere else.

from __future__ import annotations

from adapters_store import parse_ref
from sera_serve.engine import BASE_PRINCIPAL, Principal


def principal_of(adapter: str | None) -> Principal:
    """Return the principal of a request that names `adapter`.

    The server asks for no key. The tenant of the adapter reference is therefore the tenant of the request, and
    requests to the base model share `BASE_PRINCIPAL`. The engine reads the principal alone and parses no names.

    Args:
        adapter: The adapter reference of the request, or None for the base model.

    Raises:
        InvalidAdapterName: The reference cannot be parsed.
    """
    if adapter is None:
        return BASE_PRINCIPAL
    tenant, _ = parse_ref(adapter).parts
    return Principal(tenant)
