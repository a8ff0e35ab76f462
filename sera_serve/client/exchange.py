"""Retries, without any input or output: which request is sent again, and when."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sera_serve.client.calls import Call
from sera_serve.client.errors import (
    RateLimitError,
    SeraAPIError,
    SeraConnectionError,
    SeraError,
    SeraTimeoutError,
    UnavailableError,
    api_error,
)

# Nothing of the request has reached a server.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
# The connection broke, perhaps because the server started again. A time limit that ran out is no such fault.
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)
# The codes of 503 that the server gives before it begins anything. Others may come while the work is done.
_NOT_BEGUN = frozenset({"overloaded", "too_many_uploads", "too_many_connections", "too_many_pipelined"})
# The same input has the same fate.
_IN_VAIN = frozenset({"base_overflow"})
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True)
class RetryPolicy:
    """When a request is sent again. A random part of each delay keeps many clients from coming back at once.

    Attributes:
        max_retries: How often one call is sent again at most; 0 is never.
        max_total_s: No retry begins later than so many seconds after the call did.
        first_delay_s: Longest delay of the first retry where the server names none. It doubles with each retry.
        max_delay_s: Longest such delay. Where the server names a time (`Retry-After`), that time comes first.
    """

    max_retries: int = 4
    max_total_s: float = 120.0
    first_delay_s: float = 0.5
    max_delay_s: float = 8.0

    def __post_init__(self) -> None:
        """Check the numbers: a wrong one would be found only with the first refusal."""
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int):
            raise TypeError(f"max_retries is {self.max_retries!r}; give a whole number, such as 4")
        for name in ("max_retries", "max_total_s", "first_delay_s", "max_delay_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r}; give a number")
            if not value >= 0:
                raise ValueError(f"{name} is {value!r}; give 0 or more")

    def delay_s(self, retries: int, retry_after: float | None) -> float:
        """Seconds to wait before the next try, after so many retries."""
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(retries, 64))
        if retry_after is None:
            return longest * random.uniform(0.5, 1)
        return retry_after + longest * random.uniform(0, 1)


class Tries:
    """The tries of one call: whether and when it is sent again."""

    def __init__(self, call: Call[Any], policy: RetryPolicy) -> None:
        """Begin a call; its first try is now."""
        self._call = call
        self._policy = policy
        self._began = time.monotonic()
        self._retries = 0

    def delay_s(self, failure: SeraError) -> float:
        """Return the seconds to wait before the next try.

        Raises:
            SeraError: `failure`, where it is the call's last.
        """
        if self._retries >= self._policy.max_retries or not _may_retry(failure, self._call):
            raise failure
        delay = self._policy.delay_s(self._retries, failure.retry_after if isinstance(failure, SeraAPIError) else None)
        if time.monotonic() - self._began + delay > self._policy.max_total_s:
            raise failure
        self._retries += 1
        return delay


def checked_policy(retries: RetryPolicy) -> RetryPolicy:
    """Return a client's policy. Raises TypeError if it is none, such as a bare number."""
    if not isinstance(retries, RetryPolicy):
        raise TypeError(f"retries is {retries!r}; give a RetryPolicy, such as RetryPolicy(max_retries=3)")
    return retries


def build_request(client: httpx.Client | httpx.AsyncClient, arguments: Mapping[str, Any]) -> httpx.Request:
    """Make httpx's request. Raises ValueError if the call's names make an address that is too long."""
    try:
        return client.build_request(**arguments)
    except httpx.InvalidURL as error:
        raise ValueError(f"the call has no address ({error}); look at the names in it") from error


def connection_error(error: httpx.HTTPError, call: Call[Any]) -> SeraConnectionError:
    """Return the typed error of a call without a whole answer."""
    sent = not isinstance(error, _NOT_SENT)
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.PoolTimeout):
        message = (
            f"all connections of this client were in use, and none became free for {call.method} {call.path} within "
            "its timeout: close streams that are open, or give the client a larger max_connections"
        )
    elif not sent:
        url = error.request.url
        message = f"the server at {url.scheme}://{url.netloc.decode()} cannot be reached: {reason}"
    elif call.changes:
        message = (
            f"the answer to {call.method} {call.path} was lost ({reason}); the server may have done it: look at the "
            "adapter before you send it again"
        )
    else:
        message = f"the answer to {call.method} {call.path} was lost: {reason}"
    kind = SeraTimeoutError if isinstance(error, httpx.TimeoutException) else SeraConnectionError
    return kind(message, sent=sent)


@contextmanager
def lost_connections(call: Call[Any]) -> Iterator[None]:
    """Turn httpx's errors, of a request or while its answer is read, into the clients' own."""
    try:
        yield
    except httpx.HTTPError as error:
        raise connection_error(error, call) from error
    except httpx.InvalidURL as error:
        # httpx has no error of its own for some answers that lead to no address.
        broken = httpx.RemoteProtocolError(f"Invalid URL in location header: {error}")
        broken.__cause__ = error
        raise connection_error(broken, call) from broken


def refusal(response: httpx.Response) -> SeraAPIError:
    """Return the typed error of an answer that is no success, and was read."""
    headers = response.headers
    target = headers.get("location") if response.is_redirect else None
    return api_error(
        response.status_code, response.content, headers.get("x-request-id"), _retry_after(response), target
    )


def _may_retry(error: SeraError, call: Call[Any]) -> bool:
    if call.probes:
        return False
    if isinstance(error, SeraConnectionError):
        return not error.sent or (call.method == "GET" and isinstance(error.__cause__, _BROKEN))
    if isinstance(error, RateLimitError):
        return True
    if not isinstance(error, UnavailableError):
        return False
    return error.code in _NOT_BEGUN if call.changes else error.code not in _IN_VAIN


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds of `Retry-After`, which has a number or a date (RFC 9110, 10.2.3); None where it has neither."""
    value = response.headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
