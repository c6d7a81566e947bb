"""Copies beside the steps: bounded, in order, layer by layer. A stand-in plays the CUDA runtime.

The stand-in runs nothing until somebody waits, like a device that is behind: what an event covers
is then visible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from loraplex.adapters.transport import (
    FRAMES_IN_FLIGHT,
    Arrival,
    CudaTransport,
    HostTransport,
    transport_to,
)


class FakeCuda:
    """One log of what was enqueued; `Event.synchronize` lets the device reach that point."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.copied = 0  # enqueued
        self.landed = 0  # the device got that far
        self.most_in_flight = 0
        fake = self

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.at = -1

            def record(self, stream: Any) -> None:
                self.at = fake.copied

            def synchronize(self) -> None:
                fake.landed = max(fake.landed, self.at)

            def query(self) -> bool:
                return fake.landed >= self.at

            def wait(self) -> None:
                fake.log.append(f"step waits for {self.at} copies")

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                fake.log.append("fence")

        self.Event, self.Stream = Event, Stream

    def current_stream(self, device: Any) -> str:
        return "main"

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def target(self) -> Any:
        fake = self

        class Target:
            def copy_(self, source: Any, non_blocking: bool) -> None:
                assert non_blocking
                fake.log.append(f"copy {source}")
                fake.copied += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.copied - fake.landed)

        return Target()


def send(
    cuda: FakeCuda, last_copies: list[int], num_copies: int, on_head: Callable[[], None]
) -> Arrival:
    transport = CudaTransport(torch.device("cpu"), cuda)
    arrival = transport.expect(len(last_copies))
    assert arrival is not None
    copies: Any = [(cuda.target(), i) for i in range(num_copies)]
    transport.send(arrival, copies, last_copies, on_head)
    return arrival


def test_frames_go_in_order_after_the_fence_and_never_many_at_once() -> None:
    cuda = FakeCuda()
    arrival = send(cuda, list(range(8)), 8, lambda: None)
    assert cuda.log == ["fence", *(f"copy {i}" for i in range(8))]
    assert cuda.most_in_flight == FRAMES_IN_FLIGHT
    assert arrival.is_complete


@pytest.mark.parametrize(
    ("last_copies", "num_copies", "landed_at_least"),
    [
        (list(range(8)), 8, 2),  # a frame a layer: layers 0 and 1 of 8
        ([1, 3, 5, 7], 8, 2),  # two frames a layer
        ([0, 0, 0, 0], 1, 1),  # all in one frame
        ([-1, -1, -1, 0], 1, 1),  # only the last layer is adapted
        ([-1, 0, 0, 1, 1, 1, 1, 1], 2, 1),
        ([0], 1, 1),
    ],
)
def test_a_step_may_begin_when_the_first_layers_have_landed(
    last_copies: list[int], num_copies: int, landed_at_least: int
) -> None:
    cuda, landed = FakeCuda(), []
    send(cuda, last_copies, num_copies, lambda: landed.append(cuda.landed))
    assert len(landed) == 1, "said once"
    assert landed[0] >= landed_at_least
    if num_copies >= 8:
        assert landed[0] < num_copies, "not only at the end"


def test_a_step_waits_for_just_its_layer() -> None:
    cuda = FakeCuda()
    arrival = send(cuda, [1, 1, 4], 5, lambda: None)
    cuda.log.clear()
    for layer in range(3):
        arrival.wait(layer)
    assert cuda.log == [f"step waits for {n} copies" for n in (2, 2, 5)]


def test_a_step_that_is_ahead_of_the_loader_waits_until_the_copy_is_enqueued() -> None:
    cuda = FakeCuda()
    arrival = CudaTransport(torch.device("cpu"), cuda).expect(2)
    event = cuda.Event()
    passed = threading.Event()

    def step() -> None:
        arrival.wait(0)
        passed.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not passed.wait(0.05)
    assert not arrival.is_complete
    arrival.sent(event)
    assert passed.wait(10)
    thread.join()


def test_a_failed_copy_fails_the_steps_that_wait_for_it() -> None:
    cuda = FakeCuda()
    transport = CudaTransport(torch.device("cpu"), cuda)
    arrival = transport.expect(2)

    class Broken:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            raise OSError("bus")

    copies: Any = [(cuda.target(), 0), (Broken(), 1)]
    with pytest.raises(OSError, match="bus"):
        transport.send(arrival, copies, [0, 1], lambda: None)
    with pytest.raises(RuntimeError, match="did not arrive: bus"):
        arrival.wait(1)
    assert not arrival.is_complete


def test_on_a_cpu_a_copy_is_a_copy() -> None:
    transport, said = transport_to(torch.device("cpu")), []
    assert isinstance(transport, HostTransport)
    target = torch.zeros(3)
    transport.send(None, [(target, torch.ones(3))], [0], lambda: said.append(1))
    assert transport.expect(4) is None
    assert (target.tolist(), said) == ([1, 1, 1], [1])
