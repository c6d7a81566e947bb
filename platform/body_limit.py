"""Bounds request bodies: how large, how deep, how slow. Uploads are bounded where they are
received. Pure ASGI.
"""

from __future__ import annotations

import asyncio
import re

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = ("POST", "/v1/adapters")
MAX_DEPTH = 64  # of objects and lists within each other
BODY_TIMEOUT_S = 60.0
LARGE = 1 << 18  # bytes; scanned in a worker thread

# A string that does not end reaches to the end of the body, and nothing is tried twice: else one
# that is cut off behind many escaped quotes would take time by the square of its length.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


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
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
        chunks: list[bytes] = []
        received = 0
        is_whole = False

        async def bounded() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            message = {"type": "http.request"} if too_large else await _by(deadline, receive)
            if message["type"] != "http.request":
                return message
            chunk: bytes = message.get("body", b"")  # type: ignore[assignment]
            received += len(chunk)
            if too_large or received > self._max_bytes:
                raise HTTPException(
                    413,
                    f"the request body exceeds {self._max_bytes} bytes; "
                    "raise LORAPLEX_MAX_BODY_BYTES to allow it",
                )
            chunks.append(chunk)
            if not message.get("more_body", False):
                is_whole = True
                await _check_depth(b"".join(chunks))
                chunks.clear()
            return message

        await self._app(scope, bounded, send)


async def _by(deadline: float, receive: Receive) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            return await receive()
    except TimeoutError:
        raise HTTPException(
            408, f"the request body did not arrive within {BODY_TIMEOUT_S:g} s"
        ) from None


async def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return  # not that many, so not that deep
    deep = await asyncio.to_thread(is_too_deep, body) if len(body) > LARGE else is_too_deep(body)
    if deep:
        raise HTTPException(
            400, f"the JSON body has more than {MAX_DEPTH} objects and lists within each other"
        )


def is_too_deep(body: bytes) -> bool:
    """Brackets outside of strings, as JSON has them; what is no JSON is refused by its parser."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(body):
        mark = body[found.start()]
        if mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif mark in b"]}":
            depth -= 1
    return False
