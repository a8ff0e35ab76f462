"""Authentication as middleware: who sent a request, before anything else of the request is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from sera_serve.access import AccessControl, Key
from sera_serve.server.auth import Caller, InvalidKey, check_active
from sera_serve.server.errors import error_response
from sera_serve.server.scopes import is_open


class KeyAuthentication:
    """Finds out who sent each request, before its body is read. `Caller` is then in the request's state."""

    def __init__(self, app: ASGIApp, access: AccessControl) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer 401."""
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            try:
                state["caller"] = self._caller(scope)
            except InvalidKey as error:
                await error_response(error, state.get("request_id", ""))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        client = scope.get("client")
        address, request_id = "" if client is None else str(client[0]), scope["state"].get("request_id", "")
        # `MetricsAddress` says that the request came to the operators' own address, which serves no tenant's data.
        if not self.access.needs_keys or scope["state"].get("is_operator", False):
            return Caller(self.access, None, address, request_id)
        is_guest = scope["method"] == "GET" and is_open(scope["path"])
        return Caller(self.access, None if is_guest else self._key(scope), address, request_id, is_guest)

    def _key(self, scope: Scope) -> Key:
        """The key of a request."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            raise InvalidKey("the header Authorization appears twice" if given else "this server needs a key")
        scheme, _, secret = given[0].decode("latin-1").strip().partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidKey("the scheme of Authorization is not Bearer")
        if not secret.strip():
            raise InvalidKey("Authorization has no key after Bearer")
        key = self.access.key_of(secret.strip())
        if key is None:
            raise InvalidKey("the key is unknown")
        check_active(key)
        return key
