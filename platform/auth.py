"""Lets a request in: whose key it is (`keys.py`), and whether that may call this route
(`access.py`). Pure ASGI, before any body is read.

Sets `scope["state"]["caller"]`. Without any key everybody is an operator, called anonymous.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.platform import access, errors
from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.keys import KeyRing


class AuthMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = await _admitted(scope)
        except ApiError as error:
            body = errors.body(error.status, error.code, error.message)
            headers = errors.headers(error.status, error.code)
            await JSONResponse(body, error.status, headers=headers)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


async def _admitted(scope: Scope) -> Caller:
    """Raises: ApiError(invalid_api_key | permission_denied | not_found)."""
    rule = access.rule_of(scope["method"], scope["path"])
    if rule.open:
        return Caller(scopes=frozenset())
    headers = Headers(scope=scope)
    keys: KeyRing = scope["app"].state.runtime.keys
    caller = await keys.caller(headers.get("authorization", ""), headers.get("x-tenant", ""))
    if rule.admits(caller):
        return caller
    if rule is access.UNKNOWN:
        raise errors.no_such_route(scope["path"])
    if rule.operator and not caller.is_operator:
        raise ApiError("permission_denied", "this takes an operator's key, without a tenant")
    needed = " or ".join(sorted(rule.scopes))
    raise ApiError("permission_denied", f"this API key lacks the scope it takes: {needed}")
