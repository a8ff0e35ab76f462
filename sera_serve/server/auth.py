"""Who sent a request, and which adapters the sender may name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fastapi import Request

from adapters_store import parse_adapter, parse_ref
from adapters_store.errors import AdapterNotFound, InvalidAdapterName
from sera_serve.access import AccessControl, Actor, Key
from sera_serve.access import Scope as KeyScope
from sera_serve.engine import BASE_PRINCIPAL, AdapterChoice, Principal
from sera_serve.errors import InvalidRequest, SeraServeError


class InvalidKey(SeraServeError):
    """The request has no key, or one that is not accepted."""

    code = "invalid_api_key"
    status = 401

    def __init__(self, fault: str) -> None:
        remedy = "send the header Authorization: Bearer KEY; `sera-serve keys create` makes a key"
        super().__init__(f"{fault}; {remedy}", param="Authorization")


class ScopeMissing(SeraServeError):
    """The key may not do this."""

    code = "insufficient_scope"
    status = 403


class NotYourTenant(SeraServeError):
    """The request would change what belongs to another tenant than the key's."""

    code = "not_your_tenant"
    status = 403


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        access: Keys and shares.
        key: The request's key; None where the server asks for none. Such a caller may do everything, as every tenant.
        address: Where the request came from.
        request_id: Of the request.
        is_guest: Whether the server asks for keys and this request, to an open path, has none.
    """

    access: AccessControl
    key: Key | None
    address: str
    request_id: str = ""
    is_guest: bool = False

    @property
    def tenant(self) -> str | None:
        """The tenant that the caller acts for, or None for all of them: the server asks for no key."""
        return None if self.key is None else self.key.tenant

    @property
    def owner(self) -> str:
        """Who takes turns with others for work on the event loop: the tenant, or without one the client's address."""
        return self.tenant or self.address

    @property
    def seen_tenant(self) -> str | None:
        """The one tenant whose adapters, files and jobs the caller sees and may change; None is every tenant.

        An admin sees every tenant, and so does anyone where no key is needed.
        """
        return None if self.may("admin") else self.tenant

    @property
    def actor(self) -> Actor:
        """The caller as the audit log names it."""
        return Actor("http", None if self.key is None else self.key.id, self.address, self.request_id)

    def may(self, scope: KeyScope) -> bool:
        """Whether the caller may do what a scope stands for."""
        return self.key is None or self.key.may(scope)

    def check_still_accepted(self) -> None:
        """Refuse a caller whose key was revoked, has expired or is gone since the request came. For long answers.

        Raises:
            InvalidKey: The caller would be refused now.
        """
        if self.key is not None:
            key = self.access.key(self.key.id)
            if key is None:
                raise InvalidKey(f"the key {self.key.id} is unknown now")
            check_active(key)
        elif self.access.needs_keys:
            raise InvalidKey("this server needs a key now")

    def principal(self, adapter: AdapterChoice | None) -> Principal:
        """Return the principal of a request that names `adapter`. The engine reads the principal, and parses no names.

        Where the server asks for no key, the tenant of the adapter reference is the tenant of the request, and
        requests to the base model share `BASE_PRINCIPAL`.

        Args:
            adapter: The adapter reference of the request, or its weighted parts, or None for the base model.

        Raises:
            InvalidAdapterName: A reference cannot be parsed.
            AdapterNotFound: The caller may not use an adapter, whether it exists or not.
            InvalidRequest: Without keys: the parts are of several tenants.
        """
        if adapter is None:
            return self._principal(None)
        if not isinstance(adapter, str):
            return self.principal_of_all([part.adapter for part in adapter], "adapter", ".adapter")
        tenant = self.check_use(adapter).partition("/")[0]
        return self._principal(tenant)

    def principal_of_all(self, adapters: Sequence[str], field: str, member: str = "") -> Principal:
        """Return the principal of a request that names several adapters.

        Args:
            adapters: The references, at least one.
            field: What the request calls the list.
            member: What follows an element of the list to its reference, such as ".adapter".

        Raises:
            InvalidAdapterName, AdapterNotFound: As `principal`; `param` names the reference.
            InvalidRequest: As `principal`; `param` names the first adapter that differs.
        """
        principals = []
        for index, adapter in enumerate(adapters):
            place = f"{field}[{index}]{member}"
            try:
                principals.append(self.principal(adapter))
            except (InvalidAdapterName, AdapterNotFound) as error:
                error.param = place
                raise
            if (tenant := principals[-1].tenant) != principals[0].tenant:
                raise InvalidRequest(
                    f"{place} is of tenant {tenant!r}, the first of {principals[0].tenant!r}; a request acts for one "
                    "tenant: name adapters of one",
                    param=place,
                )
        return principals[0]

    def check_use(self, reference: str) -> str:
        """Refuse an adapter that the caller may not use, as if it did not exist; return its name, `tenant/name`.

        The store is not asked.

        Raises:
            InvalidAdapterName: The reference cannot be parsed.
            AdapterNotFound: The adapter is neither the caller's nor shared with the caller.
        """
        adapter = parse_ref(reference).adapter
        own = self.seen_tenant
        if own is not None and not self.access.may_use(own, adapter):
            raise unknown_adapter(adapter)
        return adapter

    def check_change(self, reference: str) -> None:
        """Refuse to change another tenant's adapter.

        Raises:
            InvalidAdapterName: The reference cannot be parsed.
            AdapterNotFound: The caller may not even use the adapter, whether it exists or not.
            NotYourTenant: The adapter is shared with the caller.
        """
        self.check_publish(self.check_use(reference))

    def check_publish(self, adapter: str) -> None:
        """Refuse to publish under another tenant's name. Nothing is looked up.

        Raises:
            InvalidAdapterName: `adapter` is not of the form tenant/name.
            NotYourTenant: It is another tenant's.
        """
        tenant, _ = parse_adapter(adapter)
        own = self.seen_tenant
        if own not in (None, tenant):
            raise NotYourTenant(
                f"the key acts for tenant {own!r}, and {adapter!r} is not its own; use a name that begins with {own}/",
                param="adapter",
            )

    def _principal(self, named: str | None) -> Principal:
        if self.key is None:
            return BASE_PRINCIPAL if named is None else Principal(named)
        return Principal(self.key.tenant, self.key.id, frozenset(self.key.scopes))


def unknown_adapter(adapter: str) -> AdapterNotFound:
    """The refusal of an adapter that is not there, or that the caller may not know of: the store's own words."""
    return AdapterNotFound(
        f"adapter {adapter!r} is not in the store; list what is there, or publish it", param="adapter"
    )


def check_active(key: Key) -> None:
    """Refuse a key that is revoked or has expired.

    Raises:
        InvalidKey: The message names the key by its id.
    """
    if key.status != "active":
        raise InvalidKey(f"the key {key.id} is {key.status}")


def check_scope(caller: Caller, needed: str) -> None:
    """Refuse a caller who may not call a route.

    Args:
        caller: Who sent the request.
        needed: What the route needs; see `scopes`.

    Raises:
        InvalidKey: There is no key.
        ScopeMissing: The key does not have the scope.
    """
    if needed == "nothing":
        return
    if caller.is_guest:
        raise InvalidKey("this needs a key")
    if caller.key is None or needed == "key":
        return
    if not caller.key.may(cast(KeyScope, needed)):
        raise ScopeMissing(
            f"the key {caller.key.id} has the scopes {', '.join(sorted(caller.key.scopes))}; this needs {needed}: use "
            "another key",
            param="Authorization",
        )


def caller_of(request: Request) -> Caller:
    """Return who sent a request. The app must have a `KeyAuthentication`."""
    return cast(Caller, request.state.caller)
