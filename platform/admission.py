"""Lets a request that was recognised begin: within its limits, and with its place given back at the
end, however it ends. Pure ASGI, around everything a request does.
"""

from __future__ import annotations

from dataclasses import replace

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.platform import access, errors
from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.limits import Admission


class AdmissionMiddleware:
    """Behind AuthMiddleware. Open routes need no place."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or access.rule_of(scope["method"], scope["path"]).open:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        caller: Caller = state["caller"]
        admission: Admission = scope["app"].state.runtime.admission
        try:
            lease = admission.admit(caller)
        except ApiError as error:
            headers = {**errors.headers(error.status, error.code), **error.headers}
            body = errors.body(error.status, error.code, error.message)
            await JSONResponse(body, error.status, headers=headers)(scope, receive, send)
            return
        state["caller"] = replace(caller, lease=lease)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(k.encode(), v.encode()) for k, v in lease.headers().items()]
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        try:
            await self._app(scope, receive, send_with_limits if lease.meters else send)
        finally:
            lease.end()
