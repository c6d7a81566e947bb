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
        self._sending: set[Sending] = set()
        self._watchdog: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """End everything that runs, now; what begins later ends at once."""
        self._stopping = True
        now = asyncio.get_running_loop().time()
        for timeout in self._running:
            if not timeout.expired():  # else it is on its way out already
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

    def guarded(self, send: Send) -> Sending:
        """`send`, which waits for a client that reads nothing only so long. What is produced
        meanwhile is gathered per sequence, so a stalled client holds no more than its answer.

        Raises: ClientStalled. To be given to `release` at the end.
        """
        sending = Sending(send, asyncio.get_running_loop())
        self._sending.add(sending)
        if self._watchdog is None:
            self._watch()
        return sending

    def release(self, sending: Sending) -> None:
        """Nothing more is sent with it."""
        self._sending.discard(sending)

    def _watch(self) -> None:
        """One timer for all: to arm one for each token would cost more than to send it."""
        self._watchdog = None
        loop = asyncio.get_running_loop()
        for sending in self._sending:
            sending.check(loop.time() - self._stall_s)
        if self._sending:
            self._watchdog = loop.call_later(self._stall_s / 4, self._watch)

    def __len__(self) -> int:
        return len(self._running)


class Sending:
    """One answer on its way to its client."""

    __slots__ = ("_loop", "_send", "_since", "_stalled", "_task")

    def __init__(self, send: Send, loop: asyncio.AbstractEventLoop) -> None:
        self._send = send
        self._loop = loop
        self._since: float | None = None
        self._task: asyncio.Task[object] | None = None
        self._stalled = False

    async def __call__(self, message: Message) -> None:
        self._since, self._task = self._loop.time(), asyncio.current_task()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._stalled or self._task is None or self._task.uncancel() > 0:
                raise  # somebody else wants it to end, too
            raise ClientStalled from None
        finally:
            self._since = self._task = None

    def check(self, limit: float) -> None:
        """Give up what has not been sent since before `limit`."""
        if self._since is not None and self._since < limit and self._task is not None:
            self._stalled = True
            self._task.cancel()
