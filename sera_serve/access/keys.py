"""Keys of tenants. A key's secret is shown once; the database has its hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from adapters_store import check_part
from sera_serve.access.database import AccessDatabase
from sera_serve.errors import InvalidRequest, SeraServeError

Scope = Literal["infer", "publish", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""`infer`: send requests. `publish`: change the tenant's adapters. `train`: files and jobs. `admin`: operate the
server: every tenant's adapters, keys and quotas, and the metrics."""
MAX_NAME = 100
MAX_LIFETIME_S = 100 * 365 * 86400
"""A hundred years."""

_PREFIX = "sk-sera-"
_ID_BYTES, _SECRET_BYTES = 6, 32
_COLUMNS = "id, tenant, scopes, secret_sha256, name, created_at, expires_at, revoked_at"
# Compared with the secret of a key that does not exist, so that its refusal takes as long as another one's.
_NO_HASH = hashlib.sha256(b"").hexdigest()


class KeyNotFound(SeraServeError):
    """There is no key of this id."""

    code = "key_not_found"
    status = 404


@dataclass(frozen=True)
class Key:
    """A key. Times are seconds since 1970.

    Attributes:
        id: Names the key in lists and logs. It is no secret.
        tenant: The tenant that the key acts for.
        scopes: What the key may do.
        secret_sha256: Hexadecimal SHA-256 of the secret, which has 256 random bits.
        name: What people call the key.
        created_at: When it was made.
        expires_at: From when on it is refused, or None.
        revoked_at: When it was revoked, or None.
    """

    id: str
    tenant: str
    scopes: frozenset[Scope]
    secret_sha256: str
    name: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @property
    def status(self) -> Literal["active", "expired", "revoked"]:
        """Whether the key is accepted now."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= time.time() else "active"

    def may(self, scope: Scope) -> bool:
        """Whether the key has a scope. `admin` has all of them."""
        return scope in self.scopes or "admin" in self.scopes

    def described(self) -> dict[str, Any]:
        """The key without its secret, as JSON values. Times are ISO 8601, UTC."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "scopes": [scope for scope in SCOPES if scope in self.scopes],
            "name": self.name,
            "created_at": _iso_time(self.created_at),
            "expires_at": None if self.expires_at is None else _iso_time(self.expires_at),
            "status": self.status,
        }


@dataclass(frozen=True)
class CreatedKey:
    """A new key with its secret, which nothing stores."""

    key: Key
    secret: str


class Keys:
    """The keys in a database. Every method blocks, and raises AccessDatabaseError."""

    def __init__(self, database: AccessDatabase) -> None:
        """Use a database."""
        self._database = database

    def create(
        self, tenant: str, scopes: Iterable[str], *, name: str = "", lifetime_s: float | None = None
    ) -> CreatedKey:
        """Make a key.

        Args:
            tenant: The tenant that it acts for. The tenant need not have an adapter yet.
            scopes: At least one of `SCOPES`.
            name: For people.
            lifetime_s: Seconds until it expires, or None.

        Raises:
            InvalidAdapterName: `tenant` is not of the form of a tenant.
            InvalidRequest: No scope, an unknown one, or an impossible lifetime or name.
        """
        check_part(tenant, "tenant")
        checked = _checked_scopes(scopes)
        if len(name) > MAX_NAME or not name.isprintable():
            raise InvalidRequest(f"name must be at most {MAX_NAME} printable characters", param="name")
        if lifetime_s is not None and not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise InvalidRequest(
                f"the lifetime is {lifetime_s} s; it must be above 0 and at most a hundred years", param="expires"
            )
        now = time.time()
        identifier, random = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
        secret = f"{_PREFIX}{identifier}-{random}"
        expires = None if lifetime_s is None else now + lifetime_s
        key = Key(identifier, tenant, checked, _hash(secret), name, now, expires, None)
        with self._database.writing() as connection:
            row = (key.id, tenant, ",".join(sorted(checked)), key.secret_sha256, name, now, expires, None)
            connection.execute(f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return CreatedKey(key, secret)

    def all(self, tenant: str | None = None) -> list[Key]:
        """All keys, or those of one tenant, oldest first; revoked and expired ones too.

        Raises:
            InvalidAdapterName: `tenant` is not of the form of a tenant.
        """
        if tenant is not None:
            check_part(tenant, "tenant")
        where, values = ("WHERE tenant = ?", (tenant,)) if tenant is not None else ("", ())
        with self._database.reading() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM keys {where} ORDER BY created_at, id", values)
            return [_key(row) for row in rows]

    def revoke(self, identifier: str, tenant: str | None = None) -> Key:
        """Refuse a key from now on. Idempotent. Returns the key.

        Args:
            identifier: The key's id.
            tenant: Only a key of this tenant.

        Raises:
            KeyNotFound: There is no such key.
        """
        with self._database.writing() as connection:
            found = None
            # The bytes of a command line need not be text, and the database takes text alone. Ids are ASCII.
            if identifier.isascii():
                found = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (identifier,)).fetchone()
            if found is None or (tenant is not None and _key(found).tenant != tenant):
                raise KeyNotFound(f"there is no key {identifier[:64]!r}; list the keys", param="id")
            connection.execute(
                "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (time.time(), identifier)
            )
            return _key(connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (identifier,)).fetchone())


def key_id_of(secret: str) -> str:
    """Return the id that a secret claims to belong to, or an empty text."""
    return secret.removeprefix(_PREFIX).partition("-")[0] if secret.startswith(_PREFIX) else ""


def is_secret_of(secret: str, key: Key | None) -> bool:
    """Whether a secret is that of a key; takes as long without a key."""
    same = hmac.compare_digest(_hash(secret), _NO_HASH if key is None else key.secret_sha256)
    return same and key is not None


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _hash(secret: str) -> str:
    # The secret has 256 random bits. No list of guesses has it, so a slow hash would protect nothing.
    return hashlib.sha256(secret.encode()).hexdigest()


def _checked_scopes(scopes: Iterable[str]) -> frozenset[Scope]:
    given = frozenset(scopes)
    if unknown := sorted(given - set(SCOPES)):
        raise InvalidRequest(f"there is no scope {unknown[0][:64]!r}; they are {', '.join(SCOPES)}", param="scopes")
    if not given:
        raise InvalidRequest(f"name at least one scope; they are {', '.join(SCOPES)}", param="scopes")
    return frozenset(scope for scope in SCOPES if scope in given)


def _key(row: Sequence[Any]) -> Key:
    """A key from its row. The table is STRICT: SQLite has checked the type of each column."""
    identifier, tenant, scopes, *others = row
    return Key(identifier, tenant, frozenset(scope for scope in SCOPES if scope in scopes.split(",")), *others)
