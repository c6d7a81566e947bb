"""The API process's side of the engine: streams of text, calls, events, and supervision. No torch.

One reader callback takes every message off the socket and hands each request's news to its stream;
there is no task per token or per request. A dead or silent engine process fails what was running
and is started again with growing pauses. It knows nothing of HTTP, tenants or adapters' names.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from loraplex.engine.api import (
    AdapterEvent,
    AdapterProbe,
    AdapterResidencyInfo,
    Answer,
    Call,
    Cancel,
    EngineStats,
    Failed,
    FreedBytes,
    FromEngine,
    GenerationRequest,
    Heartbeat,
    MemoryInfo,
    ModelInfo,
    Outputs,
    Progress,
    Ready,
    RequestInfo,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from loraplex.engine.child_process import ChildProcess, Death
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineDead, EngineError
from loraplex.engine.stream import Stream, TextChunk
from loraplex.engine.tokenizer import Tokenizer
from loraplex.engine.wire import (
    LaunchOrder,
    decode_from_engine,
    encode,
    error_from_wire,
    new_socket,
)

T = TypeVar("T")

Event = AdapterEvent | Stats

_FACTORY = "loraplex.engine.build:build_engine"
_MAX_FAILURES = 5  # in a row; then the machine or the model is at fault and a person must look
_STEADY_S = 60.0  # an engine that lived so long had started well


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class EngineClient:
    """Everything is called on the event loop that called `start`.

    Args:
        on_progress: start-up news (phase, done, total).
        on_log: each line that the engine process prints; default: to standard error.
        factory: "module:function" that builds the engine in the other process.
        restart_delay_s: pause before the first restart; doubles with each failure in a row.
        hang_timeout_s: an engine that says nothing for so long is killed. A step says nothing while
            it runs, and on a slow machine with a large model a step is long.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_log: Callable[[str], None] = _to_stderr,
        factory: str = _FACTORY,
        restart_delay_s: float = 1.0,
        hang_timeout_s: float = 300.0,
    ) -> None:
        self.info: ModelInfo | None = None  # known once the model was loaded; stays over restarts
        self.startup_memory: MemoryInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.last_stats: EngineStats | None = None
        self.ready = False
        self.failure: str | None = None  # why the engine will not come back by itself
        self.num_restarts = 0
        self._config = config
        self._factory = factory
        self._on_progress = on_progress
        self._on_log = on_log
        self._restart_delay_s = restart_delay_s
        self._hang_timeout_s = hang_timeout_s
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._next_serial = 0
        self._callbacks: list[Callable[[Event], None]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._link: _Link | None = None
        self._child: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._last_heard = 0.0
        self._start_error: EngineError | None = None
        self._stopping = False

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine process; returns when it is ready.

        Raises: ModelError (or another EngineError) with the engine's own words when the model
        cannot be served, EngineDead when the process dies on the way.
        """
        assert self._supervisor is None, "started twice"
        self._context = zmq.Context()
        started = self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="loraplex-supervisor")
        try:
            await asyncio.wait((started, self._supervisor), return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                self._supervisor.result()  # our bug: it ended without a word
            started.result()
        except BaseException:
            await self.stop(deadline_s=0)
            raise

    async def stop(self, *, deadline_s: float = 5.0) -> None:
        """Ask the engine to go, kill it after the deadline. What runs ends with EngineDead."""
        self._stopping = True
        self.ready = False
        self._fail_all(EngineDead("the server is shutting down"))
        supervisor = self._supervisor
        if supervisor is not None:
            if self._child is not None and deadline_s > 0:
                self._send(Shutdown())
                await asyncio.wait((supervisor,), timeout=deadline_s)
            supervisor.cancel()
            await asyncio.wait((supervisor,))
            self._supervisor = None
        if self._started is not None:
            self._started.cancel()
        if self._context is not None:
            self._context.term()
            self._context = None

    # --- generation ------------------------------------------------------------------------------

    async def generate(
        self,
        request: GenerationRequest,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> AsyncGenerator[TextChunk, None]:
        """The request's text as it comes. Closing the generator early cancels the request at once.

        Several steps' news come in one chunk when the consumer is behind. `stop`: strings that end
        the text (`include_stop`: and stay in it). Raises: the EngineError that the engine reports,
        also in the middle; EngineDead when it dies.
        """
        stream = Stream(
            request,
            self._require_ready(),
            stop=stop,
            include_stop=include_stop,
            skip_special_tokens=skip_special_tokens,
        )
        # Its own id on the wire: late news of a cancelled request must not reach a namesake.
        self._next_serial += 1
        wire_id = f"{request.request_id}#{self._next_serial}"
        self._streams[wire_id] = stream
        self._send(Submit([msgspec.structs.replace(request, request_id=wire_id)]))
        try:
            while True:
                chunk = await stream.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._streams.pop(wire_id, None) is not None:  # nobody wants the rest
                self._send(Cancel([wire_id]))

    # --- calls -----------------------------------------------------------------------------------

    async def memory(self) -> MemoryInfo:
        return await self._call(MemoryInfo, "memory")

    async def stats(self) -> EngineStats:
        return await self._call(EngineStats, "stats")

    async def requests(self) -> list[RequestInfo]:
        infos = await self._call(list[RequestInfo], "requests")
        return [
            msgspec.structs.replace(info, request_id=info.request_id.rpartition("#")[0])
            for info in infos
        ]

    async def adapters(self) -> list[AdapterResidencyInfo]:
        """Those the engine has state for; the others are on disk only."""
        return await self._call(list[AdapterResidencyInfo], "adapters")

    async def load(self, digest: str, *, wait: bool = True) -> AdapterResidencyInfo:
        return await self._call(AdapterResidencyInfo, "load", digest=digest, wait=wait)

    async def evict(
        self,
        digest: str,
        *,
        tier: str = "device",
        drain: bool = False,
        timeout_s: float | None = None,
    ) -> FreedBytes:
        return await self._call(
            FreedBytes, "evict", digest=digest, tier=tier, drain=drain, timeout_s=timeout_s
        )

    async def pin(self, digest: str) -> AdapterResidencyInfo:
        return await self._call(AdapterResidencyInfo, "pin", digest=digest)

    async def unpin(self, digest: str) -> AdapterResidencyInfo:
        return await self._call(AdapterResidencyInfo, "unpin", digest=digest)

    async def forget(
        self, digest: str, *, force: bool = False, timeout_s: float | None = None
    ) -> FreedBytes:
        return await self._call(
            FreedBytes, "forget", digest=digest, force=force, timeout_s=timeout_s
        )

    async def probe(self, digest: str, *, timeout_s: float | None = None) -> AdapterProbe:
        """Compare what the adapter does in the engine with its files; loads it first, for which
        there is so much time.
        """
        return await self._call(AdapterProbe, "probe", digest=digest, timeout_s=timeout_s)

    async def reset_prefix_cache(self) -> bool:
        return await self._call(bool, "reset_prefix_cache")

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """`callback` gets every AdapterEvent and Stats from now on; it must be quick."""
        self._callbacks.append(callback)

    async def _call(self, result_type: type[T], method: str, **arguments: Any) -> T:
        self._require_ready()
        self._next_serial += 1
        call_id = self._next_serial
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Call(call_id, method, **arguments))
            return msgspec.msgpack.decode(await future, type=result_type)
        finally:
            self._calls.pop(call_id, None)

    # --- messages --------------------------------------------------------------------------------

    def _require_ready(self) -> Tokenizer:
        if self.ready and self.tokenizer is not None:
            return self.tokenizer
        if self.failure is not None:
            raise EngineDead(f"the engine is down for good: {self.failure}")
        raise EngineDead("the engine is starting or restarting; try again in a few seconds")

    def _send(self, message: ToEngine) -> None:
        assert self._link is not None, "no engine to send to"
        self._link.send(message)

    def _receive(self, message: FromEngine) -> None:
        self._last_heard = time.monotonic()
        match message:
            case Outputs():
                self._dispatch(message)
            case Stats():
                self.last_stats = message.stats
                self._tell(message)
            case AdapterEvent():
                self._tell(message)
            case Answer():
                self._answer(message)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message.phase, message.done, message.total)
            case Ready():
                self._become_ready(message)
            case Failed():
                self._start_error = error_from_wire(message.error)
            case Heartbeat():
                pass

    def _dispatch(self, message: Outputs) -> None:
        streams = self._streams
        cancelled: list[str] = []
        for output in message.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                continue  # cancelled a moment ago
            if output.error is not None:
                stream.fail(error_from_wire(output.error))
            else:
                stream.feed(output)
            if stream.ended:
                del streams[output.request_id]
                if output.finish_reason is None:  # a stop string, which the engine cannot know
                    cancelled.append(output.request_id)
        if cancelled:
            self._send(Cancel(cancelled))

    def _answer(self, message: Answer) -> None:
        future = self._calls.get(message.call_id)
        if future is None or future.done():
            return  # the caller has gone
        if message.error is not None:
            future.set_exception(error_from_wire(message.error))
        else:
            future.set_result(bytes(message.result))

    def _tell(self, event: Event) -> None:
        for callback in self._callbacks:
            callback(event)

    def _become_ready(self, message: Ready) -> None:
        if self.info is None or self.info.tokenizer_json != message.model.tokenizer_json:
            self.tokenizer = Tokenizer.from_info(message.model)
        self.info = message.model
        self.startup_memory = message.memory
        self.ready = not self._stopping
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _fail_all(self, error: EngineDead) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(error)

    # --- supervision -----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            self._start_error = None
            death = await self._run_engine()
            if self._stopping:
                return
            error = self._start_error or EngineDead(f"the engine process died: {death}")
            if self._started is not None and not self._started.done():
                self._started.set_exception(error)
                return
            failures = 1 if time.monotonic() - began > _STEADY_S else failures + 1
            if failures >= _MAX_FAILURES:
                self.failure = f"{failures} failures in a row; the last: {error.message}"
                self._on_log(f"engine: giving up after {self.failure}")
                return
            delay_s = self._restart_delay_s * 2 ** (failures - 1)
            self._on_log(f"engine: {error.message}\nengine: restarting in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            self.num_restarts += 1

    async def _run_engine(self) -> Death:
        """One engine process from start to end, whatever ends it."""
        assert self._context is not None
        directory = Path(tempfile.mkdtemp(prefix="loraplex-"))  # 0700: nobody else may connect
        link = self._link = _Link(self._context, directory, self._receive)
        child: ChildProcess | None = None
        watchdog: asyncio.Task[None] | None = None
        try:
            order = LaunchOrder(
                self._factory, self._config, link.to_engine, link.from_engine, os.getpid()
            )
            child = self._child = await ChildProcess.start(order, self._on_log)
            watchdog = asyncio.create_task(self._watch(child), name="loraplex-watchdog")
            death = await child.wait()
            link.drain()  # its last words
        finally:
            self.ready = False
            self._child = self._link = None
            link.close()
            shutil.rmtree(directory, ignore_errors=True)
            if watchdog is not None:
                watchdog.cancel()
            if child is not None:
                await child.kill()
        self._fail_all(EngineDead(f"the engine process died ({death.how}) and is restarted"))
        return death

    async def _watch(self, child: ChildProcess) -> None:
        """Kill an engine that has been silent for too long."""
        silent_s = 0.0
        while silent_s < self._hang_timeout_s:
            await asyncio.sleep(self._hang_timeout_s - silent_s)
            # A model that loads may be silent for as long as it likes: a download, a slow disk.
            silent_s = time.monotonic() - self._last_heard if self.ready else 0.0
        self._on_log(f"engine: no sign of life for {silent_s:.0f} s, killing it")
        await child.kill()


class _Link:
    """The two sockets to one engine process, and the callback that empties the incoming one.

    The receiver binds and the sender connects: a connected socket queues what is sent before the
    other side is there.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: Path,
        receive: Callable[[FromEngine], None],
    ) -> None:
        self.to_engine = f"ipc://{directory}/to-engine"
        self.from_engine = f"ipc://{directory}/from-engine"
        self._receive = receive
        self._in = new_socket(context, zmq.PULL)
        self._in.bind(self.from_engine)
        self._out = new_socket(context, zmq.PUSH)
        self._out.connect(self.to_engine)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._in.FD, self.drain)
        self._loop.call_soon(self.drain)  # the descriptor tells of changes only

    def send(self, message: ToEngine) -> None:
        self._out.send(encode(message), zmq.NOBLOCK)

    def drain(self) -> None:
        """Take all that has come: the descriptor stays quiet until something new comes after it."""
        try:
            while not self._in.closed:
                self._receive(decode_from_engine(self._in.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        except Exception:
            self._loop.call_soon(self.drain)  # somebody's callback failed; the rest must not wait
            raise

    def close(self) -> None:
        self._loop.remove_reader(self._in.FD)
        self._in.close()
        self._out.close()
