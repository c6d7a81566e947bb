"""How long requests may take, and how they end when the server stops or their reader stalls.

RequestExpired   the request's deadline passed
ServerStopping   the server was told to stop, and the grace it gives has passed
ClientStalled    the client does not read: nobody can be told

The first two end a request like any error of the engine: an answer of its own, or the last event of
a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Send

from loraplex.engine.errors import EngineError


class RequestExpired(EngineError):
    code = "request_timeout"


class ServerStopping(EngineError):
    code = "server_stopping"


class ClientStalled(Exception):
    pass


class Lifetimes:
    """For one event loop: every generation that runs is within `limited`."""

    def __init__(self, deadline_s: float, stall_s: float) -> None:
        self._deadline_s = deadline_s
        self._stall_s = stall_s
        self._running: set[asyncio.Timeout] = set()
        self._stopping = False

    def stop(self) -> None:
        """End everything that runs, now; what begins later ends at once."""
        self._stopping = True
        now = asyncio.get_running_loop().time()
        for timeout in self._running:
            timeout.reschedule(now)

    @asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Raises: RequestExpired | ServerStopping, in the body or behind it."""
        timeout = asyncio.timeout(0 if self._stopping else self._deadline_s)
        try:
            async with timeout:
                self._running.add(timeout)
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            if self._stopping:
                raise ServerStopping("the server is stopping; send the request again") from None
            raise RequestExpired(
                f"the request took longer than {self._deadline_s:g} s, this server's limit"
            ) from None
        finally:
            self._running.discard(timeout)

    def guarded(self, send: Send) -> Send:
        """`send`, which waits for a client that reads nothing only so long. What is produced
        meanwhile is gathered per sequence, so a stalled client holds no more than its answer.

        Raises: ClientStalled.
        """

        async def guarded_send(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                raise ClientStalled from None

        return guarded_send

    def __len__(self) -> int:
        return len(self._running)
