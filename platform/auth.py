"""Who may call: optional API keys as `Authorization: Bearer`, compared in constant time. Pure ASGI.

Open without a key, for probes, scrapers and people reading the docs: /healthz /readyz /metrics
/version /docs /openapi.json. They tell nothing of prompts; whoever wants them closed puts a proxy
in front.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.platform import errors

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/version", "/docs", "/openapi.json"})
ANONYMOUS = "anonymous"


class ApiKeyMiddleware:
    """Sets `scope["state"]["actor"]`, whom the audit log names: anonymous without keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [(_hash(key), f"key:{_hash(key).hex()[:8]}") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        actor: str | None = ANONYMOUS
        if self._keys and scope["path"] not in OPEN_PATHS:
            actor = self._actor(Headers(scope=scope).get("authorization", ""))
        if actor is None:
            message = "a valid API key is needed: send it as `Authorization: Bearer KEY`"
            response = JSONResponse(
                errors.body(401, "invalid_api_key", message),
                401,
                headers=errors.headers(401, "invalid_api_key"),
            )
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["actor"] = actor
        await self._app(scope, receive, send)

    def _actor(self, header: str) -> str | None:
        scheme, _, key = header.partition(" ")
        given = _hash(key.strip())
        # Every key is compared, and digests at that: the time says nothing about any of them.
        matches = [actor for known, actor in self._keys if hmac.compare_digest(known, given)]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
