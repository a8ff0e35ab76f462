"""Request and response bodies of keys, aliases, versions and shares. docs/http.md describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from adapters_store import Task
from sera_serve.access import Key, Scope
from sera_serve.access.keys import MAX_LIFETIME_S, MAX_NAME
from sera_serve.server.native.schemas import MAX_REFERENCE
from sera_serve.server.strict import QueryModel, RequestModel, with_example

_MAX_VERSION = 999_999_999

TenantName = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]


class CallersBase(BaseModel):
    """The base model of the server."""

    name: str
    kind: Literal["decoder", "encoder", "vision", "dual"]


class CallerDetail(BaseModel):
    """Response body of `GET /v1/me`."""

    tenant: str | None = Field(description="the tenant that the key acts for; null where the server needs no key")
    key_id: str | None
    scopes: list[Scope] = Field(description="what the caller may do: an admin, everything")
    needs_keys: bool = Field(description="whether the server needs a key now")
    base: CallersBase


class KeyDetail(BaseModel):
    """A key, without its secret. Times are ISO 8601, UTC."""

    id: str
    tenant: str
    scopes: list[Scope]
    name: str
    created_at: str
    expires_at: str | None
    status: Literal["active", "expired", "revoked"]

    @classmethod
    def of(cls, key: Key) -> KeyDetail:
        """Describe a key."""
        return cls(**key.described())


class KeyList(BaseModel):
    """Response body of `GET /v1/keys`, oldest first."""

    keys: list[KeyDetail]


class NewKey(KeyDetail):
    """Response body of `POST /v1/keys`. The secret is shown this once."""

    secret: str


class KeyQuery(QueryModel):
    """Query parameters of `GET /v1/keys`."""

    tenant: str | None = Field(None, max_length=MAX_REFERENCE, description="list only keys of this tenant")


class KeyRequest(RequestModel):
    """Body of `POST /v1/keys`."""

    model_config = with_example({"tenant": "acme", "scopes": ["infer", "publish"], "name": "laptop"})

    tenant: TenantName = Field(description="the tenant that the key acts for; it need not have an adapter yet")
    scopes: list[Scope] = Field(min_length=1, max_length=16, description="infer, publish, train, admin")
    name: str = Field("", max_length=MAX_NAME, description="what people call the key")
    expires_in_s: float | None = Field(
        None, gt=0, le=MAX_LIFETIME_S, description="seconds until the key is refused; null is never"
    )


class AliasRequest(RequestModel):
    """Body of `PUT /v1/adapters/{tenant}/{name}/aliases/{alias}`."""

    model_config = with_example({"version": 1})

    version: int = Field(ge=1, le=_MAX_VERSION, description="the version that the alias is to stand for")


class AliasDetail(BaseModel):
    """Response body of `PUT` and `DELETE /v1/adapters/{tenant}/{name}/aliases/{alias}`."""

    adapter: str
    alias: str
    version: int = Field(
        description="the version that the alias stands for; after DELETE, the one it stood for, 0 if damaged"
    )


class VersionQuery(QueryModel):
    """Query parameters of `GET /v1/adapters/{tenant}/{name}/versions`."""

    limit: int = Field(100, ge=1, le=200, description="maximum number of versions on a page")
    before: int | None = Field(
        None, ge=1, le=_MAX_VERSION, description="only versions below this one: the `next` of the previous page"
    )


class VersionDetail(BaseModel):
    """One version of an adapter."""

    version: int
    digest: str
    created_at: str
    task: Task
    method: str
    ranks: list[int]
    splits: list[int]
    parameters: int
    bytes: int
    metrics: dict[str, float] | None = Field(description="scores that its training recorded")
    description: str | None = Field(description="what its training record says of it")
    card: dict[str, str] = Field(description="its training record in short texts: data, settings, metrics by epoch")


class VersionList(BaseModel):
    """Response body of `GET /v1/adapters/{tenant}/{name}/versions`, newest first.

    `next` is the `before` of the next page, and null on the last page.
    """

    adapter: str
    aliases: dict[str, int]
    versions: list[VersionDetail]
    next: int | None


class ShareList(BaseModel):
    """Response body of the routes of shares. `shared_with` has tenants, and `*` for all of them."""

    adapter: str
    shared_with: list[str]
