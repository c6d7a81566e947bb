"""A server on loopback that pulls ask: files with entity tags and ranges, and every way of behaving
badly that a test orders.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request], Any]


class SourceServer:
    """`files` are served under their path; `answers` take a path over."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}
        self.requests: list[web.Request] = []
        self.drops: dict[str, list[int]] = {}  # path -> after how many bytes of a body to hang up
        self.resumable = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def asked(self, path: str) -> list[web.Request]:
        return [request for request in self.requests if request.path == path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if request.path in self.answers:
            answer: web.StreamResponse = await self.answers[request.path](request)
            return answer
        data = self.files.get(request.path)
        if data is None:
            raise web.HTTPNotFound
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        start, headers = 0, {"ETag": tag} if self.resumable else {}
        wanted = request.headers.get("Range", "")
        if wanted and self.resumable and request.headers.get("If-Range") == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        drops = self.drops.get(request.path)
        if drops:
            await response.write(body[: drops.pop(0)])
            await asyncio.sleep(0.02)  # so that what was written arrives before the hang-up
            assert request.transport is not None
            request.transport.abort()
            return response
        half = len(body) // 2
        await response.write(body[:half])
        await self.gate.wait()
        await response.write(body[half:])
        return response


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[SourceServer]:
    server = SourceServer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        server.gate.set()
        await runner.cleanup()
