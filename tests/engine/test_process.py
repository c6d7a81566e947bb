"""The engine process's loop over real sockets, and its manners towards its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from loraplex.engine.api import (
    Answer,
    Call,
    Cancel,
    ErrorInfo,
    Failed,
    FinishReason,
    FromEngine,
    GenerationRequest,
    Heartbeat,
    Outputs,
    Progress,
    Ready,
    SamplingParams,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import AdapterUnavailable, EngineError, QueueFull
from loraplex.engine.flight_recorder import FlightRecord, FlightRecorder
from loraplex.engine.process import Channel, serve
from loraplex.engine.wire import (
    LaunchOrder,
    decode_from_engine,
    decode_order,
    encode,
    encode_order,
    error_from_wire,
    error_to_wire,
    new_socket,
)

HERE = Path(__file__).parent


class Parent:
    """The parent's ends of the sockets."""

    def __init__(self, directory: Path) -> None:
        self.to_engine = f"ipc://{directory}/to-engine"
        self.from_engine = f"ipc://{directory}/from-engine"
        self.record_path = directory / "record"
        self.record = FlightRecord(self.record_path)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._in = new_socket(self._context, zmq.PULL)
        self._in.bind(self.from_engine)
        self._out = new_socket(self._context, zmq.PUSH)
        self._out.connect(self.to_engine)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self._out.send(encode(message))

    def next(self) -> FromEngine:
        assert self._in.poll(20_000), "the engine says nothing"
        return decode_from_engine(self._in.recv())

    def until(self, wanted: Callable[[Any], bool]) -> list[FromEngine]:
        """All messages up to the first that is wanted, with it."""
        messages = [self.next()]
        while not wanted(messages[-1]):
            messages.append(self.next())
        return messages

    def close(self) -> None:
        self._in.close()
        self._out.close()
        self._context.term()
        self.record.close()


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    parent = Parent(tmp_path)
    yield parent
    parent.close()


@pytest.fixture
def engine(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fake engine that `serve` runs in a thread."""
    monkeypatch.syspath_prepend(str(HERE))
    import fake_engine

    engine = fake_engine.FakeEngine(EngineConfig(model="fake", adapter_dir=Path("x")))
    channel = Channel(parent.to_engine, parent.from_engine)
    recorder = FlightRecorder(parent.record_path)
    thread = threading.Thread(target=serve, args=(engine, channel, recorder))
    thread.start()
    yield engine
    parent.send(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    channel.close()


def request(name: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompt_token_ids=[97, 98], sampling=SamplingParams(**sampling)
    )


def test_one_message_carries_the_news_of_all_requests_of_a_step(parent: Parent, engine: Any):
    parent.send(Submit([request(name, max_tokens=3) for name in "abc"]))
    outputs = []
    while len(outputs) < 3:
        message = parent.next()
        if isinstance(message, Outputs):
            outputs.append(message.outputs)
    assert [[output.request_id for output in step] for step in outputs] == [["a", "b", "c"]] * 3
    assert [output.finish_reason for output in outputs[-1]] == [FinishReason.LENGTH] * 3


def test_messages_are_taken_between_steps(parent: Parent, engine: Any):
    parent.send(Submit([request("endless")]))
    parent.until(lambda message: isinstance(message, Outputs))
    parent.send(Call(7, "requests"), Cancel(["endless"]))
    messages = parent.until(
        lambda message: isinstance(message, Outputs) and message.outputs[0].finish_reason
    )
    last = messages[-1]
    assert isinstance(last, Outputs)
    assert last.outputs[0].finish_reason is FinishReason.ABORT
    assert [message.call_id for message in messages if isinstance(message, Answer)] == [7]


def test_stats_come_while_there_is_work_and_once_after_it(parent: Parent, engine: Any):
    parent.send(Submit([request("a", max_tokens=2)]))
    messages = parent.until(
        lambda message: isinstance(message, Stats) and message.stats.num_running == 0
    )
    assert any(isinstance(message, Outputs) for message in messages)
    for _ in range(2):  # idle again: signs of life, no stats
        assert isinstance(parent.next(), Heartbeat)


def test_the_record_tells_what_is_in_hand_and_since_when(parent: Parent, engine: Any):
    parent.send(Submit([request("a#5"), request("b#7"), request("without a number")]))
    parent.until(lambda message: isinstance(message, Outputs))
    while not parent.record.in_hand() >= {5, 7}:
        parent.until(lambda message: isinstance(message, Outputs))
    pulse = parent.record.pulse()
    assert pulse is not None
    assert pulse.turn_s is not None
    parent.send(Cancel(["a#5", "b#7", "without a number"]))
    parent.until(lambda message: isinstance(message, Heartbeat))
    while parent.record.in_hand():
        parent.until(lambda message: isinstance(message, Heartbeat))
    pulse = parent.record.pulse()
    assert pulse is not None
    assert pulse.turn_s is None, "it sleeps, but its turn is not over"


def test_an_idle_engine_sleeps(parent: Parent, engine: Any):
    """It looks up for its heartbeat only: a loop that polls would look thousands of times."""
    parent.until(lambda message: isinstance(message, Heartbeat))
    before = engine.idle_looks
    for _ in range(2):
        parent.until(lambda message: isinstance(message, Heartbeat))
    assert engine.idle_looks - before <= 10
    assert engine.steps == 0


def test_a_bell_from_another_thread_ends_a_sleep(parent: Parent) -> None:
    channel = Channel(parent.to_engine + "2", parent.from_engine)
    for _ in range(2):
        ringer = threading.Thread(target=channel.wake)
        ringer.start()
        assert list(channel.receive(1000)) == []  # would exceed the test's time limit
        ringer.join()
    for _ in range(100_000):  # more than the bell can hold
        channel.wake()
    channel.close()


def test_errors_keep_class_and_code_on_the_way():
    plain = QueueFull("full")
    special = AdapterUnavailable("gone", code="adapter_not_found")
    for error in (plain, special):
        back = error_from_wire(error_to_wire(error))
        assert type(back) is type(error)
        assert (back.code, back.message) == (error.code, error.message)
    assert type(error_from_wire(ErrorInfo("queue_full", "full"))) is QueueFull
    assert type(error_from_wire(ErrorInfo("strange", "?"))) is EngineError


def test_the_launch_order_survives_the_way():
    config = EngineConfig(model="m", adapter_dir=Path("a b/ü"), kv_cache_memory=5, dtype="float32")
    order = LaunchOrder("x:y", config, "ipc://a", "ipc://b", Path("c d"), 1)
    line = encode_order(order)
    assert line.count(b"\n") == 1
    assert decode_order(line) == order


# --- the process itself -----------------------------------------------------------------------


@pytest.fixture
def launch(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    started: list[subprocess.Popen[bytes]] = []

    def launch(model: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loraplex.engine.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        config = EngineConfig(model=model, adapter_dir=Path("x"))
        order = LaunchOrder(
            "fake_engine:build",
            config,
            parent.to_engine,
            parent.from_engine,
            parent.record_path,
            os.getpid(),
        )
        assert process.stdin is not None
        process.stdin.write(encode_order(order))
        process.stdin.flush()
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def test_starts_tells_and_ends_on_shutdown(parent: Parent, launch: Any):
    process = launch("fake")
    messages = parent.until(lambda message: isinstance(message, Ready))
    assert [m.done for m in messages if isinstance(m, Progress)] == [1, 2]
    parent.send(Shutdown())
    assert process.wait(10) == 0


def test_a_failed_start_is_told_before_the_exit(parent: Parent, launch: Any):
    process = launch("fake:unsupported")
    failed = parent.until(lambda message: isinstance(message, Failed))[-1]
    assert isinstance(failed, Failed)
    assert failed.error.code == "model_unsupported"
    assert "--max-model-len" in failed.error.message
    assert process.wait(10) == 1


def test_signals_are_the_parents_business(parent: Parent, launch: Any):
    """Ctrl-C and a service manager signal both processes; the parent may want to finish streams."""
    process = launch("fake")
    parent.until(lambda message: isinstance(message, Ready))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    parent.send(Submit([request("a", max_tokens=1)]))
    parent.until(lambda message: isinstance(message, Outputs))
    parent.send(Shutdown())
    assert process.wait(10) == 0


@pytest.mark.parametrize("model", ["fake", "fake:slow"])
def test_the_end_of_its_input_is_the_end(parent: Parent, launch: Any, model: str):
    """So a parent's death looks where the kernel has no signal for it; also while loading."""
    process = launch(model)
    parent.until(lambda message: isinstance(message, Progress | Ready))
    process.stdin.close()
    assert process.wait(10) == 1
