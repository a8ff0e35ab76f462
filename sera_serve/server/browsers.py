"""Keeps web pages of other sites away from the server: checks of the headers Host, Origin and Sec-Fetch-Site.

A browser lets any page send requests to any address that the browser can reach, a developer's own machine and private
networks included. Two rules stop such pages; clients that are no browsers notice neither of them:

- A page of another origin may not change anything. It cannot forge Origin and Sec-Fetch-Site.
- The server answers only to its own names. A page can let its own name resolve to this server's address (DNS
  rebinding). To the browser, the page and the server are then of one origin, so the page may read all answers too.
  Only the Host header tells: the browser puts the page's name there.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sera_serve.config import ServeSettings
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.server.errors import error_content

CROSS_ORIGIN_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
"""What pages of allowed origins may send: the methods that there are."""

_HOST = r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s\[\]:@/?#\\]+))(?::(?P<port>[0-9]{1,5}))?"
_HOST_HEADER = re.compile(_HOST)
_ORIGIN_HEADER = re.compile(rf"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://{_HOST}/?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_SHOWN = 100


class CrossSiteRequest(SeraServeError):
    """A web page of an origin that is not allowed sent a request that could change something."""

    code = "cross_site_request"
    status = 403


class HostNotAllowed(SeraServeError):
    """The Host header has a name that is not the server's."""

    code = "host_not_allowed"
    status = 403


class _Host(NamedTuple):
    name: str
    port: int | None


class _Origin(NamedTuple):
    scheme: str
    name: str
    port: int | None

    def __str__(self) -> str:
        """The origin as browsers write it."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        port = "" if self.port == _DEFAULT_PORTS.get(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{name}{port}"


class BrowserRules:
    """Which names the server answers to, and which web pages may change something."""

    def __init__(self, settings: ServeSettings) -> None:
        """Read `host`, `allowed_hosts` and `allowed_origins`.

        Raises:
            InvalidConfiguration: An entry is no host name, or no origin.
        """
        self._any_origin = "*" in settings.allowed_origins
        self._origins = [_origin_setting(text) for text in settings.allowed_origins if text != "*"]
        own = _name_setting(settings.host, "host")
        names = {_name_setting(text, "allowed_hosts") for text in settings.allowed_hosts if text != "*"}
        # By default, only a server on a loopback address knows its names.
        self._any_host = "*" in settings.allowed_hosts or not (names or is_loopback(own))
        self._local_names = not names
        self._names = names or {own}

    def cors_origins(self) -> list[str]:
        """Return the allowed origins as browsers write them, or "*"."""
        return ["*"] if self._any_origin else [str(origin) for origin in self._origins]

    def check_host(self, host: str) -> None:
        """Check a Host header.

        Raises:
            HostNotAllowed: The header has another name than the server's.
        """
        if self._any_host:
            return
        parsed = _parse_host(host)
        if parsed is None or not self._has_name(parsed.name):
            raise HostNotAllowed(
                f"this server does not answer to the name {host[:_SHOWN]!r} in the Host header; use another name, "
                "or add this one to the setting allowed_hosts",
                param="Host",
            )

    def check_origin(self, origins: list[str], site: str | None, host: str | None) -> None:
        """Check the headers Origin, Sec-Fetch-Site and Host of a request that may change something.

        Raises:
            CrossSiteRequest: A page of another origin sent the request.
        """
        if self._any_origin or (site is None and not origins):
            return
        if origins and all(_parse_origin(origin) in self._origins for origin in origins):
            return
        if site in (None, "same-origin", "none") and all(_is_same(origin, host) for origin in origins):
            return
        shown = repr(origins[0][:_SHOWN]) if origins else "another site"
        raise CrossSiteRequest(
            f"a web page of {shown} may not send this request; if the page is yours, add its origin to the setting "
            "allowed_origins",
            param="Origin" if origins else "Sec-Fetch-Site",
        )

    def _has_name(self, name: str) -> bool:
        if name in self._names:
            return True
        # A page cannot let an address resolve to another address. So the page with this address is the server's own.
        return self._local_names and (_is_local_name(name) or _address(name) is not None)


class BrowserGuard:
    """Refuses requests that break the `BrowserRules`, in any method and on any path."""

    def __init__(self, app: ASGIApp, rules: BrowserRules) -> None:
        self.app = app
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request. Raises SeraServeError."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = site = None
        preflight = False
        origins = []
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
                self.rules.check_host(host)
            elif name == b"origin":
                origins.append(value.decode("latin-1"))
            elif name == b"sec-fetch-site":
                site = value.decode("latin-1")
            elif name == b"access-control-request-method":
                preflight = True
        # A request without Host (HTTP/1.0) passes: every browser sends the header.
        if scope["method"] not in _SAFE_METHODS or (preflight and scope["method"] == "OPTIONS"):
            self.rules.check_origin(origins, site, host)
        await self.app(scope, receive, send)


class CrossOriginAnswers(CORSMiddleware):
    """Starlette's answers to pages of allowed origins; the refusal of a preflight has the form of every other error."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        # `BrowserGuard` has checked the origin, and every header is allowed. The method is left.
        asked = request_headers["access-control-request-method"]
        message = f"a web page of another origin may not send {asked[:_SHOWN]!r}; it may send " + ", ".join(
            CROSS_ORIGIN_METHODS
        )
        content = error_content(400, message, "bad_request", "Access-Control-Request-Method")
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return JSONResponse(content, 400, headers)


def _parse_host(text: str) -> _Host | None:
    """Parse a Host header. A name is in lower case, without a trailing dot. Returns None if the text is no host."""
    match = _HOST_HEADER.fullmatch(text)
    return None if match is None else _host_of(match)


def _parse_origin(text: str) -> _Origin | None:
    """Parse an Origin header. Returns None for "null" and other text; no origin equals None."""
    match = _ORIGIN_HEADER.fullmatch(text)
    host = None if match is None else _host_of(match)
    if match is None or host is None:
        return None
    scheme = match["scheme"].lower()
    return _Origin(scheme, host.name, _DEFAULT_PORTS.get(scheme) if host.port is None else host.port)


def _host_of(match: re.Match[str]) -> _Host | None:
    name = match["name"]
    if name is None:
        address = _address(match["ipv6"])
        if address is None:
            return None
        name = str(address)
    return _Host(name.lower().removesuffix("."), None if match["port"] is None else int(match["port"]))


def _is_same(origin: str, host: str | None) -> bool:
    """Whether an origin has the name and the port of the Host header. The server cannot see the scheme of a proxy."""
    page, own = _parse_origin(origin), _parse_host(host or "")
    if page is None or own is None:
        return False
    return (page.name, page.port) == (own.name, _DEFAULT_PORTS.get(page.scheme) if own.port is None else own.port)


def _origin_setting(text: str) -> _Origin:
    origin = _parse_origin(text)
    if origin is None:
        raise InvalidConfiguration(
            f"allowed_origins has {text[:_SHOWN]!r}; write an origin, such as https://console.example.com, or *",
            param="allowed_origins",
        )
    return origin


def _name_setting(text: str, setting: str) -> str:
    address = _address(text)
    if address is not None:
        return str(address)
    host = _parse_host(text)
    if host is None or "*" in host.name:
        raise InvalidConfiguration(
            f"{setting} has {text[:_SHOWN]!r}; write a host name or an IP address, without a path", param=setting
        )
    return host.name


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def is_loopback(name: str) -> bool:
    """Whether a host name or an address is this machine's own alone."""
    address = _address(name)
    return _is_local_name(name) if address is None else address.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
