"""What a client is made with, checked: its address, its key and headers, its time limit and its connections."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import httpx

DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
# Less than a server takes of one address by default (500), so that the client waits and is not refused.
DEFAULT_MAX_CONNECTIONS = 400
KEY_VARIABLE = "SERA_API_KEY"

# The system's calls count milliseconds in 32 bits.
_MAX_TIMEOUT_S = 1_000_000
_KEPT_CONNECTIONS = 100
# RFC 9110, 5.1 and 5.5.
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def connection(
    base_url: str, api_key: str | None, timeout: float, headers: Mapping[str, str] | None, max_connections: int
) -> dict[str, Any]:
    """Return the arguments of httpx's client. Those of this function are a client's own.

    Raises:
        TypeError: `timeout` or `max_connections` is no number.
        ValueError: An argument has no such value, or there are two keys. The text has neither a key nor a password.
    """
    url = _checked_url(base_url)
    return {
        "base_url": url,
        "headers": _with_key(_checked_headers(headers), api_key, url),
        "timeout": _checked_timeout(timeout),
        "limits": _checked_limits(max_connections),
    }


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url is no address ({error}); write http://HOST:PORT") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("base_url begins with neither http:// nor https://; write http://HOST:PORT")
    if url.query or url.fragment:
        raise ValueError("base_url has a query or a fragment, which no call would keep; write http://HOST:PORT")
    return url


def _checked_timeout(timeout: float) -> httpx.Timeout:
    advice = "give a number of seconds, such as 30"
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout is {timeout!r}; {advice}")
    if not 0 < timeout <= _MAX_TIMEOUT_S:
        raise ValueError(f"timeout is {timeout!r}, not above 0 and up to {_MAX_TIMEOUT_S:,}; {advice}")
    return httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S))


def _checked_limits(max_connections: int) -> httpx.Limits:
    if isinstance(max_connections, bool) or not isinstance(max_connections, int):
        raise TypeError(f"max_connections is {max_connections!r}; give a whole number, such as 100")
    if max_connections < 1:
        raise ValueError(f"max_connections is {max_connections}; give 1 or more")
    return httpx.Limits(max_connections=max_connections, max_keepalive_connections=_KEPT_CONNECTIONS)


def _checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of the headers. httpx finds a wrong one when it sends it, and it would look like a lost connection."""
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers: {name!r} is no name of a header")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            # The value may be a secret.
            raise ValueError(
                f"headers: the value of {name!r} is no printable ASCII text, or has a space or a line break at an end"
            )
    return dict(headers or {})


def _with_key(given: dict[str, str], api_key: str | None, url: httpx.URL) -> dict[str, str]:
    """The headers of every request: those given, and the key's. httpx puts the user of an address there, too."""
    sources = [
        *(["api_key"] if api_key is not None else []),
        *(["headers"] if any(name.lower() == "authorization" for name in given) else []),
        *(["base_url"] if url.username or url.password else []),
    ]
    if len(sources) > 1:
        raise ValueError(f"there is a key or a password in {' and in '.join(sources)}; give one of them")
    if api_key is None:
        api_key = None if sources else os.environ.get(KEY_VARIABLE)
    key = (api_key or "").strip()
    if not key:
        return given
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"api_key, or {KEY_VARIABLE}, is no key; `sera-serve keys create` prints one")
    return {**given, "Authorization": f"Bearer {key}"}
