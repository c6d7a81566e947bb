"""The API process's side of the engine: streams of text, calls, events, and supervision. No torch.

One reader callback takes every message off the socket and hands each request's news to its stream;
there is no task per token or per request. An engine process that dies, stops or hangs is replaced,
and what was running goes on in the new one (`recovery.py`): a stream sees a pause. It knows nothing
of HTTP, tenants or adapters' names.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
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
from loraplex.engine.errors import EngineDead, EngineError, InvalidRequest
from loraplex.engine.flight_recorder import FlightRecord
from loraplex.engine.recovery import Live, Recovery, Supervision
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
_WATCH_S = 0.5


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class EngineClient:
    """Everything is called on the event loop that called `start`.

    Args:
        on_progress: start-up news (phase, done, total).
        on_log: each line that the engine process prints; default: to standard error.
        factory: "module:function" that builds the engine in the other process.
        restart_delay_s: pause before an engine is started that follows one which came to nothing;
            doubles with each of these in a row.
        hang_timeout_s: an engine whose turn of work (a step, mostly) takes so long is killed. On a
            slow machine with a large model a step is long.
        silence_timeout_s: a process whose clock thread was not seen for so long, because it is
            stopped or its interpreter stuck, is killed.
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
        silence_timeout_s: float = 15.0,
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
        self._silence_timeout_s = silence_timeout_s
        self._recovery = Recovery(lambda requests: self._send(Submit(requests)))
        self._pins: set[str] = set()
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._next_serial = 0
        self._callbacks: list[Callable[[Event], None]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._link: _Link | None = None
        self._child: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._start_error: EngineError | None = None
        self._useful = False  # the engine of now has done something for a request
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
        over = EngineDead("the server is shutting down")
        self._recovery.fail_all(over)
        self._fail_calls(over)
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
        the text (`include_stop`: and stay in it). When the engine dies the stream pauses and goes
        on in the next one. Raises: the EngineError that the engine reports, also in the middle;
        EngineDead when there is no engine now or none will come back.
        """
        self._recovery.check(request)
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
        sampling = request.sampling
        if sampling.seed is None:  # drawn here, so that another engine would go on alike
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        on_wire = msgspec.structs.replace(request, request_id=wire_id, sampling=sampling)
        try:
            self._send(Submit([on_wire]))
        except OverflowError as error:  # so it must not become live, to be submitted again
            raise InvalidRequest(f"a number of the request is too large: {error}") from None
        self._recovery.live[wire_id] = Live(self._next_serial, on_wire, stream)
        try:
            while True:
                chunk = await stream.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._recovery.leave(wire_id) is not None and self._link is not None:
                self._send(Cancel([wire_id]))  # nobody wants the rest

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
        """Also lifts its quarantine."""
        self._recovery.release(digest)
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
        """Also in engines to come."""
        info = await self._call(AdapterResidencyInfo, "pin", digest=digest)
        self._pins.add(digest)
        return info

    async def unpin(self, digest: str) -> AdapterResidencyInfo:
        self._pins.discard(digest)
        return await self._call(AdapterResidencyInfo, "unpin", digest=digest)

    async def forget(
        self, digest: str, *, force: bool = False, timeout_s: float | None = None
    ) -> FreedBytes:
        freed = await self._call(
            FreedBytes, "forget", digest=digest, force=force, timeout_s=timeout_s
        )
        self._pins.discard(digest)
        return freed

    async def keep(self, digest: str) -> bool:
        """Take back a `forget` that still waits, if there is one; it then frees nothing."""
        return await self._call(bool, "keep", digest=digest)

    async def probe(self, digest: str, *, timeout_s: float | None = None) -> AdapterProbe:
        """Compare what the adapter does in the engine with its files; loads it first, for which
        there is so much time.
        """
        return await self._call(AdapterProbe, "probe", digest=digest, timeout_s=timeout_s)

    async def reset_prefix_cache(self) -> bool:
        return await self._call(bool, "reset_prefix_cache")

    @property
    def supervision(self) -> Supervision:
        recovery = self._recovery
        return Supervision(self.num_restarts, recovery.num_resumed, dict(recovery.quarantined))

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
        recovery, self._useful = self._recovery, True
        cancelled: list[str] = []
        for output in message.outputs:
            live = recovery.live.get(output.request_id)
            if live is None:
                continue  # cancelled a moment ago
            stream = live.stream
            if output.error is not None:
                stream.fail(error_from_wire(output.error))
            else:
                stream.feed(output)
            if stream.ended:
                recovery.leave(output.request_id)
                if output.finish_reason is None:  # a stop string, which the engine cannot know
                    cancelled.append(output.request_id)
            elif live is recovery.on_trial:
                recovery.try_next()
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
        for digest in self._pins:
            self._order("pin", digest)
            self._order("load", digest)
        self._recovery.back()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _order(self, method: str, digest: str) -> None:
        """A call whose answer nobody waits for."""
        self._next_serial += 1
        self._send(Call(self._next_serial, method, digest=digest, wait=False))

    def _fail_calls(self, error: EngineDead) -> None:
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(error)

    # --- supervision -----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        failures = 0  # engines in a row that came to nothing
        while True:
            self._start_error, self._useful = None, False
            death = await self._run_engine()
            if self._stopping:
                return
            error = self._start_error or EngineDead(f"the engine process died: {death}")
            if self._started is not None and not self._started.done():
                self._started.set_exception(error)
                return
            failures = 0 if self._useful else failures + 1
            if failures >= _MAX_FAILURES:
                self.failure = f"{failures} failures in a row; the last: {error.message}"
                self._on_log(f"engine: giving up after {self.failure}")
                self._recovery.fail_all(EngineDead(f"the engine is down for good: {self.failure}"))
                return
            delay_s = self._restart_delay_s * 2 ** (failures - 1) if failures else 0.0
            self._on_log(
                f"engine: {error.message}\nengine: restarting in {delay_s:g} s, "
                f"{len(self._recovery.live)} requests go on then"
            )
            await asyncio.sleep(delay_s)
            self.num_restarts += 1

    async def _run_engine(self) -> Death:
        """One engine process from start to end, whatever ends it."""
        assert self._context is not None
        directory = Path(tempfile.mkdtemp(prefix="loraplex-"))  # 0700: nobody else may connect
        link = self._link = _Link(self._context, directory, self._receive)
        record = FlightRecord(directory / "record")
        child: ChildProcess | None = None
        watchdog: asyncio.Task[None] | None = None
        try:
            order = LaunchOrder(
                self._factory,
                self._config,
                link.to_engine,
                link.from_engine,
                directory / "record",
                os.getpid(),
            )
            child = self._child = await ChildProcess.start(order, self._on_log)
            watchdog = asyncio.create_task(self._watch(child, record), name="loraplex-watchdog")
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
            in_hand = record.in_hand()
            record.close()
        self._fail_calls(EngineDead(f"the engine process died ({death.how}) and is restarted"))
        self._recovery.died(in_hand, death.how)
        return death

    async def _watch(self, child: ChildProcess, record: FlightRecord) -> None:
        """Kill an engine that is stopped or hangs."""
        while True:
            await asyncio.sleep(_WATCH_S)
            # A model that loads may be silent for as long as it likes: a download, a slow disk.
            pulse = record.pulse() if self.ready else None
            if pulse is None:
                continue
            if pulse.silent_s > self._silence_timeout_s:
                self._on_log(f"engine: no sign of life for {pulse.silent_s:.0f} s, killing it")
                break
            if pulse.turn_s is not None and pulse.turn_s > self._hang_timeout_s:
                self._on_log(f"engine: a step takes {pulse.turn_s:.0f} s already, killing it")
                break
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
