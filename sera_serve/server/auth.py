"""Authentication: decides the `Principal` of a request before the engine sees the request."""

# This file is short because the server has no keys yet. Keys and scopes will be checked here, and nowhere else.

from __future__ import annotations

from collections.abc import Sequence

from adapters_store import parse_ref
from adapters_store.errors import InvalidAdapterName
from sera_serve.engine import BASE_PRINCIPAL, AdapterChoice, Principal
from sera_serve.errors import InvalidRequest


def principal_of(adapter: AdapterChoice | None) -> Principal:
    """Return the principal of a request that names `adapter`.

    The server asks for no key. The tenant of the adapter reference is therefore the tenant of the request, and
    requests to the base model share `BASE_PRINCIPAL`. The engine reads the principal alone and parses no names.

    Args:
        adapter: The adapter reference of the request, or its weighted parts, or None for the base model.

    Raises:
        InvalidAdapterName: A reference cannot be parsed.
        InvalidRequest: The parts are of several tenants.
    """
    if adapter is None:
        return BASE_PRINCIPAL
    if not isinstance(adapter, str):
        return principal_of_all([part.adapter for part in adapter], "adapter", ".adapter")
    tenant, _ = parse_ref(adapter).parts
    return Principal(tenant)


def principal_of_all(adapters: Sequence[str], field: str, member: str = "") -> Principal:
    """Return the principal of a request that names several adapters, which must be of one tenant.

    Args:
        adapters: The references, at least one.
        field: What the request calls the list.
        member: What follows an element of the list to its reference, such as ".adapter".

    Raises:
        InvalidAdapterName: A reference cannot be parsed; `param` names it.
        InvalidRequest: The adapters are of several tenants; `param` names the first that differs.
    """
    principals = []
    for index, adapter in enumerate(adapters):
        place = f"{field}[{index}]{member}"
        try:
            principals.append(principal_of(adapter))
        except InvalidAdapterName as error:
            error.param = place
            raise
        if (tenant := principals[-1].tenant) != principals[0].tenant:
            raise InvalidRequest(
                f"{place} is of tenant {tenant!r}, the first of {principals[0].tenant!r}; a request acts for one "
                "tenant: name adapters of one",
                param=place,
            )
    return principals[0]
