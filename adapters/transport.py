"""How adapters get from the host to the device without holding up the steps.

On a CPU a copy is a copy. On CUDA copies run on a stream of their own, a few frames at a time: what
a step itself sends to the device queues behind at most those, whatever the adapter's size. An event
after each layer tells how far an adapter has come, so a prefill may start on the first layers while
the last are on their way.

Threads: `expect` and `upload` belong to the engine's thread, `send` to the loader's; an `Arrival`
is written by the loader's and read by the engine's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

FRAMES_IN_FLIGHT = 2
# An adapter may be used when this share of its layers has landed: a prefill spends longer on a
# layer than the copy of one takes, so the rest arrives ahead of it.
HEAD_START = 0.25

Copy = tuple[Tensor, Tensor]  # target on the device, source on the host


class Arrival:
    """How far an adapter has come: an event for each layer, in order, once its copy is enqueued."""

    def __init__(self, num_layers: int, fence: Any) -> None:
        self.num_layers = num_layers
        self.fence = fence  # nothing may be written before it: earlier steps read those frames
        self._events: list[Any] = []
        self._error: Exception | None = None
        self._news = threading.Condition()

    @property
    def is_complete(self) -> bool:
        """All layers have landed. Never waits."""
        return len(self._events) == self.num_layers and bool(self._events[-1].query())

    def wait(self, layer: int) -> None:
        """Make the current stream wait for a layer; the caller only if its copy is not enqueued.

        Raises: RuntimeError if the copy failed.
        """
        with self._news:
            self._news.wait_for(lambda: len(self._events) > layer or self._error is not None)
        if self._error is not None:
            raise RuntimeError(f"an adapter did not arrive: {self._error}") from self._error
        self._events[layer].wait()

    def sent(self, event: Any) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def fail(self, error: Exception) -> None:
        with self._news:
            self._error = error
            self._news.notify_all()


class Transport(Protocol):
    def expect(self, num_layers: int) -> Arrival | None:
        """Announce a `send` into memory that steps launched so far may still read. None: copies
        are over when `send` returns.
        """
        ...

    def send(
        self,
        arrival: Arrival | None,
        copies: Sequence[Copy],
        last_copies: Sequence[int],
        on_head_start: Callable[[], None],
    ) -> None:
        """Copy in order. last_copies: for each layer the copy that completes it, -1 for none.

        on_head_start: called once, when enough has landed for a step to begin with it.
        """
        ...

    def upload(self, values: Tensor) -> Tensor:
        """A small tensor on the device, without waiting for the steps under way."""
        ...


class HostTransport:
    def expect(self, num_layers: int) -> None:
        return None

    def send(
        self,
        arrival: Arrival | None,
        copies: Sequence[Copy],
        last_copies: Sequence[int],
        on_head_start: Callable[[], None],
    ) -> None:
        for target, source in copies:
            target.copy_(source)
        on_head_start()

    def upload(self, values: Tensor) -> Tensor:
        return values


class CudaTransport:
    """cuda: `torch.cuda`, or what stands in for it in tests."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    def expect(self, num_layers: int) -> Arrival:
        fence = self._cuda.Event()
        fence.record(self._cuda.current_stream(self._device))
        return Arrival(num_layers, fence)

    def send(
        self,
        arrival: Arrival | None,
        copies: Sequence[Copy],
        last_copies: Sequence[int],
        on_head_start: Callable[[], None],
    ) -> None:
        assert arrival is not None, "not expected"
        try:
            self._send(arrival, copies, last_copies, on_head_start)
        except Exception as error:
            arrival.fail(error)
            raise

    def _send(
        self,
        arrival: Arrival,
        copies: Sequence[Copy],
        last_copies: Sequence[int],
        on_head_start: Callable[[], None],
    ) -> None:
        head = last_copies[int(HEAD_START * (arrival.num_layers - 1))]
        in_flight: deque[tuple[int, Any]] = deque()
        landed = -1
        layer = 0

        def land() -> None:
            nonlocal landed
            before = landed
            landed, event = in_flight.popleft()
            event.synchronize()
            if before < max(head, 0) <= landed:
                on_head_start()

        with self._cuda.stream(self._stream):
            self._stream.wait_event(arrival.fence)
            for index, (target, source) in enumerate(copies):
                if len(in_flight) == FRAMES_IN_FLIGHT:
                    land()
                target.copy_(source, non_blocking=True)
                event = self._cuda.Event(blocking=True)  # waiting for it sleeps, it does not spin
                event.record(self._stream)
                in_flight.append((index, event))
                while layer < arrival.num_layers and last_copies[layer] <= index:
                    arrival.sent(event)
                    layer += 1
            while in_flight:
                land()

    def upload(self, values: Tensor) -> Tensor:
        # The allocator of pinned memory keeps it until the copy is over.
        return values.pin_memory().to(self._device, non_blocking=True)


def transport_to(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else HostTransport()
