"""Who may do what: keys, shares and quotas of tenants, kept with the store."""

from sera_serve.access.audit import COMMAND, Action, Actor, AuditLog
from sera_serve.access.control import AccessControl
from sera_serve.access.database import AccessDatabase, AccessDatabaseError
from sera_serve.access.holdings import Holdings
from sera_serve.access.keys import SCOPES, CreatedKey, Key, KeyNotFound, Keys, Scope
from sera_serve.access.quotas import (
    DEFAULT,
    MAX_LIMIT,
    QUOTA_FIELDS,
    Limit,
    PriorityNotAllowed,
    Quota,
    QuotaExceeded,
    QuotaPriority,
    Quotas,
    RateLimitExceeded,
    TrainingQuotaExceeded,
    check_quota_tenant,
    checked_limit,
    checked_quotas,
)
from sera_serve.access.rates import RATE_HEADERS, Rates, rate_headers
from sera_serve.access.shares import EVERYONE, Shares

__all__ = [
    "COMMAND",
    "DEFAULT",
    "EVERYONE",
    "MAX_LIMIT",
    "QUOTA_FIELDS",
    "RATE_HEADERS",
    "SCOPES",
    "AccessControl",
    "AccessDatabase",
    "AccessDatabaseError",
    "Action",
    "Actor",
    "AuditLog",
    "CreatedKey",
    "Holdings",
    "Key",
    "KeyNotFound",
    "Keys",
    "Limit",
    "PriorityNotAllowed",
    "Quota",
    "QuotaExceeded",
    "QuotaPriority",
    "Quotas",
    "RateLimitExceeded",
    "Rates",
    "Scope",
    "Shares",
    "TrainingQuotaExceeded",
    "check_quota_tenant",
    "checked_limit",
    "checked_quotas",
    "rate_headers",
]
