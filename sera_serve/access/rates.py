"""Rates: requests and tokens of each tenant in a minute."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sera_serve.access.quotas import Quota, RateLimitExceeded
from sera_serve.errors import counted

_MINUTE = 60.0
_LONGEST_WAIT_S = 3600
_MAX_BUCKETS = 50_000


class TokenBucket:
    """A bucket that holds a minute's limit, and fills up again within a minute.

    A charge may come after the use, when its size is known, and may then exceed what is left: the bucket is in debt,
    and nothing more is allowed until it is paid. Libraries of rate limiters refuse such a charge, or forget it.

    What was used before a limit was set or lowered is no debt: it empties the bucket, which is full again in a minute.
    """

    def __init__(self, now: float) -> None:
        """Make a full bucket."""
        self._used = 0.0
        self._at = now
        self._limit = math.inf

    def used(self, limit: int | None, now: float) -> float:
        """What of the limit is used now. Without a limit: about what was used in the last minute."""
        passed, self._at = now - self._at, now
        if limit is None:
            self._used *= math.exp(-passed / _MINUTE)
        else:
            self._used = max(0.0, self._used - passed * limit / _MINUTE)
            if limit < self._limit:
                self._used = min(self._used, limit)
        self._limit = math.inf if limit is None else limit
        return self._used

    def charge(self, amount: float, limit: int | None, now: float) -> None:
        """Use an amount."""
        self._used = self.used(limit, now) + amount


@dataclass(frozen=True)
class Rate:
    """The state of one rate, for the headers of a response.

    Attributes:
        limit: A minute's limit.
        remaining: What is left now.
        reset_s: Seconds until the whole limit is there again.
    """

    limit: int
    remaining: int
    reset_s: float


class Rates:
    """The rates of all tenants. Used on the event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has used anything."""
        self._clock = clock
        # Least recently used first. A tenant that was forgotten has a full bucket again.
        self._buckets: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()

    def admit(self, tenant: str, quota: Quota) -> None:
        """Charge one request.

        Raises:
            RateLimitExceeded: The tenant has no request or no token left. Nothing is charged.
        """
        now = self._clock()
        requests = self._bucket("requests", tenant, now)
        for kind, bucket, limit, least in (
            ("request", requests, quota.requests_per_minute, 1.0),
            # Any rest of a minute's tokens admits a request: nobody knows yet how many it uses.
            ("token", self._bucket("tokens", tenant, now), quota.tokens_per_minute, 0.0),
        ):
            if limit is None:
                continue
            missing = bucket.used(limit, now) + least - limit
            if missing > 0 or missing == least == 0:
                wait = min(_LONGEST_WAIT_S, max(1, math.ceil(missing * _MINUTE / limit))) if limit else _LONGEST_WAIT_S
                raise RateLimitExceeded(
                    f"tenant {tenant!r} has used its {counted(limit, kind)} a minute; send the request again in "
                    f"{wait} s",
                    param=f"{kind}s_per_minute",
                    retry_after=wait,
                )
        requests.charge(1, quota.requests_per_minute, now)

    def charge_tokens(self, tenant: str, quota: Quota, tokens: int) -> None:
        """Charge tokens that were used."""
        if tokens:
            now = self._clock()
            self._bucket("tokens", tenant, now).charge(tokens, quota.tokens_per_minute, now)

    def used(self, tenant: str, quota: Quota) -> tuple[int, int]:
        """Requests and tokens of the limits that are used now; without a limit, about those of the last minute."""
        now = self._clock()
        kinds = ("requests", quota.requests_per_minute), ("tokens", quota.tokens_per_minute)
        requests, tokens = (
            0 if (bucket := self._buckets.get((kind, tenant))) is None else math.ceil(bucket.used(limit, now) - 0.5)
            for kind, limit in kinds
        )
        return requests, tokens

    def state(self, tenant: str, quota: Quota) -> dict[str, Rate]:
        """The rates that have a limit, by kind: requests, tokens."""
        now = self._clock()
        found: dict[str, Rate] = {}
        for kind, limit in (("requests", quota.requests_per_minute), ("tokens", quota.tokens_per_minute)):
            if limit is not None:
                used = self._bucket(kind, tenant, now).used(limit, now)
                reset = used * _MINUTE / limit if limit else _MINUTE
                found[kind] = Rate(limit, max(0, math.floor(limit - used)), reset)
        return found

    def _bucket(self, kind: str, tenant: str, now: float) -> TokenBucket:
        key = kind, tenant
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(now)
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket


RATE_HEADERS = tuple(
    f"x-ratelimit-{name}-{kind}" for kind in ("requests", "tokens") for name in ("limit", "remaining", "reset")
)
"""The headers of OpenAI's API for rates: the limit, what is left, and the time until the limit is whole again.

https://platform.openai.com/docs/guides/rate-limits (rate limits in headers)
"""
_NAMES = {kind: [name.encode() for name in RATE_HEADERS if name.endswith(kind)] for kind in ("requests", "tokens")}


def rate_headers(rates: Mapping[str, Rate]) -> list[tuple[bytes, bytes]]:
    """The `RATE_HEADERS` of the rates that have a limit."""
    headers: list[tuple[bytes, bytes]] = []
    for kind, rate in rates.items():
        values = str(rate.limit), str(rate.remaining), _duration(rate.reset_s)
        headers += ((name, value.encode()) for name, value in zip(_NAMES[kind], values, strict=True))
    return headers


def _duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 0s, 20ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if not milliseconds or milliseconds >= 60_000:
        minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
        return f"{minutes}m{rest}s" if minutes else "0s"
    return f"{milliseconds}ms" if milliseconds < 1000 else f"{milliseconds / 1000:g}s"
