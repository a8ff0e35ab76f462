"""Quotas: what each tenant may hold and use."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from adapters_store import check_part
from adapters_store.errors import InvalidAdapterName
from sera_serve.access.database import AccessDatabase
from sera_serve.errors import InvalidConfiguration, Overloaded, SeraServeError, counted

logger = logging.getLogger("sera_serve.access")
QuotaPriority = Literal["low", "normal", "high"]
DEFAULT = "*"
"""In place of a tenant: each tenant without a limit of its own."""

_PRIORITIES = get_args(QuotaPriority)
MAX_LIMIT = (1 << 53) - 1
"""The largest whole number that JSON readers agree on."""
_NO_LIMIT = "null (in a command: none) for no limit"


class QuotaExceeded(SeraServeError):
    """The tenant has as much as it may have. Waiting does not help."""

    code = "quota_exceeded"
    status = 403


class TrainingQuotaExceeded(QuotaExceeded):
    """The tenant has as many unfinished training jobs as it may have. One of them ends some time."""

    status = 429
    retry_after = 60


class RateLimitExceeded(Overloaded):
    """The tenant has used what it may use in a minute."""

    code = "rate_limit_exceeded"
    status = 429


class PriorityNotAllowed(SeraServeError):
    """The request asks for a priority above its tenant's highest."""

    code = "priority_not_allowed"
    status = 403


@dataclass(frozen=True)
class Quota:
    """The limits of one tenant. None is no limit.

    Attributes:
        adapters: Adapters in the store.
        bytes: Bytes of all versions in the store, and `RETIRED_BYTES` for each deleted adapter.
        requests_per_minute: Requests for inference.
        tokens_per_minute: Tokens of prompts and of answers.
        requests_in_flight: Requests waiting or running; the server's own limit holds too.
        training_jobs: Training jobs that are not finished.
        max_priority: The highest priority of a request.
    """

    adapters: int | None = None
    bytes: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_in_flight: int | None = None
    training_jobs: int | None = None
    max_priority: QuotaPriority | None = None


QUOTA_FIELDS = tuple(field.name for field in dataclasses.fields(Quota))

Limit: TypeAlias = int | str | None
"""The value of one limit. None is no limit, in place of one that `*` has."""


def checked_limit(field: str, value: Any) -> Limit:
    """Check one limit and return it.

    Raises:
        InvalidConfiguration: There is no such field, or its value is of another kind.
    """
    if field not in QUOTA_FIELDS:
        raise InvalidConfiguration(
            f"there is no limit {field[:64]!r}; they are {', '.join(QUOTA_FIELDS)}", param=field[:64]
        )
    if value is None:
        return None
    if field == "max_priority":
        if value not in _PRIORITIES:
            raise InvalidConfiguration(
                f"max_priority is {_shown(value)}; it is one of {', '.join(_PRIORITIES)}, or {_NO_LIMIT}",
                param=field,
            )
        return str(value)
    if type(value) is not int or not 0 <= value <= MAX_LIMIT:
        raise InvalidConfiguration(
            f"{field} is {_shown(value)}; it must be a whole number from 0 to {MAX_LIMIT}, or {_NO_LIMIT}",
            param=field,
        )
    return value


def checked_quotas(value: Any) -> dict[str, dict[str, Limit]]:
    """Check the setting `quotas`: limits by name, by tenant or `*`.

    Raises:
        InvalidConfiguration: It is of another form; the message names the tenant and the limit.
    """
    if not isinstance(value, Mapping):
        raise InvalidConfiguration("quotas must be a mapping of tenants to limits", param="quotas")
    found: dict[str, dict[str, Limit]] = {}
    for tenant, limits in value.items():
        check_quota_tenant(tenant)
        if not isinstance(limits, Mapping):
            raise InvalidConfiguration(f"quotas of {tenant} must be a mapping of limits", param="quotas")
        try:
            found[tenant] = {str(field): checked_limit(str(field), limit) for field, limit in limits.items()}
        except InvalidConfiguration as error:
            raise InvalidConfiguration(f"quotas of {tenant}: {error.message}", param="quotas") from error
    return found


def check_quota_tenant(tenant: Any) -> str:
    """Check that quotas may have this tenant: a tenant, `*`, or `_base` for requests to the base without a key.

    Raises:
        InvalidConfiguration: It is none.
    """
    if tenant in (DEFAULT, "_base"):
        return str(tenant)
    try:
        return check_part(tenant, "tenant")
    except InvalidAdapterName as error:
        raise InvalidConfiguration(f"quotas: {error.message}; or * for all others", param="tenant") from error


class Quotas:
    """The limits of all tenants: those that commands have set, before those of the settings file.

    For each limit the first source that has it decides: the tenant's own by command, the tenant's own in the file, `*`
    by command, `*` in the file. Reads come from memory. Locking: `_lock` is held while the sources change, also while
    the database is read; readers take whole tables, which never change.
    """

    def __init__(self, database: AccessDatabase, settings: Mapping[str, Mapping[str, Limit]] | None = None) -> None:
        """Read the limits that commands have set. Blocks.

        Raises:
            AccessDatabaseError: The database cannot be read.
        """
        self._database = database
        self._lock = threading.Lock()
        self._settings: Mapping[str, Mapping[str, Limit]] = dict(settings or {})
        self._stored: Mapping[str, Mapping[str, Limit]] = {}
        self._others = Quota()
        self._complaints: set[str] = set()
        self._by_tenant: Mapping[str, Quota] = {}
        self.refresh()

    def of(self, tenant: str) -> Quota:
        """The limits of a tenant. `*` is a tenant without limits of its own."""
        return self._by_tenant.get(tenant, self._others)

    def tenants(self) -> list[str]:
        """Every tenant, or `*`, that has limits of its own; sorted."""
        return sorted(self._by_tenant)

    def set(self, tenant: str, limits: Mapping[str, Limit]) -> Quota:
        """Set limits of a tenant, and return all of its limits. None is no limit, whatever `*` has. Blocks.

        Raises:
            InvalidConfiguration: The tenant, a field or a value is not of its form.
            AccessDatabaseError: They cannot be written.
        """
        check_quota_tenant(tenant)
        checked = {field: checked_limit(field, value) for field, value in limits.items()}
        with self._database.writing() as connection:
            for field, value in checked.items():
                connection.execute("INSERT OR REPLACE INTO quotas VALUES (?, ?, ?)", (tenant, field, json.dumps(value)))
        self.refresh()
        return self.of(tenant)

    def clear(self, tenant: str) -> bool:
        """Take back every limit that commands have set for a tenant. Returns whether there was one. Blocks.

        Raises:
            InvalidConfiguration: The tenant is not of its form.
            AccessDatabaseError: It cannot be written.
        """
        check_quota_tenant(tenant)
        with self._database.writing() as connection:
            removed = connection.execute("DELETE FROM quotas WHERE tenant = ?", (tenant,)).rowcount
        self.refresh()
        return removed > 0

    def refresh(self) -> None:
        """Read the limits that commands have set. Blocks.

        Raises:
            AccessDatabaseError: The database cannot be read. What was read before stays.
        """
        with self._lock:
            stored: dict[str, dict[str, Limit]] = {}
            with self._database.reading() as connection:
                for tenant, field, value in connection.execute("SELECT tenant, field, value FROM quotas"):
                    # A later release may know more limits.
                    if field not in QUOTA_FIELDS:
                        continue
                    try:
                        stored.setdefault(str(tenant), {})[str(field)] = checked_limit(field, json.loads(value))
                    except (ValueError, InvalidConfiguration):
                        self._complain(f"the limit {field} of {tenant!r} in the database cannot be {value!r}")
            self._stored = stored
            self._combine()

    def _complain(self, message: str) -> None:
        if message not in self._complaints:
            self._complaints.add(message)
            logger.error("%s; it does not count, set it anew or clear it with `sera-serve quotas`", message)

    def reload(self, settings: Mapping[str, Mapping[str, Limit]]) -> None:
        """Take the limits of a settings file that was read again, checked by `checked_quotas`. Waits for a disk."""
        with self._lock:
            self._settings = dict(settings)
            self._combine()

    def of_settings(self) -> Mapping[str, Mapping[str, Limit]]:
        """The limits of the settings file, as it was last read."""
        return self._settings

    def _combine(self) -> None:
        shared = {**self._settings.get(DEFAULT, {}), **self._stored.get(DEFAULT, {})}
        by_tenant = {
            tenant: _quota({**shared, **self._settings.get(tenant, {}), **self._stored.get(tenant, {})})
            for tenant in {*self._settings, *self._stored}
        }
        self._others, self._by_tenant = _quota(shared), by_tenant

    def check_training_jobs(self, tenant: str, unfinished: int) -> None:
        """Refuse a further training job.

        Raises:
            TrainingQuotaExceeded: The tenant has as many unfinished jobs as it may have.
        """
        most = self.of(tenant).training_jobs
        if most is not None and unfinished >= most:
            raise TrainingQuotaExceeded(
                f"tenant {tenant!r} has {counted(unfinished, 'unfinished training job')}, and may have {most}; wait "
                "for one, cancel one, or ask the operator for more",
                param="training_jobs",
            )

    def priority(self, tenant: str, asked: QuotaPriority | None) -> QuotaPriority:
        """The priority of a request: what it asks for, or the lower of normal and the tenant's highest.

        Raises:
            PriorityNotAllowed: It asks for more than the tenant may.
        """
        highest = self.of(tenant).max_priority or "high"
        if asked is None:
            return min("normal", highest, key=_PRIORITIES.index)
        if _PRIORITIES.index(asked) > _PRIORITIES.index(highest):
            raise PriorityNotAllowed(
                f"priority is {asked!r}, and tenant {tenant!r} may have {highest!r} at most; lower it", param="priority"
            )
        return asked


def _quota(limits: Mapping[str, Limit]) -> Quota:
    return Quota(**limits)  # type: ignore[arg-type]


def _shown(value: Any) -> str:
    return repr(value)[:64] if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
