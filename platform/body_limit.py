"""Bounds request bodies; uploads are bounded where they are received. Pure ASGI."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = ("POST", "/v1/adapters")


class BodyLimitMiddleware:
    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) == UPLOAD:
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        too_large = declared.isdigit() and int(declared) > self._max_bytes
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = {"type": "http.request"} if too_large else await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if too_large or received > self._max_bytes:
                    raise HTTPException(
                        413,
                        f"the request body exceeds {self._max_bytes} bytes; "
                        "raise LORAPLEX_MAX_BODY_BYTES to allow it",
                    )
            return message

        await self._app(scope, bounded, send)
