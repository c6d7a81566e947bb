"""What every answer carries, whatever it is: a request id and headers that browsers heed. Pure
ASGI.

The id is the client's `x-request-id`, if it sends a plain one, else made here; log lines of the
request carry it (`telemetry.py`).
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)  # for log lines only

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DOCS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net; connect-src 'self'; "
    "img-src data: https://fastapi.tiangolo.com; frame-ancestors 'none'; base-uri 'none'"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"


def envelope_headers(path: str, request_id: str) -> dict[str, str]:
    """The documentation page runs scripts; nothing else is a page."""
    return {
        "x-request-id": request_id,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "content-security-policy": _DOCS_POLICY if path.startswith("/docs") else _API_POLICY,
    }


class EnvelopeMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _PLAIN.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        extra = [
            (name.encode(), value.encode())
            for name, value in envelope_headers(scope["path"], request_id).items()
        ]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        token = REQUEST_ID.set(request_id)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            REQUEST_ID.reset(token)
