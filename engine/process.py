"""The engine process: takes messages between steps, sends each step's news in one message.

    python -m loraplex.engine.process    (started by engine/client.py, which holds its input)

There is one busy thread. While there is work nothing waits; while there is none the process sleeps
on its socket, and on a bell that other threads of the engine may ring. Signals are left to the
parent, whose death ends this process too. It knows the engine only by the protocol below.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol, cast

import zmq

from loraplex.engine.api import (
    AdapterEvent,
    Answer,
    Call,
    Cancel,
    EngineStats,
    ErrorInfo,
    Failed,
    FromEngine,
    GenerationRequest,
    Heartbeat,
    MemoryInfo,
    ModelInfo,
    Outputs,
    Progress,
    Ready,
    SequenceOutput,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineError, ModelError
from loraplex.engine.flight_recorder import FlightRecorder, Hand
from loraplex.engine.wire import (
    LaunchOrder,
    decode_order,
    decode_to_engine,
    encode,
    error_to_wire,
    new_socket,
)

_BEAT_S = 1.0  # heartbeats, and stats when there was work
_COLLECT_S = 30.0  # a busy engine collects garbage so seldom, an idle one at its next beat
_LAST_WORDS_MS = 2000  # how long the exit waits for messages to leave

OnProgress = Callable[[str, int, int], None]


class EngineLoop(Protocol):
    """What this process asks of an engine; `engine/engine.py` is the real one. Called from one
    thread.
    """

    on_wake: Callable[[], None]  # called, in any thread, when a sleep of `idle_s` is over early
    on_run: Callable[[list[str]], None]  # called with the requests of all steps in flight

    @property
    def model(self) -> ModelInfo: ...

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. One that cannot run gets an output with an error, at the next step."""
        ...

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Free what they hold at once; ids that are not alive are ignored."""
        ...

    def call(self, call: Call) -> None:
        """Begin a call; its answer comes out of `take_answers`, now or later."""
        ...

    def step(self) -> list[SequenceOutput]:
        """Run what can run now; returns quickly when that is nothing."""
        ...

    def idle_s(self) -> float | None:
        """How long the loop may sleep unless a message comes or `on_wake` is called: 0 = step at
        once, None = for ever.
        """
        ...

    def take_events(self) -> list[AdapterEvent]: ...

    def take_answers(self) -> list[Answer]: ...

    def memory(self) -> MemoryInfo: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Channel:
    """The engine's ends of the two sockets. A receiver binds and a sender connects, so nothing is
    lost. All methods but `wake` belong to one thread.
    """

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._in = new_socket(self._context, zmq.PULL)
        self._in.bind(to_engine)
        self._out = new_socket(self._context, zmq.PUSH)
        self._out.connect(from_engine)
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._in, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)

    def send(self, message: FromEngine) -> None:
        self._out.send(encode(message), zmq.NOBLOCK)

    def receive(self, wait_s: float) -> Iterator[ToEngine]:
        """The messages that are there, waiting up to `wait_s` seconds for a first one or `wake`."""
        if wait_s > 0:
            self._poller.poll(max(1, int(wait_s * 1000)))
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(4096)
        with contextlib.suppress(zmq.Again):
            while True:
                yield decode_to_engine(self._in.recv(zmq.NOBLOCK))

    def wake(self) -> None:
        """End the sleep in `receive`, or the next one. From any thread."""
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._rope.send(b"!")

    def close(self) -> None:
        self._bell.close()
        self._rope.close()
        self._in.close()
        self._out.close(linger=_LAST_WORDS_MS)
        self._context.term()


def serve(engine: EngineLoop, channel: Channel, recorder: FlightRecorder) -> None:
    """The loop, until the parent says Shutdown."""
    engine.on_run = lambda ids: recorder.hold(Hand.STEPS, map(_serial, ids))
    beat_at = collect_at = time.monotonic()
    steps = steps_told = 0
    while True:
        now = time.monotonic()
        idle_s = engine.idle_s()
        if now >= beat_at:
            beat_at = now + _BEAT_S
            channel.send(Heartbeat(time.time(), steps))
            if steps != steps_told:
                steps_told = steps
                channel.send(Stats(engine.stats()))
                if idle_s is None or now >= collect_at:
                    gc.collect()
                    collect_at = now + _COLLECT_S
        until_beat_s = beat_at - now
        wait_s = until_beat_s if idle_s is None else min(idle_s, until_beat_s)
        if wait_s > 0:
            recorder.rest()
        for message in channel.receive(wait_s):
            recorder.turn()
            match message:
                case Submit():
                    for request in message.requests:
                        recorder.hold(Hand.MESSAGE, [_serial(request.request_id)])
                        engine.add(request)
                    recorder.hold(Hand.MESSAGE, [])
                case Cancel():
                    engine.cancel(message.request_ids)
                case Call():
                    engine.call(message)
                case Shutdown():
                    return
        _send_news(engine, channel)  # a question need not wait for a step
        if engine.idle_s() is not None:
            recorder.turn()
            outputs = engine.step()
            steps += 1
            if outputs:
                channel.send(Outputs(outputs))
            _send_news(engine, channel)


def _send_news(engine: EngineLoop, channel: Channel) -> None:
    for event in engine.take_events():
        channel.send(event)
    for answer in engine.take_answers():
        channel.send(answer)


@lru_cache(maxsize=8192)
def _serial(wire_id: str) -> int:
    """The number that the client ended the request's id with; 0 if somebody else sent it."""
    number = wire_id.rpartition("#")[2]
    return int(number) if number.isdecimal() else 0


def _build(order: LaunchOrder, on_progress: OnProgress) -> EngineLoop:
    module_name, _, function_name = order.factory.partition(":")
    build = getattr(importlib.import_module(module_name), function_name)
    factory = cast("Callable[[EngineConfig, OnProgress], EngineLoop]", build)
    return factory(order.config, on_progress)


def _failure(error: Exception) -> Failed:
    if isinstance(error, EngineError):
        return Failed(error_to_wire(error))
    message = f"the engine could not start: {type(error).__name__}: {error}"
    return Failed(ErrorInfo(ModelError.code, message, ModelError.code))


def _die_with_parent(parent_pid: int) -> None:
    """However the parent ends, even by SIGKILL: no orphan keeps the device.

    A thread sleeps on standard input, which ends with the parent. On Linux the kernel kills us as
    well, which works also while the interpreter is stuck.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before that
            os._exit(1)

    def watch() -> None:
        while os.read(0, 64):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> int:
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        order = decode_order(stdin.readline())
    _die_with_parent(order.parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends these to both processes
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    channel = Channel(order.to_engine, order.from_engine)
    try:
        engine = _build(
            order, lambda phase, done, total: channel.send(Progress(phase, done, total))
        )
    except Exception as error:
        if not isinstance(error, EngineError):
            traceback.print_exc()
        channel.send(_failure(error))
        channel.close()
        return 1
    # What was built stays for ever: out of the collector's sight. From here on it runs between
    # steps.
    gc.collect()
    gc.freeze()
    gc.disable()
    engine.on_wake = channel.wake
    recorder = FlightRecorder(order.record)
    recorder.beat_for_ever()
    channel.send(Ready(engine.model, engine.memory()))
    try:
        serve(engine, channel, recorder)
    finally:
        engine.close()
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
