"""uvicorn's HTTP protocol with what it lacks towards strangers: bounds on a request's head, in
bytes and in time, and a way to drop a connection whose reader has stalled.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraplex.platform import errors
from loraplex.platform.responses import ABORT

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
LINGER_S = 0.5
# Longer than clients and proxies keep idle connections (5 to 60 s): who closes first must be the
# client, or a request that it sends at that moment is lost with a reset connection.
KEEP_ALIVE_S = 75


class BoundedProtocol(HttpToolsProtocol):
    """A head is request line and headers. It must be there within `HEAD_TIMEOUT_S` of the
    connection's start, or of its first byte on a connection that is kept.
    """

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # what is on its way still; closing now would take the answer back
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]
        if not self._in_head:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def _expect_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_there(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self.transport.abort()

    def _refuse_head(self) -> None:
        message = f"the request's head exceeds {MAX_HEAD_BYTES} bytes"
        body = json.dumps(errors.body(431, "headers_too_large", message)).encode()
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self._refused = True
        self._head_is_there()
        self.transport.write(head.encode() + body)
        self.loop.call_later(LINGER_S, self.transport.close)
