"""Marks in the order of the device's work, and waiting for them. Without CUDA nothing waits."""

from __future__ import annotations

from typing import Any

import torch


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
