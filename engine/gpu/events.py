"""Marks in the order of the device's work, waiting for them, and what to do when it is gone.

Where there is no CUDA nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceLost(BaseException):
    """A fault of the device ended everything this process had on it.

    Not an Exception: nobody in this process can go on. It ends, and its parent starts a new one.
    """


def mark(device: torch.device) -> Any:
    """An event behind all that was launched so far, for `wait`; None where launches are calls."""
    if device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record(cuda.current_stream(device))
    return event


def wait(event: Any) -> None:
    """Let the host wait until the device has passed the mark."""
    if event is not None:
        event.synchronize()


@contextmanager
def faults(device: torch.device) -> Iterator[None]:
    """Errors within are the step's, unless the device does not work any more.

    Raises: DeviceLost.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if is_lost(device):
            raise DeviceLost(f"{device} failed, nothing on it can be used: {error}") from error
        raise


def is_lost(device: torch.device) -> bool:
    """After an illegal access, say, every call fails until the process ends."""
    try:
        torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        return True
    return False
